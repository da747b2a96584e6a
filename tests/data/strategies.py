"""Hypothesis strategies for rollout files, and a comparison that no float slips through."""

from __future__ import annotations

import datetime
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from eval_protocol_rft.data._format import (
    CompletionRow,
    FileMetadata,
    PromptKind,
    RewardSettings,
    SamplingSettings,
    schema,
)
from eval_protocol_rft.record import Score

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
JSON_OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
REWARD_COLUMNS = ("reward_format", "reward_b")


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """What a rollout file says and holds."""

    metadata: FileMetadata
    schema: pa.Schema
    rows: list[CompletionRow]


def _integers(bits: int, *, signed: bool = True) -> st.SearchStrategy[int]:
    low = -(2 ** (bits - 1)) if signed else 0
    return st.integers(low, low + 2**bits - 1)


def _decimals(digits: int, places: int) -> st.SearchStrategy[Any]:
    bound = 10 ** (digits - places) - 1
    return st.decimals(-bound, bound, places=places, allow_nan=False)


_YEARS = (datetime.datetime(1700, 1, 1), datetime.datetime(2250, 1, 1))  # noqa: DTZ001
_MOMENTS = st.datetimes(*_YEARS)
_ZONED = st.datetimes(*_YEARS, timezones=st.just(datetime.UTC))

LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    (pa.int8(), _integers(8)),
    (pa.int64(), _integers(64)),
    (pa.uint64(), _integers(64, signed=False)),
    (pa.float64(), st.floats()),
    (pa.float32(), st.floats(width=32)),
    (pa.float16(), st.floats(width=16)),
    (pa.string(), TEXT),
    (pa.large_string(), TEXT),
    (pa.binary(), st.binary(max_size=9)),
    (pa.large_binary(), st.binary(max_size=9)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    (pa.timestamp("s"), _MOMENTS.map(lambda moment: moment.replace(microsecond=0))),
    (pa.timestamp("us"), st.datetimes()),
    (pa.timestamp("ns"), _MOMENTS),
    (pa.timestamp("us", "UTC"), _ZONED),
    (pa.timestamp("us", "Europe/Berlin"), _ZONED),
    (pa.time32("s"), st.times().map(lambda time: time.replace(microsecond=0))),
    (pa.time64("us"), st.times()),
    (pa.duration("us"), st.timedeltas(datetime.timedelta(-9999), datetime.timedelta(9999))),
    (pa.decimal128(20, 5), _decimals(20, 5)),
    (pa.decimal256(60, 20), _decimals(60, 20)),
]

Column = tuple[pa.DataType, st.SearchStrategy[Any]]


def _nested(inner: st.SearchStrategy[Column]) -> st.SearchStrategy[Column]:
    def lists(column: Column) -> Column:
        kind, values = column
        return pa.list_(kind), st.lists(st.none() | values, max_size=3)

    def pairs(column: Column) -> Column:
        kind, values = column
        return pa.list_(kind, 2), st.lists(st.none() | values, min_size=2, max_size=2)

    def maps(column: Column) -> Column:
        kind, values = column
        items = st.dictionaries(TEXT, st.none() | values, max_size=3)
        return pa.map_(pa.string(), kind), items.map(lambda found: list(found.items()))

    def structs(columns: dict[str, Column]) -> Column:
        kind = pa.struct([(name, kind) for name, (kind, _) in columns.items()])
        fields = {name: st.none() | values for name, (_, values) in columns.items()}
        return kind, st.fixed_dictionaries(fields)

    names = st.sampled_from(["a", "b", "odd name", "ü"])
    return (
        inner.map(lists)
        | inner.map(pairs)
        | inner.map(maps)
        | st.dictionaries(names, inner, min_size=1, max_size=3).map(structs)
    )


COLUMNS: st.SearchStrategy[Column] = st.recursive(st.sampled_from(LEAVES), _nested, max_leaves=3)
"""An Arrow type that a data set's column may have, and values of it."""

_FUNCTIONS = st.fixed_dictionaries({}, optional={"name": TEXT, "arguments": TEXT})
_TOOL_CALLS = st.fixed_dictionaries(
    {}, optional={"id": TEXT, "type": st.just("function"), "function": _FUNCTIONS}
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={
            "content": TEXT,
            "reasoning_content": TEXT,
            "name": TEXT,
            "tool_calls": st.lists(_TOOL_CALLS, max_size=2),
            "tool_call_id": TEXT,
        },
    ),
    max_size=3,
)


def token_ids(size: int | None = None) -> st.SearchStrategy[Any]:
    low, high = (0, 6) if size is None else (size, size)
    ids = st.lists(st.integers(0, 2**31 - 1), min_size=low, max_size=high)
    return ids.map(lambda values: np.array(values, np.int32))


def logprobs(size: int) -> st.SearchStrategy[Any]:
    values = st.floats(max_value=0, width=32, allow_infinity=False)
    found = st.lists(values, min_size=size, max_size=size)
    return found.map(lambda values: np.array(values, np.float32))


_SCORES = st.builds(
    Score,
    reward=st.none() | FINITE,
    reason=st.none() | TEXT,
    metrics=st.none() | JSON_OBJECTS,
    error=st.none() | TEXT,
).filter(lambda score: score != Score())


_ODD_MESSAGES = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "weight", "other"]) | TEXT,
    TEXT | JSON,
    max_size=4,
)
"""With fields, and values of fields, that the column has no place for."""


@st.composite
def segments(draw: st.DrawFn) -> dict[str, Any]:
    """Any numbers; what a record may hold is another question."""
    mask = draw(st.lists(st.integers(0, 1), max_size=6))
    return {
        "tokens": draw(token_ids(len(mask))),
        "logprobs": draw(logprobs(len(mask))),
        "loss_mask": np.array(mask, np.int8),
    }


