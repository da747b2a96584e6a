"""Rows of Eval Protocol's remote processors in files and exports: converted, and their routing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.data import RolloutDataset, convert, read_rows, write_datums
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.report._reading import read_rows as read_report_rows
from eval_protocol_rft.rollout import read_remote_rows
from eval_protocol_rft.training import (
    Segment,
    TrainingBatch,
    TrainingDataError,
    build_batch,
    group_rows,
)
from eval_protocol_rft.training.export import cookbook, files
from tests import remote_rows as remote
from tests.remote_rows import TOKENIZER, brought_back, two_traces


def matrix(*values: int) -> str:
    return base64.b64encode(bytes(values)).decode()


def routings() -> list[list[str | None]]:
    """Of two turns: the first says it of what it sampled, the second of all."""
    first, second = remote.two_turns().turns()
    prompt, sampled = len(first["prompt_ids"]), len(first["completion_ids"])
    total = len(second["prompt_ids"]) + len(second["completion_ids"])
    return [
        [None] * prompt + [matrix(1, i % 256) for i in range(sampled)],
        [matrix(2, i % 256) for i in range(total)],
    ]


def routed_rows() -> list[EvaluationRow]:
    return [brought_back(two_traces(routings()), score=score) for score in (1.0, 0.0)]


def expected_routing() -> list[str]:
    """Each token's is that of the turn which brought it."""
    first, second = routings()
    return [m or "" for m in first] + [m or "" for m in second[len(first) :]]


def batch_of(rows: list[Any]) -> TrainingBatch:
    return build_batch(rows, tokenizer=TOKENIZER)


def test_each_token_has_the_routing_of_the_turn_that_brought_it():
    (read,) = read_remote_rows(routed_rows()[:1], tokenizer=TOKENIZER)
    extra = json.loads(read.model_dump_json())["execution_metadata"]["extra"]
    record = RolloutRecord.from_extra(extra)
    assert record.trajectories is not None
    (segment,) = record.trajectories[0]
    assert segment.routing_matrices == expected_routing()
    (plain,) = remote.two_turns().segments()
    assert segment != plain
    extra["trajectories"][0][0]["routing_matrices"].pop()
    with pytest.raises(
        TrainingDataError, match=r"completion 0, segment 0: routing_matrices: \d+ for"
    ):
        group_rows([{**json.loads(read.model_dump_json()), "execution_metadata": {"extra": extra}}])


def test_a_segment_of_other_routing_than_tokens_is_refused():
    with pytest.raises(RecordError, match="routing_matrices: 1 for 2 tokens"):
        Segment(tokens=[1, 2], logprobs=[0, -1.0], loss_mask=[0, 1], routing_matrices=[""])
    with pytest.raises(RecordError, match=r"routing_matrices\[1\] is NoneType"):
        Segment(tokens=[1, 2], logprobs=[0, -1.0], loss_mask=[0, 1], routing_matrices=["", None])


def test_fireworks_gets_the_routing_of_each_prediction():
    sdk = pytest.importorskip("fireworks.training.sdk.client", reason="needs extra `fireworks`")
    from eval_protocol_rft.training.export import fireworks

    data = fireworks.to_datums(batch_of(routed_rows()))
    assert [d.model_input.routing_matrices for d in data] == [expected_routing()[1:]] * 2
    assert sdk._r3_request_issues(data) == []
    plain = [brought_back(two_traces(), score=score) for score in (1.0, 0.0)]
    assert fireworks.to_datums(batch_of(plain))[0].model_input.routing_matrices is None


