"""Rollout files are plain files: what people read data with reads them, values unchanged."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, schema
from eval_protocol_rft.record import Score

SCHEMA = schema(
    FileMetadata(prompt_kind="messages", json_columns=["ground_truth"]),
    {"level": pa.int64(), "tags": pa.list_(pa.string()), "at": pa.timestamp("us", "UTC")},
)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def rows() -> list[CompletionRow]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(6):
        known: dict[str, Any] = {
            "row_id": f"zeile-{i} ü",
            "data_idx": i,
            "sample_idx": 1,
            "prompt": [
                {"role": "user", "content": "Wie?\n\u2028"},
                {"role": "assistant", "tool_calls": [CALL]},
            ],
            "prompt_ids": rng.integers(0, 2**31, 4).astype(np.int32),
            "original": {
                "level": 2**62 + i,
                "tags": ["a", None] if i % 2 else [],
                "at": datetime.datetime(2026, 1, 1, 12, 0, i, 7, tzinfo=datetime.UTC),
            },
            "ground_truth": {"answer": i},
        }
        if i == 3:
            found.append(CompletionRow(**known, error="no answer", error_status=503))
            continue
        found.append(
            CompletionRow(
                **known,
                response="😀 = 4",
                completion_ids=rng.integers(0, 150_000, 5 * i).astype(np.int32),
                logprobs=-rng.exponential(size=5 * i).astype(np.float32),
                truncated=bool(i % 2),
                scores={"reward": Score(reward=i / 3, metrics={"a": 1})} if i else {},
            )
        )
    return found


def pandas_rows(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    if path.suffix == ".parquet":
        frame = pd.read_parquet(path, dtype_backend="pyarrow")
    else:
        frame = pd.read_json(
            path, lines=True, dtype_backend="pyarrow", dtype=False, precise_float=True
        )
    return pa.Table.from_pandas(frame, preserve_index=False).to_pylist()


def polars_rows(path: Path) -> list[dict[str, Any]]:
    import polars as pl

    read = pl.read_parquet if path.suffix == ".parquet" else pl.read_ndjson
    return read(path).to_dicts()


def duckdb_rows(path: Path) -> list[dict[str, Any]]:
    import duckdb

    return duckdb.sql(f"SELECT * FROM '{path}'").to_arrow_table().to_pylist()  # noqa: S608


def datasets_rows(path: Path) -> list[dict[str, Any]]:
    import datasets

    kind = "parquet" if path.suffix == ".parquet" else "json"
    cache = str(path.parent / "cache")
    found = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
    return found.to_list()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("read", [pandas_rows, polars_rows, duckdb_rows, datasets_rows])
def test_everyone_reads_the_same_values(
    read: Callable[[Path], list[dict[str, Any]]], suffix: str, tmp_path: Path
):
    path = tmp_path / f"rollouts{suffix}"
    expected = rows()
    write_rows(path, SCHEMA, expected)
    found = read(path)
    assert len(found) == len(expected)
    for values, row in zip(found, expected, strict=True):
        assert values["row_id"] == row.row_id
        assert (values["data_idx"], values["sample_idx"]) == (row.data_idx, row.sample_idx)
        assert [message["role"] for message in values["prompt"]] == ["user", "assistant"]
        assert values["prompt"][0]["content"] == "Wie?\n\u2028"
        [call] = values["prompt"][1]["tool_calls"]
        assert call["function"]["arguments"] == '{"x": 1}'
        assert list(values["prompt_ids"]) == row.prompt_ids.tolist()
        for name in ("completion_ids", "logprobs", "raw_logprobs"):
            array = getattr(row, name)
            assert as_list(values[name]) == (None if array is None else array.tolist())
        assert values["reward"] == row.reward
        assert values["response"] == row.response
        assert values["truncated"] == row.truncated
        assert values["error"] == row.error
        assert values["error_status"] == row.error_status
        assert values["original_level"] == row.original["level"]
        assert list(values["original_tags"]) == row.original["tags"]
        assert moment(values["original_at"]) == row.original["at"]


def as_list(values: Any) -> list[Any] | None:
    return None if values is None else list(values)


def moment(value: Any) -> datetime.datetime:
    """A time with a zone; some readers give the text, or leave the zone to us."""
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    return value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
