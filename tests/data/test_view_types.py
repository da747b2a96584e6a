"""Types that Arrow stores and cannot sort are cast, in data sets and in rollout files; columns that
whoever wrote a rollout file left out, or filled with something else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._format import FIXED_COLUMNS, METADATA_KEY
from tests.convert_rows import same
from tests.data import score_graders
from tests.data.rollout_files import write_rollouts
from tests.data.servers import at, refused, rows_by_pair, succeed


def test_a_data_set_with_views_is_sampled_and_stored(
    tmp_path: Path, server, tokenizer_folder: Path
) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"], pa.string_view()),
            "blob": pa.array([b"a", None], pa.binary_view()),
            "tags": pa.array([["x"], []], pa.list_(pa.string_view())),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    for name in ("r.parquet", "r.jsonl"):
        arguments = ["-o", tmp_path / name, "-n", 2, *at(server, tokenizer_folder)]
        succeed("generate", tmp_path / "data.parquet", *arguments)
        rows = rows_by_pair(tmp_path / name)
        assert rows[0, 1]["original_blob"] == b"a"
        assert [rows[i, 0]["original_tags"] for i in (0, 1)] == [["x"], []]


@pytest.mark.parametrize("kind", [pa.list_view(pa.string()), pa.large_list_view(pa.string())])
def test_lists_that_arrow_cannot_read_right_are_refused_before_anything_is_sampled(
    kind: pa.DataType, tmp_path: Path, server, tokenizer_folder: Path
) -> None:
    table = pa.table({"prompt": ["a"], "x": pa.array([["a"]], kind)})
    pq.write_table(table, tmp_path / "data.parquet")
    arguments = ["-o", tmp_path / "r.parquet", *at(server, tokenizer_folder)]
    message = refused("generate", tmp_path / "data.parquet", *arguments)
    assert "column 'x'" in message
    assert not server.requests


@pytest.mark.parametrize("wider", [True, False])
def test_a_rollout_file_that_others_wrote_anew_is_the_same_file(
    tmp_path: Path, wider: bool
) -> None:
    """As polars and DataFusion do: text as views or large text, integers of 64 bits."""
    source = write_rollouts(tmp_path / "r.parquet", [["a", "b"], [None, "c"]])
    before, table = list(RolloutDataset(source)), pq.read_table(source)
    text = pa.large_string() if wider else pa.string_view()
    ids = pa.large_list(pa.int64()) if wider else pa.list_(pa.int64())
    fields = []
    for field in table.schema:
        kind = text if field.type == pa.string() else field.type
        kind = ids if field.type == pa.list_(pa.int32()) else kind
        fields.append(pa.field(field.name, pa.int64() if kind == pa.int32() else kind))
    schema = pa.schema(fields).with_metadata({METADATA_KEY: table.schema.metadata[METADATA_KEY]})
    pq.write_table(table.cast(schema), source)
    assert pq.read_schema(source).types != table.schema.types
    assert all(map(same, RolloutDataset(source), before))
    succeed("score", source, "-e", f"{score_graders.__file__}::length")
    succeed("filter", source, "-o", tmp_path / "f.parquet", "--drop-failed")
    succeed("convert", tmp_path / "f.parquet", tmp_path / "f.jsonl")
    succeed("stats", tmp_path / "f.jsonl")
    assert [row.reward for row in RolloutDataset(tmp_path / "f.jsonl")] == [1.0, 1.0, 1.0]


NOT_NULL = ("row_id", "data_idx", "sample_idx", "prompt", "completion_ids", "truncated", "error")


@pytest.mark.parametrize("name", FIXED_COLUMNS)
def test_a_column_that_is_left_out_is_null_in_every_row_or_is_named(
    tmp_path: Path, name: str
) -> None:
    source = write_rollouts(tmp_path / "r.parquet", [["a", "b"], [None, "c"]])
    table = pq.read_table(source)
    if name in NOT_NULL:
        pq.write_table(table.drop_columns([name]), source)
        assert f"no column {name!r}" in refused("stats", source)
        return
    place = table.schema.get_field_index(name)
    nulls = pa.nulls(len(table), table.schema.field(name).type)
    pq.write_table(table.set_column(place, table.schema.field(name), nulls), source)
    as_nulls = list(RolloutDataset(source))
    pq.write_table(table.drop_columns([name]), source)
    assert all(map(same, RolloutDataset(source), as_nulls))
    succeed("stats", source)


def test_a_file_that_has_episodes_in_part_is_refused(tmp_path: Path) -> None:
    source = write_rollouts(tmp_path / "r.parquet", [["a", "b"]])
    table = pq.read_table(source)
    pq.write_table(table.append_column("turns", pa.nulls(len(table), pa.int32())), source)
    assert "no column 'segment_tokens'" in refused("stats", source)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tools", ["filter", "-o", "prompts.jsonl", "--prompts", "--min-tokens", 1]),
        ("ground_truth", ["convert", "verl.parquet", "--to", "verl"]),
        ("reward_reason", ["show"]),
        ("raw_logprobs", ["convert", "rows.jsonl", "--to", "ep"]),
        ("seed", ["sql", "select seed from completions"]),
        ("tools", ["filter", "-o", "some.parquet", "--where", "tools is null"]),
    ],
)
def test_commands_take_files_without_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_rollouts(tmp_path / "r.parquet", [["a", "b"], [None, "c"]])
    pq.write_table(pq.read_table(source).drop_columns([name]), source)
    what, *more = command
    succeed(what, source, *more)


@pytest.mark.parametrize("name", ["logprobs", "past_end", "truncated", "attempts", "message"])
def test_a_column_of_something_else_is_named(tmp_path: Path, name: str) -> None:
    kind = pa.struct([("a", pa.int8())])
    source = write_rollouts(tmp_path / "r.parquet", [["a", "b"]])
    table = pq.read_table(source)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.nulls(len(table), kind)), source)
    for command in (["stats", source], ["datums", source, "-o", tmp_path / "d.npz"]):
        assert f"r.parquet: column {name!r} is {kind}, and a rollout file" in refused(*command)
