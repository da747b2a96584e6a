"""CSV: text as it stands in the file, records over several lines, errors with their line."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError

FIELDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text('",\n\r x')


@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8), mark=st.booleans())
def test_what_python_writes_comes_back(
    rows: list[tuple[str, str]], mark: bool, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("x") / "data.csv"
    encoding = "utf-8-sig" if mark else "utf-8"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    source = open_source(path)
    assert [(row.values["a"], row.values["b"]) for row in source.rows()] == rows
    shuffled = {row.data_idx: tuple(row.values.values()) for row in source.rows(shuffle_seed=1)}
    assert [shuffled[i] for i in range(len(rows))] == rows


def test_nothing_is_turned_into_a_number_or_a_null(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_text("id,score,note\n007,1e5,\nNone,NaN,null\n")
    source = open_source(path)
    assert [row.values for row in source.rows()] == [
        {"id": "007", "score": "1e5", "note": ""},
        {"id": "None", "score": "NaN", "note": "null"},
    ]
    assert all(column.type == pa.string() and not column.is_json for column in source.columns)


def test_a_record_is_named_by_its_first_line(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'prompt,n\r\n"two\r\nlines",1\r\n\r\nx,2\r\n"a\n\nb",3\r\ny,4')
    rows = list(open_source(path).rows())
    assert [row.where for row in rows] == ["data.csv:2", "data.csv:5", "data.csv:6", "data.csv:9"]
    assert [row.values["prompt"] for row in rows] == ["two\r\nlines", "x", "a\n\nb", "y"]


def test_a_prompt_may_be_longer_than_pythons_own_limit(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_text(f"prompt\n{'x' * 300_000}\n")
    (row,) = open_source(path).rows()
    assert len(row.values["prompt"]) == 300_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", "^data.csv:3: 3 fields where the header has 2"),
        (b"a,b\n1,2\n\n1\n", "^data.csv:4: 1 fields where the header has 2"),
        (b"a,a\n1,2\n", "^data.csv:1: more than one column is called 'a'"),
        (b"a\n1\n\xff\n", "^data.csv:3: not UTF-8"),
        (b'a\n1\n"x\n', "^data.csv:3: no CSV: unexpected end"),
        (b'a\n"x"y\n', "^data.csv:2: no CSV"),
        (b"a\nx\ry\n", "^data.csv:2: no CSV: new-line character"),
        (b"\n\n", "^data.csv: the file is empty"),
    ],
)
def test_a_broken_file_is_refused_on_opening(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(path)
