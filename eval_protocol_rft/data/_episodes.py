"""Episodes of several turns in a rollout file.

A single completion is all in `prompt_ids`, `completion_ids` and `logprobs`: one segment with one
sampled run. Of an episode these are the first turn, and the columns here hold the whole of it: its
segments, number by number, and how it went. A file of version 1 has both in `evaluation_row`.

Invariant: what comes out of the columns is what went in, logprobs as float32. Segments are views of
the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft import _segments
from eval_protocol_rft._segments import EpisodeRecord, RecordError, Segment, TokenBuffer
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data._format import CompletionRow, FormatError
from eval_protocol_rft.data.source._columns import without_nulls
from eval_protocol_rft.sampling import FinishReason

EPISODE_KEYS = ("trajectories", "episodes")
"""Keys of a record, lists per completion, that these columns are of."""
ARRAYS = dict(zip(("tokens", "logprobs", "loss_mask"), file_format.SEGMENT_COLUMNS, strict=True))
"""Array of a segment -> its column."""
_TOLD = [name for name in file_format.EPISODE_COLUMNS if name not in file_format.SEGMENT_COLUMNS]
_TEXTS = ("role", "content", "reasoning_content", "name", "tool_call_id")
_FIELDS = {"id", "type", "function"}
_QUOTED = tuple(f'"{key}"' for key in (*EPISODE_KEYS, "routing_matrices"))


def as_arrays(segments: Iterable[Segment]) -> list[dict[str, NDArray[Any]]]:
    """Segments as the columns hold them."""
    return [
        {
            "tokens": segment.tokens.astype(np.int32),
            "logprobs": segment.logprobs,
            "loss_mask": segment.loss_mask.astype(np.int8),
        }
        for segment in segments
    ]


def as_lists(segment: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A segment as plain JSON."""
    return {
        name: values.tolist() if isinstance(values, np.ndarray) else values
        for name, values in segment.items()
    }


def as_read(episode: EpisodeRecord) -> dict[str, Any]:
    """How an episode went, as it comes out of the columns."""
    whole = msgspec.structs.replace(episode, finish_reason=episode.last_finish_reason)
    return {**msgspec.to_builtins(whole), "metrics": whole.metrics or {}}


def episode_arrays(rows: Sequence[CompletionRow]) -> dict[str, pa.Array]:
    """The columns of episodes, by name."""
    columns: dict[str, pa.Array] = {}
    for name, column in ARRAYS.items():
        lists = [
            None if row.segments is None else [segment[name] for segment in row.segments]
            for row in rows
        ]
        columns[column] = _nested_array(lists, file_format.EPISODE_COLUMNS[column])
    records = [None if row.episode is None else read_episode(row) for row in rows]
    told: dict[str, list[Any]] = {name: [None] * len(rows) for name in _TOLD}
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        if record is None:
            continue
        metrics = msgspec.json.encode(record.metrics).decode() if record.metrics else None
        values = (
            record.turns,
            record.stop_reason,
            row.first_finish_reason,
            record.step_rewards,
            metrics,
            list(map(_placed, record.messages)),
            record.row_messages,
        )
        for name, value in zip(_TOLD, values, strict=True):
            told[name][i] = value
    return columns | {
        name: pa.array(told[name], file_format.EPISODE_COLUMNS[name]) for name in _TOLD
    }


def read_episode(row: CompletionRow) -> EpisodeRecord:
    """How the episode of a row went.

    Raises:
        FormatError: what the row says of it is none.
    """
    try:
        return msgspec.convert(row.episode, EpisodeRecord)
    except msgspec.ValidationError as error:
        raise FormatError(f"{_place(row)}: episode: {error}") from error


def checked_episode(row: CompletionRow) -> tuple[EpisodeRecord, list[Segment]]:
    """How an episode went, and its segments, if they are what a record may hold.

    Raises:
        RecordError: they are not; the message names the segment, and the row is the caller's to
            name.
    """
    try:
        record = msgspec.convert(row.episode, EpisodeRecord)
    except msgspec.ValidationError as error:
        raise RecordError(f"episode: {error}") from error
    held: Sequence[Any] = row.segments or ()
    first: FinishReason = "length" if row.first_finish_reason == "length" else "stop"
    if problem := _segments.episode_problem(record, len(held), first):
        raise RecordError(problem)
    segments = []
    for k, segment in enumerate(held):
        try:
            segments.append(_segments.read_segment(segment, TokenBuffer(0)))
        except RecordError as error:
            raise RecordError(f"segment {k}: {error}") from error
    [first_turn] = _segments.lay_out(
        row.prompt_ids, [row.completion_ids], [row.logprobs], TokenBuffer(0), ["first turn"]
    )
    if problem := _segments.beginning_problem(segments[0], first_turn):
        raise RecordError(f"segment 0: {problem}")
    return record, segments


