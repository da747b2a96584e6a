"""Types that Arrow stores and cannot sort are cast, in data sets and in rollout files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data.rollouts._format import METADATA_KEY
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
