"""Rows from JSONL as Eval Protocol writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.data._convert_ep import read_rows
from eval_protocol_rft.training._batch import build_batch, iter_batches
from eval_protocol_rft.training._types import TrainingDataError
from tests.training_rows import contents_of, scored


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    rows = [scored(name, 1.0, 0.0) for name in "abc"]
    paths = write(tmp_path / "1.jsonl", *rows[:2]), write(tmp_path / "2.jsonl", rows[2])
    assert list(read_rows(*paths)) == rows
    assert len(build_batch(read_rows(*paths))) == 6


def test_what_eval_protocol_dumps_reads_back_as_the_same_group(tmp_path: Path) -> None:
    from eval_protocol_rft.training._prompt_groups import group_rows

    row = EvaluationRow.model_validate(scored("a", 1.0, 0.5))
    path = tmp_path / "rows.jsonl"
    path.write_text(row.model_dump_json() + "\n\n")
    (from_file,), (from_row,) = group_rows(read_rows(path)), group_rows([row])
    assert contents_of(from_file) == contents_of(from_row)
    assert from_file.key == from_row.key


def test_rows_are_read_as_they_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(scored(name, 1.0, 0.0) for name in "abc"))
    with path.open("a") as file:
        file.write("not reached\n")
    batches = iter_batches(read_rows(path), max_groups=1)
    assert next(batches).stats.groups_trained == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"half": ', "line 2: Input data was truncated"),
        ("[1, 2]", "line 2: Expected `object`"),
        ('{"score": NaN}', "line 2: JSON is malformed"),
        ('{"messages": []}', r"line 2: no row of Eval Protocol, .* \(but messages\)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", scored("a", 1.0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TrainingDataError, match=rf"rows\.jsonl, {message}"):
        list(read_rows(path))
