"""What goes into a rollout file comes out of it, whatever it is, in both formats."""

from __future__ import annotations

import datetime as dt
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_file, write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, FormatError, schema
from eval_protocol_rft.data._jsonl import metadata_path
from eval_protocol_rft.data._row_groups import from_record_batch, to_record_batch
from tests.data.servers import refused
from tests.data.strategies import RolloutFile, exactly, rollout_files

PATIENTLY = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
FORMATS = pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])


@PATIENTLY
@given(file=rollout_files())
def test_rows_come_back_from_arrow_as_they_went_in(file: RolloutFile):
    batch = to_record_batch(file.rows, file.schema)
    batch.validate(full=True)
    assert exactly(from_record_batch(batch, file.metadata)) == exactly(file.rows)


@FORMATS
@PATIENTLY
@given(file=rollout_files())
def test_rows_come_back_from_a_file_as_they_went_in(
    suffix: str, file: RolloutFile, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("x") / f"rollouts{suffix}"
    assert write_rows(path, file.schema, file.rows) == len(file.rows)
    dataset = RolloutDataset(path)
    assert dataset.schema.equals(file.schema)
    assert dataset.metadata == file.metadata
    assert len(dataset) == len(file.rows)
    assert exactly(list(dataset)) == exactly(file.rows)


@PATIENTLY
@given(file=rollout_files())
def test_the_two_formats_hold_the_same(file: RolloutFile, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("x")
    first, lines, second = (folder / name for name in ("a.parquet", "a.jsonl", "b.parquet"))
    write_rows(first, file.schema, file.rows)
    write_file(lines, file.schema, RolloutDataset(first).tables())
    write_file(second, file.schema, RolloutDataset(lines).tables())
    assert second.read_bytes() == first.read_bytes()


@PATIENTLY
@given(file=rollout_files())
def test_slices_of_a_batch_hold_their_own_rows(file: RolloutFile):
    batch = to_record_batch(file.rows, file.schema)
    for start in range(len(file.rows)):
        found = from_record_batch(batch.slice(start, 2), file.metadata)
        assert exactly(found) == exactly(file.rows[start : start + 2])


@FORMATS
def test_every_float32_bit_of_a_logprob_is_kept(suffix: str, tmp_path: Path):
    bits = np.random.default_rng(0).integers(0x80000000, 0xFF800000, 50_000, dtype=np.uint32)
    values = np.append(bits.view(np.float32), np.float32([-0.0, -1e-45, -3.4028235e38]))
    row = simple_row(completion_ids=np.arange(len(values), dtype=np.int32), logprobs=values)
    write_rows(tmp_path / f"a{suffix}", SCHEMA, [row])
    [back] = RolloutDataset(tmp_path / f"a{suffix}")
    assert back.logprobs.view(np.uint32).tolist() == values.view(np.uint32).tolist()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # Zones were off by seconds before there was a standard.
        (pa.timestamp("us", "Europe/Berlin"), [dt.datetime(1891, 1, 1, tzinfo=dt.UTC), None]),
        (pa.timestamp("ns"), [dt.datetime(2000, 1, 1, 0, 0, 0, 7)]),  # noqa: DTZ001
        (pa.list_(pa.struct([("a", pa.null())])), [[{"a": None}], [None, {"a": None}]]),
        (pa.struct([("a", pa.date32())]), [None, {"a": dt.date(1, 1, 1)}]),
        (pa.map_(pa.string(), pa.decimal128(5, 2)), [[("a", Decimal("1.50")), ("b", None)], []]),
        (pa.list_(pa.float64()), [[math.inf, -math.inf, 0.5, None], None]),
    ],
)
def test_types_that_json_lacks_keep_their_values_in_lines(
    kind: pa.DataType, values: list[Any], tmp_path: Path
):
    made = schema(FileMetadata(), {"x": kind})
    rows = [simple_row(original={"x": value}, error="none") for value in values]
    for i, row in enumerate(rows):
        row.sample_idx = i
    write_rows(tmp_path / "a.jsonl", made, rows)
    assert exactly(list(RolloutDataset(tmp_path / "a.jsonl"))) == exactly(rows)