def episodes_in(batch: pa.RecordBatch | pa.Table) -> dict[str, list[Any]]:
    """Field of `CompletionRow` -> [N] what the columns of N rows say; None where one is no episode.
    Segments are there where all of their columns are, and how an episode went where all the others
    are.

    Raises:
        FormatError: columns of a row contradict each other.
    """
    names = set(batch.schema.names)
    size = batch.num_rows
    segments = (
        _segments_in(batch) if names.issuperset(file_format.SEGMENT_COLUMNS) else [None] * size
    )
    if not names.issuperset(_TOLD):
        return {"segments": list(segments)}
    turns, stop_reasons, first_reasons, rewards, metrics, messages, row_messages = (
        batch.column(name).to_pylist() for name in _TOLD
    )
    last_reasons = (
        batch.column("finish_reason").to_pylist() if "finish_reason" in names else [None] * size
    )
    episodes: list[dict[str, Any] | None] = [None] * size
    for i, own in enumerate(segments):
        if turns[i] is None:
            if own is not None:
                raise FormatError(f"{_named(batch, i)}: it has segments and no turns")
            continue
        if own is None and names.issuperset(file_format.SEGMENT_COLUMNS):
            raise FormatError(f"{_named(batch, i)}: it has turns and no segments")
        if stop_reasons[i] is None or messages[i] is None:
            missing = "stop_reason" if stop_reasons[i] is None else "messages"
            raise FormatError(f"{_named(batch, i)}: it has turns and no {missing}")
        episodes[i] = {
            "turns": turns[i],
            "stop_reason": stop_reasons[i],
            "finish_reason": last_reasons[i],
            "step_rewards": rewards[i] or [],
            "metrics": _json(metrics[i], "episode_metrics", batch, i) if metrics[i] else {},
            "messages": [_message(message, batch, i) for message in messages[i]],
            "row_messages": row_messages[i],
            "prompt_ids": None,  # each row has its own
        }
    return {"segments": segments, "episode": episodes, "first_finish_reason": first_reasons}


