"""The documented commands of a bulk script that people have run as they are, but for its name."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from eval_protocol_rft.cli._bulk_script import in_our_flags
from eval_protocol_rft.data import RolloutDataset
from eval_protocol_rft.local import LocalSampler
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.local.server._app import create_app
from tests.data.servers import ep_rft, rows_by_pair, succeed, write_jsonl
from tests.serving import running

NAME = "meta-llama/Llama-3.1-8B"
PROMPTS = [f"{a}+{a + 1}=" for a in range(10, 14)]
ROWS = [
    {"prompt": prompt, "data_source": "sums", "ground_truth": str(i), "level": i % 3}
    for i, prompt in enumerate(PROMPTS)
]
COLUMNS = {"prompt", "response", "sample_idx", "data_idx", "temperature", "top_p", "max_tokens"}
"""Of the script's files, beside `original_*`."""
_WITH = f"--model_path {NAME} --data_path data.parquet --output_path rollouts.parquet"
_AT = "--use_vllm --vllm_base_url http://localhost:8000/v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: a data set, and a base model in a folder of the name that they
    name."""
    folder = tmp_path_factory.mktemp("bulk")
    base = folder / NAME
    shutil.copytree(bundled_model_path("arithmetic") or "", base)
    (base / "chat_template.jinja").unlink()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "data.parquet")
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("meta-llama", "data.parquet"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    sampler = LocalSampler.from_pretrained(folder / NAME)
    app = create_app(
        sampler, sampler.tokenizer, model_name=NAME, context_length=sampler.context_length
    )
    with running(app) as url:
        yield f"{url}/v1"


def run(command: str, url: str = "") -> str:
    """The command in place of the script; what it says."""
    words = [url if word.startswith("http://localhost") else word for word in shlex.split(command)]
    return succeed("generate", *words, "--quiet").stderr


@pytest.mark.parametrize(
    ("command", "output", "settings"),
    [
        (f"{_WITH} --num_samples 8 {_AT}", "rollouts.parquet", (8, 0.7, 0.9, 512)),
        (f"{_WITH} --num_samples 8", "rollouts.parquet", (8, 0.7, 0.9, 512)),
        (
            f"{_WITH} --num_samples 8 {_AT} --vllm_max_concurrent 100",
            "rollouts.parquet",
            (8, 0.7, 0.9, 512),
        ),
        (
            f"--model_path {NAME} --data_path data.parquet --output_path rollouts.jsonl "
            "--output_format jsonl --num_samples 16 --temperature 0.8 --top_p 0.95 "
            "--max_tokens 2048 --batch_size 16 --use_vllm --vllm_max_concurrent 200 "
            "--vllm_base_url http://localhost:8000/v1",
            "rollouts.jsonl",
            (16, 0.8, 0.95, 2048),
        ),
        (f"{_WITH} --num_samples 16 {_AT}", "rollouts.parquet", (16, 0.7, 0.9, 512)),
        (f"--model_path {NAME} --data_path data.parquet", "rollouts.parquet", (8, 0.7, 0.9, 512)),
    ],
)
def test_a_documented_command_samples_what_it_says(
    command: str, output: str, settings: tuple[object, ...], place: Path, url: str
) -> None:
    said = run(command, url)
    assert said.count("in our flags: ep-rft generate data.parquet") == 1
    file = RolloutDataset(place / output)
    sampling = file.metadata.sampling
    assert sampling is not None
    asked = (sampling.n, sampling.temperature, sampling.top_p, sampling.max_tokens)
    assert asked == settings
    rows = rows_by_pair(place / output)
    assert len(rows) == len(ROWS) * sampling.n
    # Exact ids of the raw text, against the tokenizer itself.
    tokenizer = AutoTokenizer.from_pretrained(place / NAME)
    for (data_idx, _), row in rows.items():
        assert row["error"] is None
        assert row["prompt_ids"] == tokenizer(PROMPTS[data_idx])["input_ids"]
    # What is told to be the same in our flags is the same job.
    told = shlex.split(
        said.split("in our flags: ep-rft generate ")[1].split("\n")[0].split(" (")[0]
    )
    assert "nothing to do" in succeed("generate", *told).stdout


def test_pandas_code_for_the_scripts_columns_goes_on_working(place: Path) -> None:
    run(f"{_WITH} --num_samples 2 --output_path rollouts.jsonl --output_format jsonl")
    run(f"{_WITH} --num_samples 2")
    lines = pd.read_json("rollouts.jsonl", lines=True, dtype=False)
    for frame in (pd.read_parquet("rollouts.parquet"), lines):
        assert set(frame.columns) >= COLUMNS
        for i, row in frame.iterrows():
            asked = ROWS[row["data_idx"]]
            assert (row["data_idx"], row["sample_idx"]) == divmod(int(str(i)), 2)
            assert row["prompt"] == asked["prompt"]
            assert isinstance(row["response"], str)
            assert row["original_data_source"] == "sums"
            assert row["original_ground_truth"] == asked["ground_truth"]
            assert (row["temperature"], row["top_p"], row["max_tokens"]) == pytest.approx(
                (0.7, 0.9, 512)
            )


def test_without_an_address_it_is_the_scripts(place: Path) -> None:
    ours = in_our_flags(shlex.split(f"{_WITH} --num_samples 16 --use_vllm"))
    assert ours[ours.index("--base-url") + 1] == "http://localhost:8000/v1"
    assert ours[ours.index("--tokenizer") + 1] == NAME
    assert "--raw" in ours
    assert "--concurrency" not in ours


def test_a_model_with_a_chat_template_is_asked_in_chats_on_a_server(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = bundled_model_path("arithmetic")
    asked = ["--model_path", str(chat), "--data_path", "data.parquet"]
    served = in_our_flags([*asked, "--use_vllm", "--vllm_model_name", "served"])
    assert "--raw" not in served
    assert served[served.index("--model") + 1] == "served"
    assert "--raw" in in_our_flags(asked)  # as the script tokenizes for a model that it loads
    assert "--raw" not in in_our_flags([*asked, "--chat-template", "chatml"])
    capsys.readouterr()


def test_our_flags_beside_them_win(place: Path) -> None:
    run(f"{_WITH} -n 3 --temperature 1 --top-p=1 --max-tokens 4 --limit 2")
    sampling = RolloutDataset("rollouts.parquet").metadata.sampling
    assert sampling is not None
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.max_tokens) == (3, 1, 1, 4)
    assert len(rows_by_pair(place / "rollouts.parquet")) == 6


def test_one_flag_alone_is_an_alias_and_brings_no_defaults(place: Path) -> None:
    said = run("data.parquet -o o.parquet --model local/arithmetic --num_samples 2 --max_tokens 4")
    assert "in our flags: ep-rft generate -n 2 --max-tokens 4 data.parquet" in said
    sampling = RolloutDataset("o.parquet").metadata.sampling
    assert sampling is not None
    assert (sampling.n, sampling.temperature, sampling.max_tokens) == (2, 1.0, 4)
    assert not sampling.raw


def test_the_script_asks_a_column_input_where_there_is_no_other(place: Path) -> None:
    write_jsonl(place / "d.jsonl", [{"input": "1+1=", "output": "2"}])
    run(f"--model_path {NAME} --data_path d.jsonl --num_samples 1")
    [row] = rows_by_pair(place / "rollouts.parquet").values()
    assert (row["prompt"], row["original_output"]) == ("1+1=", "2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num_samples", "--num_samples: expected one argument"),
        ("--output_format csv", "csv"),
        ("--prompt_key gone", "no column 'gone'"),
        ("--num_samples x", "x"),
    ],
)
def test_a_wrong_value_is_one_line(flags: str, said: str, place: Path) -> None:
    result = ep_rft("generate", *shlex.split(f"{_WITH} {flags}"))
    assert result.exit_code != 0
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_json_of_the_rows_is_as_the_script_writes_it(place: Path) -> None:
    run(f"{_WITH} --num_samples 1 --output_path o.jsonl --output_format jsonl")
    row = json.loads((place / "o.jsonl").read_text().splitlines()[1])
    assert row["original_level"] == 1