def test_a_line_is_plain_json_that_anyone_can_read(tmp_path: Path):
    types = {"level": pa.int64(), "facts": pa.string(), "when": pa.date32()}
    metadata = FileMetadata(json_columns=["original_facts"])
    row = simple_row(
        response="zwölf\n",
        completion_ids=np.array([3, 4], np.int32),
        logprobs=np.array([-0.5, -0.25], np.float32),
        original={"level": 5, "facts": {"a": [1, 2**70]}, "when": None},
    )
    write_rows(tmp_path / "a.jsonl", schema(metadata, types), [row])
    line = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert line["response"] == "zwölf\n"
    assert line["completion_ids"] == [3, 4]
    assert line["logprobs"] == [-0.5, -0.25]
    assert line["original_facts"] == {"a": [1, 2**70]}
    assert line["original_level"] == 5
    assert line["reward"] is None


def test_token_data_of_another_width_is_refused():
    row = simple_row(completion_ids=np.arange(3), logprobs=np.zeros(3, np.float32))
    with pytest.raises(pa.ArrowTypeError, match="int64, not int32"):
        to_record_batch([row], SCHEMA)


def test_a_null_among_token_ids_is_an_error_and_not_a_number():
    batch = to_record_batch([simple_row()], SCHEMA)
    damaged = pa.array([[1, None, 3]], pa.list_(pa.int32()))
    at = batch.schema.get_field_index("completion_ids")
    with pytest.raises(FormatError, match="null among its numbers"):
        from_record_batch(batch.set_column(at, batch.schema.field(at), damaged), FileMetadata())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"data_idx": 0', "a.jsonl:2: .*truncated"),
        ('{"row_id": "\\ud800"}', "a.jsonl:2: "),
        ('{"data_idx": "x"}', "a.jsonl:1-2: column 'data_idx'"),
        (
            '{"row_id": "r", "data_idx": 0, "sample_idx": 1, "logprobs": [0.5, "NaX"]}',
            "a.jsonl:1-2: column 'logprobs'",
        ),
        ("[1]", "a.jsonl:2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, complaint: str):
    path = tmp_path / "a.jsonl"
    write_rows(path, SCHEMA, [simple_row()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(FormatError, match=complaint):
        list(RolloutDataset(path))


def test_lines_without_the_file_beside_them_are_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_rows(path, SCHEMA, [simple_row()])
    metadata_path(path).unlink()
    with pytest.raises(FormatError, match=r"a\.jsonl\.metadata\.json is not beside it"):
        RolloutDataset(path)


def test_half_a_parquet_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_rows(path, SCHEMA, [simple_row()])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="not a whole Parquet file"):
        RolloutDataset(path)


SCHEMA = schema(FileMetadata(), {})


def simple_row(**values: object) -> CompletionRow:
    return CompletionRow(row_id="r", data_idx=0, sample_idx=0, prompt="p", **values)


BROKEN = {
    "no JSON": ({"metrics": "{broken"}, "completion 0 of row r0: metrics is no JSON"),
    "deep JSON": (
        {"metrics": '{"a":' * 5000 + "1" + "}" * 5000},
        "completion 0 of row r0: metrics is no JSON",
    ),
    "broken tools": ({"tools": "[1,"}, "completion 0 of row r0: tools is no JSON"),
    "no row id": ({"row_id": None}, "row 0: row_id is null"),
    "no prompt": ({"prompt": None}, "row 0: prompt is null"),
    "nothing": (
        {"completion_ids": None, "logprobs": None, "response": None},
        "row 0: neither a completion nor an error",
    ),
}


@pytest.mark.parametrize(("values", "message"), BROKEN.values(), ids=BROKEN)
def test_a_value_that_cannot_be_is_named_with_file_and_row(
    values: dict[str, Any], message: str, tmp_path: Path
):
    path = tmp_path / "rollouts.parquet"
    wanted = schema(FileMetadata(), {})
    row = CompletionRow(
        row_id="r0",
        data_idx=0,
        sample_idx=0,
        prompt="q",
        response="a",
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.array([2], np.int32),
        logprobs=np.array([-1.0], np.float32),
    )
    table = pa.Table.from_batches([to_record_batch([row], wanted)])
    changed = [{**values_of_row, **values} for values_of_row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(changed, schema=table.schema), path)
    with pytest.raises(FormatError, match=rf"^{path}: {message}"):
        list(RolloutDataset(path).rows())
    for command in (["show"], ["report", "-o", tmp_path / "o.html"]):
        [name, *options] = command
        assert message in refused(name, path, *options)


def test_a_table_without_the_columns_of_a_rollout_file_is_refused(tmp_path: Path):
    metadata = {b"eval_protocol_rft": FileMetadata().encode()}
    table = pa.table({"row_id": ["a"]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        FormatError, match=r"x\.parquet: no rollout file: it has no column 'data_idx'"
    ):
        RolloutDataset(tmp_path / "x.parquet")