def test_the_cookbook_gets_it_as_its_recipes_align_it():
    (group,) = group_rows(routed_rows(), tokenizer=TOKENIZER)
    for run in cookbook.to_rollout(group)["runs"]:
        (sample,) = run["segments"]
        assert sample["routing_matrices"] == expected_routing()[1:]
    (group,) = group_rows([brought_back(two_traces())], tokenizer=TOKENIZER)
    assert "routing_matrices" not in cookbook.to_rollout(group)["runs"][0]["segments"][0]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_batch_in_a_file_keeps_it(kind: str, tmp_path: Path):
    save, load = getattr(files, f"save_{kind}"), getattr(files, f"load_{kind}")
    batch = batch_of(routed_rows())
    save(batch, tmp_path / "batch")
    for read, written in zip(load(tmp_path / "batch").datums, batch.datums, strict=True):
        assert read.routing_matrices == written.routing_matrices == expected_routing()[1:]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """As Eval Protocol writes it, with a tokenizer that can be named."""
    folder = tmp_path / "tokenizer"
    TOKENIZER.tokenizer.save_pretrained(folder)
    rows = routed_rows()
    for row in rows:
        row.input_metadata.completion_params["tokenizer"] = str(folder)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return path


def same(batch: TrainingBatch, other: TrainingBatch) -> bool:
    arrays = ("input_tokens", "target_tokens", "logprobs", "advantages", "weights")
    return len(batch) == len(other) and all(
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        and a.routing_matrices == b.routing_matrices
        for a, b in zip(batch.datums, other.datums, strict=True)
    )


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_rows_become_a_rollout_file_and_rows_again(rows_file: Path, ending: str, tmp_path: Path):
    wanted = build_batch(list(read_rows(rows_file)))
    rollouts, back = tmp_path / f"rollouts.{ending}", tmp_path / "back.jsonl"
    summary = convert(rows_file, rollouts)
    assert (summary.data_rows, summary.completions) == (1, 2)
    assert same(build_batch(group_rows(RolloutDataset(rollouts).prompt_groups())), wanted)
    convert(rollouts, back, to_format="ep")
    assert same(build_batch(list(read_rows(back))), wanted)
    again = tmp_path / f"again.{ending}"
    convert(back, again)
    assert same(build_batch(group_rows(RolloutDataset(again).prompt_groups())), wanted)
    ((first, second),) = RolloutDataset(rollouts).groups()
    assert (first.reward, second.reward) == (1.0, 0.0)


def test_datums_of_the_file_in_json_lines_have_it_too(rows_file: Path, tmp_path: Path):
    convert(rows_file, tmp_path / "rollouts.parquet")
    write_datums(tmp_path / "rollouts.parquet", tmp_path / "datums.jsonl")
    lines = [msgspec.json.decode(line) for line in (tmp_path / "datums.jsonl").open("rb")]
    assert [line["routing_matrices"] for line in lines] == [expected_routing()[1:]] * 2


def test_a_row_that_is_refused_is_named_with_its_line(rows_file: Path, tmp_path: Path):
    lines = [json.loads(line) for line in rows_file.open()]
    del lines[1]["execution_metadata"]["extra"]["assistant_turn_payloads"][0]
    rows_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(JobError, match=r"rows.jsonl:2: row 'row-1', turn 0, an assistant message"):
        convert(rows_file, tmp_path / "rollouts.parquet")


def test_a_tokenizer_can_be_named_for_the_conversion(rows_file: Path, tmp_path: Path):
    lines = [json.loads(line) for line in rows_file.open()]
    for line in lines:
        folder = line["input_metadata"]["completion_params"].pop("tokenizer")
    rows_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(JobError, match="names no tokenizer"):
        convert(rows_file, tmp_path / "rollouts.parquet")
    assert convert(rows_file, tmp_path / "rollouts.parquet", tokenizer=folder).completions == 2


def test_reports_show_such_rows_and_why_one_has_no_record(rows_file: Path):
    lines = [json.loads(line) for line in rows_file.open()]
    del lines[1]["execution_metadata"]["extra"]["assistant_turn_payloads"][0]
    rows_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    good, bad = read_report_rows(rows_file)
    assert good.record is not None
    assert (good.prompt, good.record.rewards) == ("2 + 40?", [1.0])
    assert bad.record is None
    assert "turn 0, an assistant message" in (bad.error or "")
