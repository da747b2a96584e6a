"""JSONL and JSON: values as they are, types only where they are exact, errors with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["prompt", "a", "b", "", "odd name", "ü"]) | TEXT
ROW_LISTS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=6)


def kinds(value: Any) -> Any:
    """A value with the kinds of its numbers, since 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {name: kinds(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [kinds(inner) for inner in value]
    return (type(value), value)


def write(folder: Path, suffix: str, rows: list[dict[str, Any]], ascii_only: bool = False) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
        path.write_bytes("".join(lines).encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@given(rows=ROW_LISTS, ascii_only=st.booleans())
def test_any_objects_come_back_as_they_were(
    suffix: str,
    rows: list[dict[str, Any]],
    ascii_only: bool,
    tmp_path_factory: pytest.TempPathFactory,
):
    source = open_source(write(tmp_path_factory.mktemp("x"), suffix, rows, ascii_only))
    names = list(dict.fromkeys(name for row in rows for name in row))
    assert [column.name for column in source.columns] == names
    expected = [kinds({name: row.get(name) for name in names}) for row in rows]
    assert [kinds(row.values) for row in source.rows()] == expected
    shuffled = {row.data_idx: kinds(row.values) for row in source.rows(shuffle_seed=0)}
    assert [shuffled[i] for i in range(len(rows))] == expected


@given(rows=ROW_LISTS)
def test_the_type_of_a_column_stores_its_values_without_loss(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
):
    source = open_source(write(tmp_path_factory.mktemp("x"), ".jsonl", rows))
    found = [row.values for row in source.rows()]
    for column in source.columns:
        values = [values[column.name] for values in found]
        if column.is_json:
            assert column.type == pa.string()
            values = [None if value is None else json.dumps(value) for value in values]
        stored = pa.array(values, column.type).to_pylist()
        assert list(map(kinds, stored)) == list(map(kinds, values))


@pytest.mark.parametrize(
    ("values", "type_", "is_json"),
    [
        (["a", None, "b"], pa.string(), False),
        ([True, None], pa.bool_(), False),
        ([1, None, -(2**63), 2**63 - 1], pa.int64(), False),
        ([1.5, None, 2.0], pa.float64(), False),
        ([None, None], pa.string(), False),
        ([1, 2.0], pa.string(), True),
        ([1, 2**63], pa.string(), True),
        ([-(2**63) - 1], pa.string(), True),
        ([1, True], pa.string(), True),
        ([1, "1"], pa.string(), True),
        ([["a"], None], pa.string(), True),
        ([{"a": 1}], pa.string(), True),
        (["a", {"a": 1}], pa.string(), True),
    ],
)
def test_a_column_has_a_type_only_if_all_its_values_fit_it(
    values: list[Any], type_: pa.DataType, is_json: bool, tmp_path: Path
):
    source = open_source(write(tmp_path, ".jsonl", [{"x": value} for value in values]))
    (column,) = source.columns
    assert (column.name, column.type, column.is_json) == ("x", type_, is_json)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_missing_key_is_a_null_wherever_the_column_first_appears(suffix: str, tmp_path: Path):
    rows = [{"a": 1}, {"b": ["x"]}, {"c": None, "a": 2}]
    source = open_source(write(tmp_path, suffix, rows))
    assert [column.name for column in source.columns] == ["a", "b", "c"]
    assert [row.values for row in source.rows()] == [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": ["x"], "c": None},
        {"a": 2, "b": None, "c": None},
    ]


def test_blank_lines_hold_no_row_but_count(tmp_path: Path):
    path = tmp_path / "data.ndjson"
    path.write_bytes(b'\n{"a": 1}\n  \t\r\n\n{"a": 2}\r\n \n{"a": 3}')
    rows = list(open_source(path).rows())
    assert [(row.data_idx, row.values["a"], row.where) for row in rows] == [
        (0, 1, "data.ndjson:2"),
        (1, 2, "data.ndjson:5"),
        (2, 3, "data.ndjson:7"),
    ]


def test_other_line_ends_than_newline_stay_within_a_row(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"a": "x\u2028y\u0085z"}\n{"a": "\x7f"}\n'.encode())
    assert [row.values["a"] for row in open_source(path).rows()] == ["x\u2028y\u0085z", "\x7f"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("data.jsonl", b'{"a": 1}\n{"a": 2}\n'), ("data.json", b'[{"a": 1}, {"a": 2}]')],
)
def test_a_byte_order_mark_is_not_part_of_the_data(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    source = open_source(tmp_path / name)
    assert [row.values["a"] for row in source.rows()] == [1, 2]
    assert sorted(row.values["a"] for row in source.rows(shuffle_seed=2)) == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1', "not a JSON object: .*truncated"),
        (b"[1]", "not a JSON object: .*array"),
        (b'"text"', "not a JSON object: .*str"),
        (b"null", "not a JSON object: .*null"),
        (b'{"a": NaN}', "not a JSON object"),
        (b'{"a": 1e999}', "not a JSON object: Number out of range"),
        (b'{"a": "\\ud800"}', "not a JSON object"),
        (b'{"a": 1} {"a": 2}', "not a JSON object: .*trailing"),
        (b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}", "not a JSON object: .*recursion"),
        (b'\xef\xbb\xbf{"a": 1}', "not a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_named_on_opening(line: bytes, message: str, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(SourceError, match=rf"^data\.jsonl:3: {message}"):
        open_source(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": []}', r"^data.json is not an array of objects: .*call it \.jsonl"),
        (b'{"a": 1}\n{"a": 2}\n', r"^data.json is not an array of objects: .*call it \.jsonl"),
        (b'[{"a": 1}, 3]', r"^data.json, row 1: not a JSON object: .*int"),
        (b'[{"a": 1}, {"a": "\xff"}]', r"^data.json, row 1: not UTF-8"),
        (b'[{"a": 1}, {"a": ', r"^data.json: .*truncated"),
        (b'[{"a": 1},]', r"^data.json: .*byte"),
        (b'[{"a": 1}] x', r"^data.json: .*trailing"),
        (b"", r"^data.json: the file is empty"),
    ],
)
def test_a_json_file_of_something_else_is_refused(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(path)
