"""Parquet files, folders of them and saved data sets: the file's own types, and nothing guessed."""

from __future__ import annotations

import datetime
import decimal
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError

NOW = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)  # noqa: DTZ001 - a column without time zone
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
TEXTS = pa.array(["x", None, "x"])


def parquet(folder: Path, columns: dict[str, Any], name: str = "data.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


@pytest.mark.parametrize(
    "array",
    [
        pa.array([MESSAGES, None, []]),
        pa.array([{"a": 1, "b": [True]}, None]),
        pa.array([b"\x00\xff", None]),
        pa.array([1, None, 255], pa.uint8()),
        pa.array([0.5, None], pa.float32()),
        pa.array([NOW, None], pa.timestamp("us")),
        pa.array([NOW.date(), None]),
        pa.array([decimal.Decimal("1.20"), None]),
        pa.array(["x", None], pa.large_string()),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.array([None, None], pa.null()),
    ],
    ids=lambda array: str(array.type)[:20],
)
def test_a_column_keeps_its_type_and_its_values(array: pa.Array, tmp_path: Path):
    source = open_source(parquet(tmp_path, {"x": array}))
    (column,) = source.columns
    values = [row.values["x"] for row in source.rows()]
    assert (column.type, column.is_json) == (array.type, False)
    assert values == array.to_pylist()
    assert pa.array(values, column.type).equals(array)
    shuffled = {row.data_idx: row.values["x"] for row in source.rows(shuffle_seed=0)}
    assert [shuffled[i] for i in range(len(array))] == values


@pytest.mark.parametrize(
    ("array", "plain", "values"),
    [
        (TEXTS.dictionary_encode(), pa.string(), ["x", None, "x"]),
        (pa.array(["x", None], pa.string_view()), pa.string(), ["x", None]),
        (pa.array([b"x", None], pa.binary_view()), pa.binary(), [b"x", None]),
        (
            pa.array([["x"], None], pa.list_(pa.string_view())),
            pa.list_(pa.string()),
            [["x"], None],
        ),
        (
            pa.array([{"a": "x"}, None], pa.struct([("a", pa.string_view())])),
            pa.struct([("a", pa.string())]),
            [{"a": "x"}, None],
        ),
        (
            pa.array([[("k", "v")], None], pa.map_(pa.string_view(), pa.string_view())),
            pa.map_(pa.string(), pa.string()),
            [[("k", "v")], None],
        ),
        (
            pa.StructArray.from_arrays([TEXTS.dictionary_encode()], ["inner"]),
            pa.struct([("inner", pa.string())]),
            [{"inner": "x"}, {"inner": None}, {"inner": "x"}],
        ),
        (pa.array([b"0" * 16], pa.uuid()), pa.binary(16), [b"0" * 16]),
    ],
    ids=lambda value: str(value.type)[:24] if isinstance(value, pa.Array) else "",
)
def test_an_encoded_column_is_read_as_what_it_encodes(
    array: pa.Array, plain: pa.DataType, values: list[Any], tmp_path: Path
):
    source = open_source(parquet(tmp_path, {"x": array}))
    assert source.columns[0].type == plain
    assert [row.values["x"] for row in source.rows()] == values
    assert len(list(source.rows(shuffle_seed=1))) == len(values)


def test_a_type_that_python_would_round_is_refused(tmp_path: Path):
    path = parquet(tmp_path, {"id": [1], "at": pa.array([123456789]).cast(pa.time64("ns"))})
    with pytest.raises(SourceError, match=r"^data.parquet: column 'at' is time64\[ns\].*cast it"):
        open_source(path)


def test_a_value_that_python_cannot_hold_is_named_by_its_row(tmp_path: Path):
    seconds = [0] * 700
    seconds[601] = 2**50
    path = parquet(tmp_path, {"at": pa.array(seconds).cast(pa.timestamp("s"))})
    source = open_source(path)
    with pytest.raises(SourceError, match=r"^data.parquet, row 601: a value that Python"):
        list(source.rows())
    with pytest.raises(SourceError, match=r"^data.parquet, row 601: a value that Python"):
        list(source.rows(shuffle_seed=5))


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(SourceError, match=r"^data.parquet: more than one column is called 'a'"):
        open_source(tmp_path / "data.parquet")


def test_a_file_that_is_no_parquet_is_refused_on_opening(tmp_path: Path):
    (tmp_path / "data.parquet").write_text("not at all")
    with pytest.raises(SourceError, match=r"^data.parquet cannot be read as Parquet"):
        open_source(tmp_path / "data.parquet")


def test_damage_inside_a_parquet_file_is_an_error_while_reading(tmp_path: Path):
    rows = {"a": [os.urandom(200) for _ in range(2000)]}
    path = parquet(tmp_path, rows)
    content = bytearray(path.read_bytes())
    content[10:200_000] = bytes(199_990)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"^data.parquet: cannot be read after row \d+"):
        list(open_source(path).rows())