@st.composite
def episodes(draw: st.DrawFn, last: str | None) -> dict[str, Any]:
    """As `episodes` of a record has one, whose last turn ended for the reason `last`."""
    return {
        "turns": draw(st.integers(1, 2**31 - 1)),
        "stop_reason": draw(TEXT),
        "finish_reason": last,
        "step_rewards": draw(st.lists(st.none() | FINITE, max_size=3)),
        "metrics": draw(JSON_OBJECTS),
        "messages": draw(_MESSAGES | st.lists(_ODD_MESSAGES, max_size=3)),
        "row_messages": draw(st.none() | st.integers(0, 3)),
        "prompt_ids": None,  # its row's own, in a file
    }


@st.composite
def completion_rows(
    draw: st.DrawFn,
    *,
    data_idx: int,
    sample_idx: int,
    prompt_kind: PromptKind = "text",
    original: dict[str, st.SearchStrategy[Any]] | None = None,
    ground_truth: st.SearchStrategy[Any] = TEXT,
    reward_columns: tuple[str, ...] = ("reward",),
    may_be_episode: bool = False,
) -> CompletionRow:
    """A completion, or one that failed, with or without anything that may be missing."""

    def maybe(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | values)

    row = CompletionRow(
        row_id=draw(TEXT),
        data_idx=data_idx,
        sample_idx=sample_idx,
        prompt=draw(TEXT if prompt_kind == "text" else _MESSAGES),
        tools=maybe(st.lists(JSON_OBJECTS, max_size=2)),
        ground_truth=maybe(ground_truth),
        prompt_ids=maybe(token_ids()),
        temperature=maybe(FINITE),
        top_p=maybe(FINITE),
        top_k=maybe(_integers(32)),
        max_tokens=maybe(_integers(32)),
        seed=maybe(_integers(64)),
        policy_version=maybe(TEXT),
        first_policy_version=maybe(TEXT),
        attempts=maybe(_integers(32)),
        seconds=maybe(FINITE),
        began_at=maybe(FINITE),
        request_id=maybe(TEXT),
        evaluation_row=maybe(JSON_OBJECTS.map(lambda value: msgspec.json.encode(value).decode())),
        original={name: maybe(values) for name, values in (original or {}).items()},
    )
    if draw(st.booleans()):
        row.error = draw(TEXT)
        row.error_kind = maybe(TEXT)
        row.error_status = maybe(st.integers(400, 599))
        return row
    row.response = draw(TEXT)
    row.completion_ids = draw(token_ids())
    row.logprobs = draw(logprobs(len(row.completion_ids)))
    row.raw_logprobs = maybe(logprobs(len(row.completion_ids)))
    row.finish_reason = maybe(TEXT)
    row.truncated = maybe(st.booleans())
    row.past_end = maybe(token_ids().filter(len))
    if may_be_episode and draw(st.booleans()):
        row.finish_reason = draw(st.sampled_from(["stop", "length"]))
        row.segments = draw(st.lists(segments(), max_size=3))
        row.episode = draw(episodes(row.finish_reason))
        row.first_finish_reason = maybe(TEXT)
    row.scores = {
        column: score for column in reward_columns if (score := maybe(_SCORES)) is not None
    }
    return row


@st.composite
def rollout_files(draw: st.DrawFn) -> RolloutFile:
    """A file of any prompts, rewards and columns, with up to six rows."""
    kind: PromptKind = draw(st.sampled_from(["text", "messages"]))
    has_episodes = draw(st.booleans())
    further = draw(st.lists(st.sampled_from(REWARD_COLUMNS), unique=True))
    columns = draw(st.dictionaries(TEXT, st.none() | COLUMNS, max_size=3))
    truth = draw(st.none() | COLUMNS)
    types = {name: pa.string() if made is None else made[0] for name, made in columns.items()}
    values = {name: JSON if made is None else made[1] for name, made in columns.items()}
    as_json = [f"original_{name}" for name, made in columns.items() if made is None]
    if truth is None:
        as_json.append("ground_truth")
    metadata = FileMetadata(
        prompt_kind=kind,
        sampling=SamplingSettings(model="m", temperature=1, top_p=1, top_k=0, n=2),
        json_columns=as_json,
        rewards={name: RewardSettings(evaluator="e.py", fingerprint="f") for name in further},
    )
    keys = draw(
        st.lists(
            st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)), unique=True, max_size=6
        )
    )
    rows = [
        draw(
            completion_rows(
                data_idx=data_idx,
                sample_idx=sample_idx,
                prompt_kind=kind,
                original=values,
                ground_truth=JSON if truth is None else truth[1],
                reward_columns=("reward", *further),
                may_be_episode=has_episodes,
            )
        )
        for data_idx, sample_idx in sorted(keys)
    ]
    truth_type = None if truth is None else truth[0]
    made = schema(metadata, types, ground_truth=truth_type, episodes=has_episodes)
    return RolloutFile(metadata, made, rows)


def exactly(value: Any) -> Any:
    """A value such that two are equal only where their kinds and bits are."""
    if isinstance(value, CompletionRow):
        return {name: exactly(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Score):
        return exactly(msgspec.structs.asdict(value))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tobytes())
    if isinstance(value, float):
        return ("float", "NaN" if value != value else struct.pack("<d", value))
    if isinstance(value, dict):
        return {name: exactly(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [exactly(item) for item in value]
    if isinstance(value, datetime.datetime):
        moment = value if value.tzinfo is None else value.astimezone(datetime.UTC)
        return ("datetime", moment.replace(tzinfo=None), value.tzinfo is None)
    return (type(value).__name__, value)
