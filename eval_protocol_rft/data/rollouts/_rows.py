"""Rows of a rollout file to Arrow and back.

Invariant: a row that came through Arrow equals the one that went in, value by value; logprobs are
float32 there and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.data.rollouts._completion_row import ChatMessages as ChatMessages
from eval_protocol_rft.data.rollouts._completion_row import CompletionRow as CompletionRow
from eval_protocol_rft.data.rollouts._completion_row import by_prompt as by_prompt
from eval_protocol_rft.data.rollouts._completion_row import by_record as by_record
from eval_protocol_rft.data.rollouts._episodes import (
    arrays_of,
    episode_arrays,
    episodes_in,
    list_array,
    put_stored,
    without_nulls,
)
from eval_protocol_rft.data.rollouts._format import (
    ARRAY_COLUMNS,
    EPISODE_COLUMNS,
    MESSAGES,
    ORIGINAL_PREFIX,
    FileMetadata,
    FormatError,
    json_kind,
    metadata_of,
    reward_columns,
)
from eval_protocol_rft.record import UNSCORED as UNSCORED
from eval_protocol_rft.record import Score as Score

_PLAIN = (
    "row_id", "data_idx", "sample_idx", "response", "finish_reason", "truncated", "temperature",
    "top_p", "top_k", "max_tokens", "seed", "policy_version", "first_policy_version", "attempts",
    "seconds", "began_at", "request_id", "error", "error_kind", "error_status", "evaluation_row",
)  # fmt: skip
"""Fields that are columns as they are."""


def to_record_batch(rows: Sequence[CompletionRow], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as one Arrow batch of `schema`, which `format.schema` made.

    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError: a value does not fit its column.
    """
    metadata = metadata_of(schema)
    json_columns = frozenset(metadata.json_columns)
    has_episodes = "turns" in schema.names
    columns: dict[str, pa.Array] = episode_arrays(rows) if has_episodes else {}
    for field in schema:
        name, kind = field.name, field.type
        if name in _PLAIN:
            columns[name] = pa.array([getattr(row, name) for row in rows], kind)
        elif name in ARRAY_COLUMNS:
            columns[name] = list_array([getattr(row, name) for row in rows], kind)
        elif name == "prompt":
            columns[name] = pa.array([row.prompt for row in rows], kind)
        elif name in ("tools", "message"):
            columns[name] = _json_array([getattr(row, name) for row in rows])
        elif name == "ground_truth":
            truths = [row.ground_truth for row in rows]
            columns[name] = _json_array(truths) if name in json_columns else pa.array(truths, kind)
        elif name.startswith(ORIGINAL_PREFIX):
            key = name.removeprefix(ORIGINAL_PREFIX)
            values = [row.original.get(key) for row in rows]
            columns[name] = _json_array(values) if name in json_columns else pa.array(values, kind)
    for reward in ("reward", *metadata.rewards):
        scores = [row.scores.get(reward, UNSCORED) for row in rows]
        number, reason, metrics, error = reward_columns(reward)
        columns[number] = pa.array([score.reward for score in scores], pa.float64())
        columns[reason] = pa.array([score.reason for score in scores], pa.string())
        columns[metrics] = _json_array([score.metrics for score in scores])
        columns[error] = pa.array([score.error for score in scores], pa.string())
    return pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)


def from_record_batch(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata, *, where: str = "a rollout file"
) -> list[CompletionRow]:
    """The rows of a batch. Columns that the format does not know are left out.

    Raises:
        FormatError: token data lacks a number, or a column of JSON text holds none; the message
            begins with `where`.
    """
    try:
        return _from_record_batch(batch, metadata)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


def _from_record_batch(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata
) -> list[CompletionRow]:
    names = frozenset(batch.schema.names)
    size = batch.num_rows
    fields: dict[str, list[Any]] = {
        name: batch.column(name).to_pylist() for name in _PLAIN if name in names
    }
    fields["prompt"] = _prompts(batch.column("prompt"))
    for name in ARRAY_COLUMNS:
        fields[name] = arrays_of(batch.column(name)) if name in names else [None] * size
    json_columns = frozenset(metadata.json_columns)
    for name in ("tools", "message"):
        fields[name] = _from_json(batch, name) if name in names else [None] * size
    if "ground_truth" in names:
        fields["ground_truth"] = _values(batch, "ground_truth", json_columns)
    fields["scores"] = _scores(batch, metadata, names)
    keys = [name for name in batch.schema.names if name.startswith(ORIGINAL_PREFIX)]
    originals = [_values(batch, name, json_columns) for name in keys]
    stripped = [key.removeprefix(ORIGINAL_PREFIX) for key in keys]
    fields["original"] = (
        [dict(zip(stripped, values, strict=True)) for values in zip(*originals, strict=True)]
        if keys
        else [{} for _ in range(size)]
    )
    if not names.isdisjoint(EPISODE_COLUMNS):
        fields |= episodes_in(batch)
    order = list(fields)
    rows = [
        CompletionRow(**dict(zip(order, values, strict=True)))
        for values in zip(*fields.values(), strict=True)
    ]
    put_stored(rows)
    return rows


def _prompts(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if column.type != MESSAGES:
        return list(column.to_pylist())
    return [
        None if messages is None else without_nulls(messages) for messages in column.to_pylist()
    ]


def _scores(
    batch: pa.RecordBatch | pa.Table, metadata: FileMetadata, names: frozenset[str]
) -> list[dict[str, Score]]:
    scores: list[dict[str, Score]] = [{} for _ in range(batch.num_rows)]
    for reward in {"reward": None, **dict.fromkeys(metadata.rewards)}:
        number, reason, metrics, error = reward_columns(reward)
        if number not in names:
            continue
        parts = (
            batch.column(number).to_pylist(),
            batch.column(reason).to_pylist(),
            _from_json(batch, metrics),
            batch.column(error).to_pylist(),
        )
        for own, (value, why, further, problem) in zip(
            scores, zip(*parts, strict=True), strict=True
        ):
            if not value is why is further is problem is None:
                own[reward] = Score(reward=value, reason=why, metrics=further, error=problem)
    return scores


def _values(batch: pa.RecordBatch | pa.Table, name: str, json_columns: frozenset[str]) -> list[Any]:
    return _from_json(batch, name) if name in json_columns else list(batch.column(name).to_pylist())


def _json_array(values: Sequence[Any]) -> pa.Array:
    texts = [None if value is None else msgspec.json.encode(value).decode() for value in values]
    return pa.array(texts, pa.string())


def _from_json(batch: pa.RecordBatch | pa.Table, name: str) -> list[Any]:
    values: list[Any] = []
    kind = json_kind(name) or object
    for text in batch.column(name).to_pylist():
        try:
            value = None if text is None else msgspec.json.decode(text)
            if not isinstance(value, kind | None):
                raise msgspec.DecodeError(f"not a JSON {'list' if kind is list else 'object'}")
            values.append(value)
        except (msgspec.DecodeError, RecursionError) as error:
            place = (
                f"completion {batch.column('sample_idx')[len(values)]}"
                if ("sample_idx" in batch.schema.names)
                else "a completion"
            )
            row = batch.column("row_id")[len(values)]
            raise FormatError(
                f"{place} of row {row}: {name} is no JSON that can be read: {error}"
            ) from error
    return values
