"""`CompletionRow`: one row of a rollout file as an object, and rows to Arrow and back.

Invariant: a row that came through Arrow equals the one that went in, value by value; logprobs are
float32 there and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.data.rollouts._format import (
    ARRAY_COLUMNS,
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

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
ChatMessages = list[dict[str, Any]]


class CompletionRow(msgspec.Struct, kw_only=True, eq=False):
    """One completion that was asked for; docs/format.md says what each field means."""

    row_id: str
    data_idx: int
    sample_idx: int
    prompt: str | ChatMessages
    tools: list[dict[str, Any]] | None = None
    ground_truth: Any = None
    response: str | None = None
    message: dict[str, Any] | None = None
    """The assistant's, where it is not what `response` alone says; see `completion_messages`."""
    prompt_ids: Ids | None = None
    completion_ids: Ids | None = None
    logprobs: Logprobs | None = None
    raw_logprobs: Logprobs | None = None
    finish_reason: str | None = None
    truncated: bool | None = None
    past_end: Ids | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    policy_version: str | None = None
    first_policy_version: str | None = None
    attempts: int | None = None
    seconds: float | None = None
    began_at: float | None = None
    request_id: str | None = None
    error: str | None = None
    """Why there is no completion; None where there is one."""
    error_kind: str | None = None
    error_status: int | None = None
    evaluation_row: str | None = None
    scores: dict[str, Score] = {}
    """Reward column -> what it holds here; `reward` is the main one."""
    original: dict[str, Any] = {}
    """Columns of the data set."""

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def reward(self) -> float | None:
        """The main reward."""
        return self.scores.get("reward", UNSCORED).reward

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return 0 if self.completion_ids is None else len(self.completion_ids)


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
    columns: dict[str, pa.Array] = {}
    for field in schema:
        name, kind = field.name, field.type
        if name in _PLAIN:
            columns[name] = pa.array([getattr(row, name) for row in rows], kind)
        elif name in ARRAY_COLUMNS:
            columns[name] = _list_array([getattr(row, name) for row in rows], kind)
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
        fields[name] = _arrays(batch.column(name)) if name in names else [None] * size
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
    order = list(fields)
    return [
        CompletionRow(**dict(zip(order, values, strict=True)))
        for values in zip(*fields.values(), strict=True)
    ]


def by_prompt(group: Sequence[CompletionRow]) -> list[list[CompletionRow]]:
    """The completions of a data row, apart by the prompt ids that they were sampled behind; in one
    list where these are the same, which they are unless a chat template that says the date rendered
    the row again when its job went on. A failure stands with the completions of its prompt, or with
    the first ones.
    """
    parts: dict[bytes | None, list[CompletionRow]] = {}
    for row in group:
        if not row.failed:
            parts.setdefault(_prompt_key(row), [])
    if len(parts) < 2:
        return [list(group)]
    first = next(iter(parts.values()))
    for row in group:
        parts.get(_prompt_key(row), first).append(row)
    return list(parts.values())


def _prompt_key(row: CompletionRow) -> bytes | None:
    return None if row.prompt_ids is None else row.prompt_ids.tobytes()


def _list_array(arrays: Sequence[NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    """[N] arrays, or None, as one list column without a Python loop per token."""
    dtype = kind.value_type.to_pandas_dtype()
    sizes = [0 if array is None else len(array) for array in arrays]
    offsets = pa.array(np.cumsum([0, *sizes], dtype=np.int32))
    present = [array for array in arrays if array is not None and len(array)]
    values = np.concatenate(present) if present else np.empty(0, dtype)
    if values.dtype != dtype:
        raise pa.ArrowTypeError(f"token data is {values.dtype}, not {np.dtype(dtype)}")
    missing = pa.array([array is None for array in arrays], pa.bool_())
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=kind, mask=missing)


def _arrays(column: pa.Array | pa.ChunkedArray) -> list[NDArray[Any] | None]:
    """The lists of a column as views into one array per chunk."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    found: list[NDArray[Any] | None] = []
    for chunk in chunks:
        if chunk.values.null_count:
            raise FormatError("token data has a null among its numbers: a row was damaged")
        values = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy().tolist()
        valid = chunk.is_valid().to_pylist()
        found += [
            values[start:stop] if ok else None
            for start, stop, ok in zip(offsets, offsets[1:], valid, strict=False)
        ]
    return found


def _prompts(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if column.type != MESSAGES:
        return list(column.to_pylist())
    return [
        None if messages is None else _without_nulls(messages) for messages in column.to_pylist()
    ]


def _without_nulls(value: Any) -> Any:
    """Messages without the fields that they do not have, also in their tool calls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


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
