"""A rollout file as training data in files: the same datums that `build_batch` makes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._datum_files import write_datums
from eval_protocol_rft.data._files import JobError, write_file, write_rows
from eval_protocol_rft.data._format import METADATA_KEY, FormatError
from eval_protocol_rft.record import Score
from eval_protocol_rft.training._batch import TrainingBatch, build_batch, iter_batches
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._filters import Filters
from eval_protocol_rft.training._types import EmptyBatchError, TrainingDataError
from eval_protocol_rft.training.export import rl_step
from eval_protocol_rft.training.export.files import load_npz, load_safetensors
from tests.data.servers import ep_rft
from tests.scored_files import FAILED, METADATA, SCHEMA, Sampled, rows_of, write
from tests.scored_rows import answered

GROUPS = [
    [Sampled(1.0, (1, 2, 3)), Sampled(0.0, (4,)), FAILED],
    [Sampled(0.0, (5,)), Sampled(0.0, (6,))],  # no gradient
    [Sampled(0.5, (7, 8), truncated=True), Sampled(why="crash"), Sampled(1.0, (9, 1))],
    [FAILED, FAILED],
    [Sampled(1.0, (2, 2), style=0.0), Sampled(0.0, (3, 3), style=1.0)],
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", GROUPS)


def assert_same(found: Sequence[TrainingDatum], expected: Sequence[TrainingDatum]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in TrainingDatum.__struct_fields__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


def from_lines(path: Path) -> list[tuple[int, TrainingDatum]]:
    """Datums of JSON lines as a reader in another language would read them."""
    found = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        batch = values.pop("batch")
        for name in ("input_tokens", "target_tokens"):
            values[name] = np.array(values[name], np.int64)
        for name in ("logprobs", "advantages", "weights"):
            values[name] = np.array(values[name], np.float32)
        found.append((batch, TrainingDatum(**values)))
    return found


@pytest.mark.parametrize("algorithm", ["grpo", "cispo", "dr_grpo", "reinforce"])
def test_one_file_holds_what_build_batch_makes(file: Path, algorithm: str):
    options: dict[str, Any] = {"algorithm": algorithm, "normalization": "token"}
    expected = build_batch(RolloutDataset(file).training_rows(), **options)
    for name, load in (("d.npz", load_npz), ("d.safetensors", load_safetensors)):
        output = file.with_name(name)
        summary = write_datums(file, output, **options)
        batch: TrainingBatch = load(output)
        assert_same(batch.datums, expected.datums)
        assert (batch.algorithm, batch.loss_fn) == (algorithm, expected.loss_fn)
        assert (summary.files, summary.datums) == ([output], len(expected))
        assert summary.dropped == expected.dropped


def test_every_completion_is_a_datum_or_counted(file: Path):
    summary = write_datums(file, file.with_name("d.npz"), filters=Filters(truncated="mask"))
    # Row 3 has no survivor, so Eval Protocol's row says that as a whole.
    assert summary.dropped == {
        "failed": 1, "failed_row": 1, "unscored": 1, "zero_variance": 2, "masked": 1
    }  # fmt: skip
    assert summary.datums + summary.dropped.total() == sum(map(len, GROUPS)) - 1
    assert summary.groups == 3
    assert summary.sampled_tokens == (3 + 1) + 2 + (2 + 2)


def test_lines_hold_the_datums_number_for_number(file: Path):
    output = file.with_name("d.jsonl")
    write_datums(file, output, normalization="sequence")
    expected = build_batch(RolloutDataset(file).training_rows(), normalization="sequence")
    assert_same([datum for _, datum in from_lines(output)], expected.datums)
    shared = json.loads((file.parent / "d.jsonl.metadata.json").read_text())
    assert shared == {
        "algorithm": "grpo",
        "loss_fn": "ppo",
        "loss_fn_config": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        "normalization": "sequence",
        "tokenizer": "tok",
        "batches": 1,
        "datums": 6,
    }


def test_a_bounded_batch_is_a_file_of_its_own_and_a_number_in_lines(file: Path):
    expected = list(iter_batches(RolloutDataset(file).training_rows(), max_groups=1))
    assert len(expected) == 3
    summary = write_datums(file, file.with_name("d.npz"), max_groups=1)
    assert [path.name for path in summary.files] == [f"d-0000{i}.npz" for i in range(3)]
    for path, batch in zip(summary.files, expected, strict=True):
        assert_same(load_npz(path).datums, batch.datums)
    lines = file.with_name("d.jsonl")
    write_datums(file, lines, max_groups=1)
    for number, batch in enumerate(expected):
        assert_same([datum for i, datum in from_lines(lines) if i == number], batch.datums)
    assert summary.batches == 3
    assert summary.datums == sum(map(len, expected))


def test_batches_of_an_earlier_run_are_refused_or_replaced_to_the_last(file: Path):
    output = file.with_name("d.npz")
    write_datums(file, output, max_groups=1)
    kept = file.with_name("d-notes.npz")
    kept.touch()
    with pytest.raises(JobError, match=r"d-00000\.npz is there already"):
        write_datums(file, output, max_groups=2)
    write_datums(file, output, max_groups=2, overwrite=True)
    left = sorted(path.name for path in file.parent.glob("*.npz"))
    assert left == ["d-00000.npz", "d-00001.npz", kept.name]


def test_a_further_reward_takes_the_place_of_the_main_one(file: Path):
    batch_file = file.with_name("d.npz")
    with pytest.raises(TrainingDataError, match=r"data row 0 \('row-0'\) has no reward_style"):
        write_datums(file, batch_file, reward="style")
    styled = write(file.with_name("styled.parquet"), GROUPS[4:])
    write_datums(styled, batch_file, reward="style")
    datums = load_npz(batch_file).datums
    assert [datum.reward for datum in datums] == [0.0, 1.0]
    assert [np.sign(datum.advantages[-1]) for datum in datums] == [-1, 1]


def test_a_row_of_one_completion_never_falls_back_on_another_reward(tmp_path: Path):
    # Converted rows keep Eval Protocol's own result, which is the main reward's.
    [row] = rows_of([[Sampled(1.0, style=0.25)]])
    row.evaluation_row = msgspec.json.encode(
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "-"},
            ],
            "input_metadata": {"row_id": "row-0"},
            "execution_metadata": {"extra": {}},
            "evaluation_result": {"score": 1.0, "is_score_valid": True},
        }
    ).decode()
    other = rows_of([[], [Sampled(style=0.75)]])[0]
    unscored = rows_of([[], [], [Sampled(1.0)]])[0]
    unscored.evaluation_row = row.evaluation_row.replace("row-0", "row-2")
    unscored.scores["reward_style"] = Score(error="crash")
    write_rows(tmp_path / "in.parquet", SCHEMA, [row, other, unscored])
    summary = write_datums(
        tmp_path / "in.parquet", tmp_path / "d.npz", reward="style", algorithm="reinforce"
    )
    assert [d.reward for d in load_npz(tmp_path / "d.npz").datums] == [0.25, 0.75]
    assert summary.dropped == {"unscored": 1}


def test_rl_step_lines_are_those_of_the_export(file: Path):
    output = file.with_name("step.jsonl")
    summary = write_datums(file, output, format="rl-step")
    expected = rl_step.to_lines(RolloutDataset(file).training_rows(), unscored="drop")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == expected.lines
    assert summary.dropped == expected.dropped
    assert (summary.groups, summary.datums) == (len(lines), 8)
    first = lines[0]["samples"]
    assert [sample["evals"]["score"] for sample in first] == [1.0, 0.0]
    assert first[0]["messages"] == [
        {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "---"},
    ]


def test_rows_of_one_row_id_are_one_prompt_group_and_must_stand_together(tmp_path: Path):
    rows = rows_of([[Sampled(1.0)], [Sampled(0.0)], [Sampled(1.0)]], prompts=["q", "q", "q"])
    rows[0].row_id = rows[1].row_id = "same"
    write_rows(tmp_path / "in.parquet", SCHEMA, rows)
    write_datums(tmp_path / "in.parquet", tmp_path / "s.jsonl", format="rl-step")
    sizes = [len(json.loads(line)["samples"]) for line in (tmp_path / "s.jsonl").open()]
    assert sizes == [2, 1]
    rows[1].row_id, rows[2].row_id = "other", "same"
    write_rows(tmp_path / "apart.parquet", SCHEMA, rows)
    with pytest.raises(TrainingDataError, match="'same' belongs to a prompt group whose rows"):
        write_datums(tmp_path / "apart.parquet", tmp_path / "t.jsonl", format="rl-step")
    assert not (tmp_path / "t.jsonl").exists()


def test_options_that_rl_step_lines_cannot_hold_are_refused(file: Path):
    for options in ({"max_groups": 2}, {"algorithm": "grpo"}):
        with pytest.raises(TrainingDataError, match="RL-step lines hold text"):
            write_datums(file, file.with_name("s.jsonl"), format="rl-step", **options)


@pytest.mark.parametrize(
    ("output", "options", "error", "words"),
    [
        ("d.txt", {}, JobError, r"must end in \.jsonl, \.npz, \.safetensors"),
        ("d.npz", {"format": "jsonl"}, JobError, r"must end in \.jsonl"),
        ("in.parquet", {"format": "npz"}, JobError, r"must end in \.npz"),
        ("d.npz", {"reward": "taste"}, FormatError, "no reward 'taste'"),
        ("d.npz", {"algorithm": "grop"}, TrainingDataError, "unknown algorithm"),
        ("d.npz", {"normalization": "constant"}, TrainingDataError, "constant_length"),
    ],
)
def test_what_cannot_be_written_is_refused(file: Path, output, options, error, words):
    with pytest.raises(error, match=words):
        write_datums(file, file.with_name(output), **options)
    assert [path.name for path in file.parent.iterdir()] == ["in.parquet"]


def test_nothing_is_written_where_nothing_trains(tmp_path: Path):
    file = write(tmp_path / "in.parquet", [[Sampled(1.0), Sampled(1.0)], [FAILED]])
    for name, options in (
        ("d.npz", {}),
        ("d.jsonl", {}),
        ("d.npz", {"max_groups": 1}),
        ("d.jsonl", {"max_tokens": 9}),
    ):
        with pytest.raises(EmptyBatchError, match="zero_variance: 2"):
            write_datums(file, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_the_command_prints_what_was_written_and_what_was_not(file: Path):
    arguments = [str(file), "-o", str(file.with_name("d.npz")), "--truncated", "drop"]
    result = ep_rft("datums", *arguments, "--max-groups", "1")
    assert result.exit_code == 0, result.output
    assert "4 datums of 2 prompts in 2 batches, 8 sampled tokens" in result.stdout
    assert "1  truncated: cut off at max_tokens" in result.stdout
    assert "1  small_group" in result.stdout
    assert result.stdout.rstrip().endswith("d-00000.npz to d-00001.npz")
    step = [str(file), "-o", str(file.with_name("s.jsonl")), "--format", "rl-step"]
    assert "8 samples of 4 prompts" in ep_rft("datums", *step).stdout
    again = ep_rft("datums", *step)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "is there already" in again.stderr


def test_the_command_warns_of_biased_sampling_in_one_line(file: Path):
    biased = msgspec.structs.replace(
        METADATA,
        sampling=msgspec.structs.replace(METADATA.sampling, top_k=5, support_truncated=True),
    )
    schema = SCHEMA.with_metadata({METADATA_KEY: biased.encode()})
    tables = [table.replace_schema_metadata(schema.metadata) for table in _tables(file)]
    write_file(file.with_name("biased.parquet"), schema, tables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ep_rft(
            "datums", str(file.with_name("biased.parquet")), "-o", str(file.with_name("d.npz"))
        )
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("ep-rft: warning: 6 of 6 completions have biased")
    assert result.stderr.count("\n") == 1


def test_the_command_warns_of_completions_of_several_models_and_of_all_that_is_wrong(tmp_path):
    rows = []
    for model, texts in (("m", ["4", "5"]), ("other", ["6", "7", "8"])):
        row = answered(*texts)
        row.input_metadata.row_id = "row"
        row.input_metadata.completion_params = {"model": model}
        assert row.execution_metadata.extra is not None
        row.execution_metadata.extra["sampling"] |= {
            "model": model,
            "top_k": 5,
            "support_truncated": True,
        }
        row.execution_metadata.extra["rewards"] = [float(i) for i in range(len(texts))]
        rows.append(row.model_dump_json() + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    for output, more in (("d.npz", []), ("s.jsonl", ["--format", "rl-step"])):
        result = ep_rft("datums", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / output), *more)
        assert result.exit_code == 0, result.output
        warning = "ep-rft: warning: the completions are of 2 models, 2 of 'm', 3 of 'other': one"
        assert warning in result.stderr
        assert ("5 of 5 completions have biased" in result.stderr) == (output == "d.npz")


def test_the_command_says_once_what_is_wrong_with_many_batches(tmp_path: Path) -> None:
    rows = []
    for row_id in ("calm", "bright", "quick"):
        row = answered("4", "5")
        row.input_metadata.row_id = row_id
        assert row.execution_metadata.extra is not None
        row.execution_metadata.extra["sampling"] |= {"top_k": 5, "support_truncated": True}
        row.execution_metadata.extra["rewards"] = [0.0, 1.0]
        rows.append(row.model_dump_json() + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    output = ["-o", str(tmp_path / "d.npz"), "--max-groups", "1"]
    result = ep_rft("datums", str(tmp_path / "rows.jsonl"), *output)
    assert "in 3 batches" in result.stdout
    assert result.stderr.startswith("ep-rft: warning: 2 of 2 completions have biased")
    assert result.stderr.count("\n") == 1


def _tables(file: Path) -> list[pa.Table]:
    return list(RolloutDataset(file).tables())