def put_stored(rows: Iterable[CompletionRow]) -> None:
    """Give rows the episodes that `evaluation_row` holds: all of them in a file of version 1, later
    those of which the columns do not hold all, and the routing of segments.

    Raises:
        FormatError: it holds what is no episode; the message names row and completion.
    """
    last: str | None = None
    extra = _Extra()
    for row in rows:
        text = row.evaluation_row
        # A look at the text first: rows of single turns need not be decoded.
        if row.failed or text is None or not any(key in text for key in _QUOTED):
            continue
        if text is not last:
            extra, last = _decoded(row, text), text
        held = {key: (getattr(extra, key) or {}).get(str(row.sample_idx)) for key in EPISODE_KEYS}
        if row.episode is not None:
            row.episode = row.episode if held["episodes"] is None else held["episodes"]
        elif (extra.trajectories, extra.episodes) != (None, None):
            for key in EPISODE_KEYS:
                if held[key] is None:
                    raise FormatError(f"{_place(row)}: evaluation_row has no {key} of it")
            row.segments, row.episode = held["trajectories"], held["episodes"]
            reason = read_episode(row).last_finish_reason
            row.first_finish_reason, row.finish_reason = row.finish_reason, reason
            row.truncated = reason == "length"
        imported = extra.rollout_file
        routing = (imported.routing_matrices or {}) if imported is not None else {}
        for segment, held_routing in zip(
            row.segments or (), routing.get(str(row.sample_idx), ()), strict=False
        ):
            if held_routing is not None:
                segment["routing_matrices"] = held_routing


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluation_row` says of the record that its row had."""

    keys: list[str]
    """Which optional keys the record had."""
    answer: int | None
    """`sample_idx` of the completion that is the last message, or of the episode that is the row's
    conversation; None where it is none's."""
    row_messages: int | None = None
    """Of an episode: how many messages of that conversation are the row's own."""
    first: int = 0
    """`sample_idx` of the first completion of its run of the data row."""
    routing_matrices: dict[str, list[list[str] | None]] | None = None
    """By `sample_idx`, those of each segment; None where no segment has any."""


class _Extra(msgspec.Struct):
    rollout_file: Imported | None = None
    sampling: dict[str, Any] | None = None
    trajectories: dict[str, list[Any]] | None = None
    episodes: dict[str, dict[str, Any]] | None = None


class _Execution(msgspec.Struct):
    extra: _Extra | None = None


class _Row(msgspec.Struct):
    """As much of `evaluation_row` as is looked at here."""

    execution_metadata: _Execution
    messages: list[dict[str, Any]] = []


def stored_row(row: CompletionRow) -> dict[str, Any]:
    """What a row that came from Eval Protocol has kept in `evaluation_row`.

    Raises:
        FormatError: it is nothing that a conversion writes.
    """
    text = row.evaluation_row or ""
    _decoded(row, text)
    stored: dict[str, Any] = msgspec.json.decode(text)
    return stored


def _decoded(row: CompletionRow, text: str) -> _Extra:
    try:
        execution = msgspec.json.decode(text, type=_Row).execution_metadata
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(
            f"{_place(row)}: evaluation_row is none that `ep-rft convert` wrote: {error}"
        ) from error
    return execution.extra or _Extra()


def _segments_in(
    batch: pa.RecordBatch | pa.Table,
) -> list[list[dict[str, NDArray[Any]]] | None]:
    lists = {name: nested_arrays(batch.column(column)) for name, column in ARRAYS.items()}
    found: list[list[dict[str, NDArray[Any]]] | None] = []
    for i, own in enumerate(zip(*lists.values(), strict=True)):
        counts = {None if arrays is None else len(arrays) for arrays in own}
        if len(counts) > 1:
            raise FormatError(
                f"{_named(batch, i)}: {', '.join(file_format.SEGMENT_COLUMNS)} are of different "
                "numbers of segments"
            )
        tokens = own[0]
        found.append(
            None
            if tokens is None
            else [dict(zip(ARRAYS, arrays, strict=True)) for arrays in zip(*own, strict=True)]
        )
    return found


def sampled_in_all_turns(loss_mask: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """[N] sampled tokens of each episode, and whether there is one, by `segment_loss_mask`."""
    column = loss_mask.combine_chunks()
    segments = column.flatten()
    sampled = _sums(segments.flatten().fill_null(0).to_numpy(), segments.value_lengths())
    return _sums(sampled, column.value_lengths()), column.is_valid().to_numpy(zero_copy_only=False)


def _sums(values: NDArray[Any], lengths: pa.Array) -> NDArray[np.int64]:
    """Of so many values, one list after the other."""
    ends = np.cumsum(lengths.fill_null(0).to_numpy(), dtype=np.int64)
    totals = np.append(0, np.cumsum(values, dtype=np.int64))
    return totals[ends] - totals[np.append(0, ends[:-1])] if len(ends) else ends


def list_array(arrays: Sequence[NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
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


def arrays_of(column: pa.Array | pa.ChunkedArray) -> list[NDArray[Any] | None]:
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


def _nested_array(rows: Sequence[Sequence[Any] | None], kind: pa.DataType) -> pa.Array:
    dtype = kind.value_type.value_type.to_pandas_dtype()
    inner = list_array([np.asarray(a, dtype) for row in rows for a in row or ()], kind.value_type)
    offsets = pa.array(np.cumsum([0, *(len(row or ()) for row in rows)], dtype=np.int32))
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(offsets, inner, type=kind, mask=missing)


def nested_arrays(column: pa.Array | pa.ChunkedArray) -> list[list[NDArray[Any]] | None]:
    """The lists of lists of a column, as `arrays_of`."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    found: list[list[NDArray[Any]] | None] = []
    for chunk in chunks:
        inner = iter(arrays_of(chunk.flatten()))
        for size in chunk.value_lengths().to_pylist():
            own = None if size is None else [next(inner) for _ in range(size)]
            if own is not None and any(array is None for array in own):
                raise FormatError("token data has a null among its segments: a row was damaged")
            found.append(own)  # type: ignore[arg-type]
    return found


def _placed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with what no field of the column can hold as JSON text."""
    placed: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for key, value in message.items():
        fits = isinstance(value, str) if key in _TEXTS else _are_plain_calls(key, value)
        (placed if fits else other)[key] = value
    if other:
        placed["other"] = msgspec.json.encode(other).decode()
    return placed


def _are_plain_calls(key: str, value: Any) -> bool:
    """Whether they are calls of the chat API's form alone."""

    def is_plain(call: Any) -> bool:
        if not isinstance(call, dict) or not set(call) <= _FIELDS:
            return False
        function = call.get("function", {})
        texts = [text for name, text in call.items() if name != "function"]
        if not isinstance(function, dict) or not set(function) <= {"name", "arguments"}:
            return False
        return all(isinstance(text, str) for text in (*texts, *function.values()))

    return key == "tool_calls" and isinstance(value, list) and all(map(is_plain, value))


def _message(placed: Mapping[str, Any] | None, batch: Any, i: int) -> dict[str, Any]:
    """`_placed` undone."""
    message: dict[str, Any] = without_nulls(dict(placed or {}))
    other = message.pop("other", None)
    return message if other is None else message | _json(other, "messages.other", batch, i)


def _json(text: str, name: str, batch: Any, i: int) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(f"{_named(batch, i)}: {name} is no JSON object: {error}") from error


def _named(batch: pa.RecordBatch | pa.Table, i: int) -> str:
    return "data row {}, completion {}".format(
        *(batch.column(name)[i] for name in ("data_idx", "sample_idx"))
    )


def _place(row: CompletionRow) -> str:
    return f"data row {row.data_idx}, completion {row.sample_idx}"
