"""A data row whose completions were sampled behind different prompts, as a chat template that says
the date makes them when a job goes on the next day: each keeps its own, wherever the file goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._datum_files import write_datums
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, schema
from eval_protocol_rft.data._to_ep import to_row
from eval_protocol_rft.record import RecordError, Score
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training.export import files
from tests.convert_rows import SAMPLING, same
from tests.data.servers import at, rows_by_pair, succeed, write_jsonl
from tests.stub_server import Status, StubServer

METADATA = FileMetadata(prompt_kind="messages", sampling=SAMPLING)
SENT = {(0, 0): [1, 2], (0, 1): [1, 3, 3], (0, 3): [1, 2], (0, 4): [1, 3, 3], (1, 0): [1, 4]}
"""What stood before each completion of two data rows, of which (0, 2) failed on the second day."""


def completion(data_idx: int, sample_idx: int) -> CompletionRow:
    row = CompletionRow(
        row_id=f"r{data_idx}",
        data_idx=data_idx,
        sample_idx=sample_idx,
        prompt=[{"role": "user", "content": f"question {data_idx}"}],
        prompt_ids=np.array(SENT.get((data_idx, sample_idx), [1, 3, 3]), np.int32),
        temperature=0.7,
        top_p=1.0,
        top_k=0,
        attempts=1,
        seconds=1.0,
        began_at=1.5,
    )
    if (data_idx, sample_idx) not in SENT:
        row.error, row.error_kind = "late", "timeout"
        return row
    row.response = f"{data_idx}.{sample_idx}"
    row.completion_ids = np.array([10 + sample_idx, 5], np.int32)
    row.logprobs = np.array([-0.5, -sample_idx], np.float32)
    row.finish_reason, row.truncated = "stop", False
    row.scores = {"reward": Score(reward=float(sample_idx % 2))}
    return row


ROWS = [*(completion(0, i) for i in range(5)), completion(1, 0)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_rows(tmp_path / "r.parquet", schema(METADATA, {}), ROWS)
    return tmp_path / "r.parquet"


def test_each_completion_trains_behind_the_prompt_that_was_sent(source: Path) -> None:
    batch = build_batch(RolloutDataset(source).training_rows())
    prompts = {
        (datum.row_id, datum.completion): datum.input_tokens[: datum.prompt_length].tolist()
        for datum in batch.datums
    }
    assert prompts == {(f"r{i}", k): ids for (i, k), ids in SENT.items() if i == 0}
    assert {datum.group for datum in batch.datums} == {0}
    assert dict(batch.dropped) == {"failed": 1, "small_group": 1}
    write_datums(source, source.with_name("d.npz"))
    stored = files.load_npz(source.with_name("d.npz")).datums
    assert [d.input_tokens.tolist() for d in stored] == [
        d.input_tokens.tolist() for d in batch.datums
    ]


def test_rl_step_lines_hold_one_group_of_them(source: Path) -> None:
    write_datums(source, source.with_name("d.jsonl"), format="rl-step")
    lines = [json.loads(line) for line in source.with_name("d.jsonl").read_text().splitlines()]
    assert [len(line["samples"]) for line in lines] == [4, 1]


@pytest.mark.parametrize(("to_format", "name"), [("ep", "e.jsonl"), ("verl", "v.parquet")])
def test_converted_they_are_rows_of_one_prompt_each_and_the_file_comes_back(
    source: Path, to_format: str, name: str
) -> None:
    made, back = source.with_name(name), source.with_name("back.parquet")
    summary = convert(source, made, to_format=to_format)
    assert (summary.data_rows, "several prompts (1)" in str(summary)) == (2, True)
    if to_format == "ep":
        records = [
            json.loads(line)["execution_metadata"]["extra"]
            for line in made.read_text().splitlines()
        ]
        found = [(r["prompt_ids"], r["sampling"]["indices"]) for r in records]
    else:
        found = [(r["prompt_ids"], r["sample_idx"]) for r in pq.read_table(made).to_pylist()]
    assert found == [([1, 2], [0, 3]), ([1, 3, 3], [1, 4]), ([1, 4], [0])]
    convert(made, back)
    again = list(RolloutDataset(back))
    assert [(row.data_idx, row.sample_idx) for row in again] == [
        (row.data_idx, row.sample_idx) for row in ROWS if to_format == "ep" or not row.failed
    ]
    if to_format == "ep":
        assert all(map(same, again, ROWS))
    for row in again:
        assert row.failed or row.prompt_ids.tolist() == SENT[row.data_idx, row.sample_idx]


def test_one_record_is_not_made_of_them() -> None:
    with pytest.raises(RecordError, match="behind 2 different prompts"):
        to_row(ROWS[:5], METADATA)


def test_a_job_that_renders_otherwise_when_it_goes_on_says_so(
    tmp_path: Path, tokenizer_folder: Path, server: StubServer, caplog: pytest.LogCaptureFixture
) -> None:
    clock = tmp_path / "clock"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{{ strftime_now('%f') }}: {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(clock)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "q"}])
    output = tmp_path / "r.parquet"
    for folder, says_it in ((tokenizer_folder, False), (clock, True)):
        asked = ["generate", data, "-o", output, "-n", 3, *at(server, folder), "--overwrite"]
        failing = len(server.requests) + 1
        server.script = lambda seen, failing=failing: (
            Status(400) if len(server.requests) == failing else None
        )
        succeed(*asked)
        assert sum(row["error"] is not None for row in rows_by_pair(output).values()) == 1
        caplog.clear()
        succeed(*asked, "--retry-failed")
        prompts = [tuple(row["prompt_ids"]) for row in rows_by_pair(output).values()]
        assert len(set(prompts)) == (2 if says_it else 1)
        assert ("render to another prompt" in caplog.text) == says_it