def test_a_shuffle_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = parquet(tmp_path, {"a": list(range(2000))})
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    rows = open_source(path).rows(shuffle_seed=1)
    next(rows)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_files_of_a_folder_are_read_by_name(tmp_path: Path):
    for name, value in (("b.parquet", 2), ("a.parquet", 1), ("c.parquet", 3)):
        parquet(tmp_path, {"x": [value]}, name)
    (tmp_path / "README.md").write_text("about")
    source = open_source(tmp_path)
    assert [row.values["x"] for row in source.rows()] == [1, 2, 3]
    assert [row.where.split("/")[1] for row in source.rows()] == [
        "a.parquet, row 0",
        "b.parquet, row 0",
        "c.parquet, row 0",
    ]


def test_a_file_without_rows_shifts_no_places(tmp_path: Path):
    for name, values in (("a", []), ("b", [1]), ("c", []), ("d", [2, 3])):
        parquet(tmp_path, {"x": pa.array(values, pa.int64())}, f"{name}.parquet")
    places = {row.values["x"]: row.where.split("/")[1] for row in open_source(tmp_path).rows()}
    assert places == {
        1: "b.parquet, row 0",
        2: "d.parquet, row 0",
        3: "d.parquet, row 1",
    }


def test_files_of_a_folder_may_encode_a_column_differently(tmp_path: Path):
    parquet(tmp_path, {"x": TEXTS}, "a.parquet")
    parquet(tmp_path, {"x": TEXTS.dictionary_encode()}, "b.parquet")
    assert [row.values["x"] for row in open_source(tmp_path).rows()] == ["x", None, "x"] * 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": ["1"]}, "b.parquet: column 'x' is string, but int64 in .*a.parquet"),
        ({"y": [1]}, "b.parquet has the columns y, but .*a.parquet has x"),
    ],
)
def test_files_of_a_folder_that_do_not_fit_together_are_refused(
    other: dict[str, Any], message: str, tmp_path: Path
):
    parquet(tmp_path, {"x": [1]}, "a.parquet")
    parquet(tmp_path, other, "b.parquet")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_a_folder_that_could_be_meant_in_two_ways_is_refused(tmp_path: Path):
    (tmp_path / "more").mkdir()
    parquet(tmp_path / "more", {"x": [1]}, "b.parquet")
    with pytest.raises(SourceError, match=r"neither data files in it .* there are some in .*more"):
        open_source(tmp_path)
    parquet(tmp_path, {"x": [1]}, "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet.*more.b\.parquet.*name the folder"):
        open_source(tmp_path)


def test_a_saved_data_set_of_splits_asks_for_one(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"messages": [MESSAGES]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "all")
    with pytest.raises(SourceError, match=r"splits: train, test\. Name .*all.train"):
        open_source(tmp_path / "all")
    source = open_source(tmp_path / "all" / "test")
    assert (source.name, [row.values for row in source.rows()]) == (
        "test",
        [{"messages": MESSAGES}],
    )


def test_a_saved_selection_has_its_own_rows_in_its_own_order(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"x": list(range(10))})
    whole.select([7, 2, 5]).save_to_disk(tmp_path / "some")
    assert [row.values["x"] for row in open_source(tmp_path / "some").rows()] == [7, 2, 5]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "lists gone.arrow, which is not there"),
        ('{"_data_files": []}', "lists no data files"),
        ("{}", "missing required field `_data_files`"),
        (
            '{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}',
            "load it and save it again",
        ),
    ],
)
def test_a_saved_data_set_with_an_odd_state_is_refused(state: str, message: str, tmp_path: Path):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_a_cut_off_arrow_file_is_refused_on_opening(tmp_path: Path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    table = pa.table({"x": ["long" * 100] * 1000})
    with pa.ipc.new_stream(tmp_path / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "data.arrow").read_bytes()
    (tmp_path / "data.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"data\.arrow cannot be read as an Arrow stream"):
        open_source(tmp_path)
