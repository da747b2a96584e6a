"""What `ep-rft generate` makes of a data set: every format, every kind of prompt, every column."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from tests.data.servers import (
    at,
    pairs,
    refused,
    rows_by_pair,
    sampled,
    succeed,
    texts,
    write_jsonl,
)
from tests.rollouts import TOOLS, rendered
from tests.serving import byte_tokenizer
from tests.stub_server import StubServer
from tests.stub_server import sampled as sampled_by_server

SUMS = [(12, 30), (7, 8), (99, 1), (45, 45), (3, 50)]
ROWS = [
    {"problem": f"{a}+{b}=", "ground_truth": str(a + b), "level": a % 3, "tags": [str(a), str(b)]}
    for a, b in SUMS
]
N = 3


def write(folder: Path, form: str) -> Path:
    """`ROWS` in a format; CSV holds only texts."""
    path = folder / f"sums.{form}"
    table = pa.Table.from_pylist(ROWS)
    match form:
        case "jsonl":
            return write_jsonl(path, ROWS)
        case "json":
            path.write_text(json.dumps(ROWS))
        case "parquet":
            pq.write_table(table, path)
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["problem", "ground_truth", "level"])
                writer.writeheader()
                writer.writerows({k: row[k] for k in writer.fieldnames} for row in ROWS)
        case "hf":
            datasets.Dataset(table).save_to_disk(folder / "sums")
            return folder / "sums"
        case "folder":
            (folder / "sums").mkdir()
            pq.write_table(table.slice(0, 2), folder / "sums" / "0.parquet")
            pq.write_table(table.slice(2), folder / "sums" / "1.parquet")
            return folder / "sums"
    return path


@pytest.fixture(scope="module")
def from_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jsonl")
    return run_local(write(folder, "jsonl"), folder / "out.parquet")


def run_local(data: Path, output: Path, *arguments: object) -> Path:
    model = ("--model", "local/arithmetic", "--max-tokens", 8, "--seed", 1, "--quiet")
    succeed("generate", data, "-o", output, "-n", N, *model, *arguments)
    return output


def assert_same(rows: dict[Any, dict[str, Any]], others: dict[Any, dict[str, Any]]) -> None:
    """The same completions, which do not depend on what else was asked. Their logprobs do, by
    rounding: a batch of another size is added up in another order."""
    assert rows.keys() == others.keys()
    for pair, row in rows.items():
        for name, value in others[pair].items():
            if name in ("logprobs", "raw_logprobs"):
                assert row[name] == pytest.approx(value, abs=1e-5)
            else:
                assert row[name] == value, (pair, name)


@pytest.mark.parametrize("form", ["json", "parquet", "csv", "hf", "folder"])
def test_every_format_of_the_same_rows_gives_the_same_completions(form, from_jsonl, tmp_path):
    output = run_local(write(tmp_path, form), tmp_path / "out.parquet")
    assert_same(sampled(output), sampled(from_jsonl))
    assert [row["ground_truth"] for row in rows_by_pair(output).values()] == [
        row["ground_truth"] for row in ROWS for _ in range(N)
    ]


def test_lines_of_json_hold_what_parquet_holds(from_jsonl, tmp_path):
    output = run_local(write(tmp_path, "jsonl"), tmp_path / "out.jsonl")
    when = ("seconds", "began_at")
    lines, rows = (
        {
            pair: {name: value for name, value in row.items() if name not in when}
            for pair, row in rows_by_pair(path).items()
        }
        for path in (output, from_jsonl)
    )
    assert_same(lines, rows)


def test_columns_of_the_data_set_are_kept_as_they_are(from_jsonl, tmp_path):
    from_parquet = run_local(write(tmp_path, "parquet"), tmp_path / "out.parquet")
    for output in (from_jsonl, from_parquet):
        rows = list(RolloutDataset(output))
        assert [(row.data_idx, row.sample_idx) for row in rows] == pairs(len(ROWS), N)
        assert [row.original for row in rows] == [row for row in ROWS for _ in range(N)]
    schema = pq.read_schema(from_parquet)
    assert schema.field("original_level").type == pa.int64()
    assert schema.field("original_tags").type == pa.list_(pa.string())


def test_metadata_say_what_was_done(from_jsonl):
    metadata = RolloutDataset(from_jsonl).metadata
    asked = metadata.sampling
    assert (asked.model, asked.tokenizer) == ("local/arithmetic", "local/arithmetic")
    assert (asked.temperature, asked.top_p, asked.top_k) == (1.0, 1.0, 0)
    assert (asked.max_tokens, asked.n, asked.seed, asked.seed_given) == (8, N, 1, True)
    assert len(asked.model_fingerprint) == 64
    assert not asked.support_truncated
    data = metadata.data
    assert (data.name, data.num_rows, data.prompt_key) == ("sums", len(ROWS), "problem")
    assert (data.ground_truth_key, data.tools_key) == ("ground_truth", None)
    assert metadata.prompt_kind == "text"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--limit", 2], [0, 1]),
        (["--where", "level == 0"], [i for i, row in enumerate(ROWS) if row["level"] == 0]),
        (["--shuffle-seed", 5], list(np.random.default_rng(5).permutation(len(ROWS)))),
        (["--shuffle-seed", 5, "--limit", 2], list(np.random.default_rng(5).permutation(5)[:2])),
    ],
)
def test_the_rows_that_were_selected_are_asked_in_their_order(
    arguments, expected, from_jsonl, tmp_path
):
    output = run_local(write(tmp_path, "jsonl"), tmp_path / "out.parquet", *arguments)
    got, all_of_them = sampled(output), sampled(from_jsonl)
    assert list(got) == [(i, k) for i in expected for k in range(N)]
    for pair, row in got.items():
        assert_same({pair: row}, {pair: all_of_them[pair]})


MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}],
]


def prompts_of(server: StubServer) -> list[str]:
    """What was asked, each once, as text."""
    asked = dict.fromkeys(seen.prompt for seen in server.requests)
    return [byte_tokenizer().decode(list(prompt)) for prompt in asked]


def test_messages_are_rendered_by_the_chat_template_and_the_server_gets_the_ids(
    tmp_path, server, tokenizer_folder
):
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages} for messages in MESSAGES])
    output = tmp_path / "out.parquet"
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    rows = rows_by_pair(output)
    for i, messages in enumerate(MESSAGES):
        # A stored answer is not asked.
        asked = [m for m in messages if m["role"] != "assistant"]
        row = rows[i, 0]
        assert [{k: v for k, v in m.items() if v is not None} for m in row["prompt"]] == asked
        assert byte_tokenizer().decode(row["prompt_ids"]) == "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in asked
        ) + ("<|im_start|>assistant\n")
        ids, logprobs = sampled_by_server(row["prompt_ids"], row["seed"], 8)
        assert row["completion_ids"] == ids
        assert row["logprobs"] == pytest.approx(logprobs)
    assert json.loads(rows[2, 0]["original_messages"]) == MESSAGES[2]


def test_a_system_message_goes_before_prompts_that_have_none(tmp_path, server, tokenizer_folder):
    output = tmp_path / "out.parquet"
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages} for messages in MESSAGES[:2]])
    options = at(server, tokenizer_folder, system="count")
    succeed("generate", data, "-o", output, *options)
    assert [text.split("<|im_end|>")[0].split("\n")[1] for text in prompts_of(server)] == [
        "count",
        "be brief",
    ]
    assert RolloutDataset(output).metadata.sampling.system == "count"
    server.requests.clear()
    plain = write_jsonl(tmp_path / "plain.jsonl", texts(1))
    succeed("generate", plain, "-o", tmp_path / "plain.parquet", *options)
    assert prompts_of(server) == [
        "<|im_start|>system\ncount<|im_end|>\n<|im_start|>user\nquestion 0<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert RolloutDataset(tmp_path / "plain.parquet").metadata.prompt_kind == "messages"


def test_tools_reach_the_prompt_and_the_file(tmp_path, server, tokenizer_folder):
    rows = [{"prompt": "2+2?", "tools": TOOLS}, {"prompt": "hi", "tools": None}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    output = tmp_path / "out.parquet"
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    [first, second] = prompts_of(server)
    assert first.startswith("<tools>")
    assert json.loads(first.split("</tools>")[0].removeprefix("<tools>")) == TOOLS
    assert not second.startswith("<tools>")
    assert [row.tools for row in RolloutDataset(output)] == [TOOLS, None]


def test_arguments_of_the_chat_template_are_passed(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "d.jsonl", texts(1))
    options = at(server, tokenizer_folder, chat_template_kwargs='{"enable_thinking": true}')
    succeed("generate", data, "-o", tmp_path / "out.parquet", *options)
    assert prompts_of(server)[0].endswith("<think>")


def test_sampling_options_are_in_the_request_and_in_the_file(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "d.jsonl", texts(1))
    output = tmp_path / "out.parquet"
    options = at(
        server,
        tokenizer_folder,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        max_tokens=4,
        extra_body='{"min_p": 0.1}',
    )
    succeed("generate", data, "-o", output, "--stop", "x", "--stop", "yz", *options)
    body = server.requests[0].body
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_tokens": 4, "min_p": 0.1}
    assert {key: body[key] for key in expected} == expected
    assert body["stop"] == ["x", "yz"]
    asked = RolloutDataset(output).metadata.sampling
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (0.5, 0.9, 5, 4)
    assert (asked.stop, asked.other, asked.support_truncated) == (["x", "yz"], {"min_p": 0.1}, True)
    assert len(rows_by_pair(output)[0, 0]["completion_ids"]) <= 4


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
ODD_CALL = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    {"role": "tool", "content": "x"},
]


@pytest.mark.parametrize("written", [list, json.dumps])
def test_an_image_is_refused_before_anything_is_asked(written, tmp_path, server, tokenizer_folder):
    rows = [{"messages": written(messages)} for messages in (MESSAGES[0], IMAGE)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    output = tmp_path / "out.parquet"
    said = refused("generate", data, "-o", output, *at(server, tokenizer_folder))
    assert "d.jsonl:2: the prompt in 'messages': messages[0].content has the parts" in said
    assert not server.requests


@pytest.mark.parametrize("place", [0, 1])
def test_a_prompt_that_cannot_be_rendered_fails_alone(place, tmp_path, server, tokenizer_folder):
    prompts = [MESSAGES[0], MESSAGES[1]]
    prompts.insert(place, ODD_CALL)
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages} for messages in prompts])
    output = tmp_path / "out.parquet"
    result = succeed("generate", data, "-o", output, "-n", 2, *at(server, tokenizer_folder))
    assert "2 prompt; the first, row d-" in result.stderr
    assert len(server.requests) == 4
    for (i, _), row in rows_by_pair(output).items():
        assert (row["error_kind"] == "prompt") == (i == place)
        assert (row["completion_ids"] is None) == (i == place)
        if i == place:
            assert row["error"].startswith(f"d.jsonl:{place + 1}: ")
            assert (row["attempts"], row["prompt_ids"]) == (0, None)


def test_a_tokenizer_that_can_render_nothing_is_an_error_before_anything_is_asked(tmp_path, server):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "d.jsonl", texts(30))
    output = tmp_path / "out.parquet"
    message = refused("generate", data, "-o", output, *at(server, tmp_path / "tokenizer"))
    assert "d.jsonl:1: tokenizer" in message
    assert "has no chat template" in message
    assert not server.requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "tokenizer"]


def test_prompt_ids_are_those_of_a_plain_user_message(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "d.jsonl", [{"question": "ü and 日本 \u0000 \U0001f600"}])
    output = tmp_path / "out.parquet"
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder))
    row = rows_by_pair(output)[0, 0]
    assert row["prompt"] == "ü and 日本 \u0000 \U0001f600"
    assert row["prompt_ids"] == rendered(row["prompt"])
