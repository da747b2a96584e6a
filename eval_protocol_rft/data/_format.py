"""The rollout file: its columns, what its metadata says, and a row of it as an object.
docs/format.md is the specification.

Invariant: one row per completion that was asked for, failed ones included, and no two rows with the
same (`data_idx`, `sample_idx`). One that did not fail has its own prompt ids, sampled ids and
logprobs. What a column holds follows from the file alone: its Arrow type,
and for columns of JSON text the list in the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata as distribution
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.record import UNSCORED, Score

SCHEMA_VERSION = 2
READ_VERSIONS = (1, 2)
"""Of 1, files of single completions are the same; episodes had their first turn in columns and the
whole of it in `evaluation_row`."""
METADATA_KEY = b"eval_protocol_rft"
"""Key of the JSON text in the Parquet file's key-value metadata."""
ORIGINAL_PREFIX = "original_"
REWARD_PREFIX = "reward_"

_TOOL_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("reasoning_content", pa.string()),
            ("name", pa.string()),
            ("tool_calls", pa.list_(_TOOL_CALL)),
            ("tool_call_id", pa.string()),
        ]
    )
)
"""Chat messages. A null field is an absent one."""

PromptKind = Literal["text", "messages"]

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())

FIXED_COLUMNS: dict[str, pa.DataType] = {
    "row_id": pa.string(),
    "data_idx": pa.int64(),
    "sample_idx": pa.int32(),
    "prompt": pa.string(),  # or MESSAGES, see `schema`
    "tools": pa.string(),
    "ground_truth": pa.string(),
    "response": pa.string(),
    "message": pa.string(),
    "prompt_ids": _IDS,
    "completion_ids": _IDS,
    "logprobs": _LOGPROBS,
    "raw_logprobs": _LOGPROBS,
    "finish_reason": pa.string(),
    "truncated": pa.bool_(),
    "past_end": _IDS,
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "top_k": pa.int32(),
    "max_tokens": pa.int32(),
    "seed": pa.int64(),
    "policy_version": pa.string(),
    "first_policy_version": pa.string(),
    "reward": pa.float64(),
    "reward_reason": pa.string(),
    "metrics": pa.string(),
    "reward_error": pa.string(),
    "attempts": pa.int32(),
    "seconds": pa.float64(),
    "began_at": pa.float64(),
    "request_id": pa.string(),
    "error": pa.string(),
    "error_kind": pa.string(),
    "error_status": pa.int32(),
    "evaluation_row": pa.string(),
}
"""Column -> Arrow type, in file order. Every column but the first three can be null. `tools`,
`message`, `metrics` and `evaluation_row` are JSON text."""

_MESSAGE = [*MESSAGES.value_type, pa.field("other", pa.string())]
EPISODE_COLUMNS: dict[str, pa.DataType] = {
    "segment_tokens": pa.list_(_IDS),
    "segment_logprobs": pa.list_(_LOGPROBS),
    "segment_loss_mask": pa.list_(pa.list_(pa.int8())),
    "turns": pa.int32(),
    "stop_reason": pa.string(),
    "first_finish_reason": pa.string(),
    "step_rewards": pa.list_(pa.float64()),
    "episode_metrics": pa.string(),
    "messages": pa.list_(pa.struct(_MESSAGE)),
    "row_messages": pa.int32(),
}
"""Column -> Arrow type, of files with episodes; all null where a completion is none. Of messages,
`other` is JSON text of the fields that have no place of their own."""

SEGMENT_COLUMNS = ("segment_tokens", "segment_logprobs", "segment_loss_mask")
ARRAY_COLUMNS = ("prompt_ids", "completion_ids", "logprobs", "raw_logprobs", "past_end")
TOKEN_COLUMNS = (*ARRAY_COLUMNS, *SEGMENT_COLUMNS)
"""Columns that grow with the number of tokens."""
ROW_GROUP_ROWS = 4096
ROW_GROUP_TOKENS = 2_000_000
"""Prompt and sampled tokens: some 30 MB in memory with raw logprobs."""


class FormatError(EvalProtocolRftError, ValueError):
    """A file is no rollout file, or breaks the format; the message names file and place."""


class SamplingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all completions of a file have in common."""

    model: str
    model_fingerprint: str | None = None
    """Tells the weights of a local folder apart, hex."""
    dtype: str | None = None
    """What a model of this process, or an engine that it started, computed in, where that is known
    and not float32."""
    tokenizer: str | None = None
    chat_template_hash: str | None = None
    """First 16 hex digits of the SHA-256 of the chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    raw: bool = False
    """The prompt is one text as the tokenizer reads it, with no chat template."""
    add_special_tokens: bool = True
    """Of raw text: whether the tokenizer put before it what it puts before every text (BOS)."""
    system: str | None = None
    """System message put before prompts that have none."""
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None = None
    stop: list[str] = []
    n: int
    """Completions per prompt."""
    seed: int | None = None
    """What the completions' own seeds were derived from."""
    seed_given: bool = False
    """False where it was drawn at random."""
    support_truncated: bool = False
    """True where top_p, top_k or another setting kept part of the vocabulary from being drawn."""
    split_reasoning: bool = True
    other: dict[str, Any] = {}
    """Further request fields that were sent."""


class DataSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The data set that the prompts came from, and which of its rows."""

    name: str
    fingerprint: str
    """SHA-256 of its content, hex."""
    num_rows: int
    prompt_key: str
    tools_key: str | None = None
    ground_truth_key: str | None = None
    """A column, a path into its objects (`reward_model.ground_truth`), or, with `####` at its end,
    what stands in its text behind the last of these."""
    row_id_key: str | None = None
    """The same of what the rows are called; None: the data set's name and their number."""
    limit: int | None = None
    shuffle_seed: int | None = None
    where: str | None = None


class EpisodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy talked with, where completions are episodes."""

    environment: str
    """What makes one, as it was named."""
    code: dict[str, str] = {}
    """Of each file that it depends on, a fingerprint of what it depends on."""
    on_rewrite: str
    limits: dict[str, float]
    """As in `EpisodeLimits`."""


class RewardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who gave a column of rewards."""

    evaluator: str
    fingerprint: str
    """SHA-256 of the evaluator's source file, hex."""
    code: dict[str, str] = {}
    """Of each file that its scores depend on, a fingerprint of what they depend on: where it is
    known, it decides whether the rewards are of this version."""


class FileMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself."""

    schema_version: int = SCHEMA_VERSION
    package_version: str = msgspec.field(
        default_factory=lambda: distribution.version("eval-protocol-rft")
    )
    prompt_kind: PromptKind = "text"
    sampling: SamplingSettings | None = None
    """None where rows were sampled in different ways; each then says so in `evaluation_row`."""
    data: DataSettings | None = None
    """None where the rows did not come from a data set."""
    episodes: EpisodeSettings | None = None
    """None where none were sampled for the file; rows of Eval Protocol may bring some."""
    json_columns: list[str] = []
    """Those among `ground_truth` and `original_*` that hold JSON text."""
    rewards: dict[str, RewardSettings] = {}
    """Reward column -> who filled it."""

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


def decode_metadata(data: bytes | None, *, where: str) -> FileMetadata:
    """Read the JSON text under `METADATA_KEY`.

    Raises:
        FormatError: there is none, it is not that, or of a version this package cannot read.
    """
    if data is None:
        raise FormatError(
            f"{where}: no rollout file, its metadata has no {METADATA_KEY.decode()!r}. "
            "`ep-rft generate` writes such files, `ep-rft convert` makes them of others"
        )
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version not in READ_VERSIONS:
            known = " and ".join(map(str, READ_VERSIONS))
            raise FormatError(f"{where}: schema version {version}, this package reads {known}")
        return msgspec.json.decode(data, type=FileMetadata)
    except msgspec.DecodeError as error:
        raise FormatError(f"{where}: broken metadata: {error}") from error


def schema(
    metadata: FileMetadata,
    original: Mapping[str, pa.DataType],
    *,
    ground_truth: pa.DataType | None = None,
    episodes: bool = False,
) -> pa.Schema:
    """The Arrow schema of a file.

    Args:
        metadata: goes into the schema; says whether prompts are text or messages, and which
            further rewards there are.
        original: column of the data set -> Arrow type, without the prefix.
        ground_truth: type of that column, default text.
        episodes: with the columns of episodes.

    Raises:
        FormatError: Parquet cannot hold a type.
    """
    types = dict(FIXED_COLUMNS)
    if metadata.prompt_kind == "messages":
        types["prompt"] = MESSAGES
    types["ground_truth"] = as_stored("ground_truth", ground_truth or pa.string())
    if episodes:
        types |= EPISODE_COLUMNS
    for column in metadata.rewards:
        types |= dict(zip(reward_columns(column), _REWARD_TYPES, strict=True))
    for name, kind in original.items():
        types[ORIGINAL_PREFIX + name] = as_stored(name, kind)
    return pa.schema(list(types.items())).with_metadata({METADATA_KEY: metadata.encode()})


def as_stored(name: str, kind: pa.DataType) -> pa.DataType:
    """The type that a column of type `kind` has after Parquet: seconds come back as milliseconds.

    Raises:
        FormatError: Parquet cannot hold it.
    """
    sink = pa.BufferOutputStream()
    try:
        # Not write_table: that imports pandas, for a second.
        pq.ParquetWriter(sink, pa.schema([("column", kind)])).close()
    except pa.ArrowException as error:
        raise FormatError(
            f"column {name!r} is {kind}, which Parquet cannot hold ({error}): drop it, or cast it"
        ) from error
    return pq.read_schema(pa.BufferReader(sink.getvalue())).field(0).type


def metadata_of(schema: pa.Schema, *, where: str = "the schema") -> FileMetadata:
    """What a file says of itself, by its schema; see `decode_metadata`."""
    return decode_metadata((schema.metadata or {}).get(METADATA_KEY), where=where)


_NEWS = {"raw": False, "add_special_tokens": True, "row_id_key": None, "dtype": None}
"""Settings that earlier releases of this version did not have, with what they did."""


def without_news(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of sampling or data, without those of `_NEWS` that say nothing new: rows of Eval
    Protocol made of a file are those that an earlier release made of it."""
    return {k: v for k, v in settings.items() if k not in _NEWS or v != _NEWS[k]}


def with_metadata(schema: pa.Schema, metadata: FileMetadata) -> pa.Schema:
    """The schema of a file that says this of itself."""
    return schema.with_metadata({**(schema.metadata or {}), METADATA_KEY: metadata.encode()})


_REWARD_TYPES = (pa.float64(), pa.string(), pa.string(), pa.string())


def reward_columns(column: str) -> tuple[str, str, str, str]:
    """The columns of one reward function: the number, why, further scores (JSON text), and what
    kept a completion from having one. `column` is `reward` or `reward_<name>`."""
    if column == "reward":
        return "reward", "reward_reason", "metrics", "reward_error"
    return column, f"{column}_reason", f"{column}_metrics", f"{column}_error"


def json_kind(name: str) -> type | None:
    """What the JSON text of a column of the format is; None where it holds none."""
    if name == "tools":
        return list
    named = name.startswith(REWARD_PREFIX) and name.endswith("_metrics")
    return dict if named or name in _JSON_OBJECTS else None


_JSON_OBJECTS = ("metrics", "message", "episode_metrics", "evaluation_row")


def reward_column(name: str | None) -> str:
    """The column of the reward called `name`; None is the main one.

    Raises:
        FormatError: the name would not make a column of its own.
    """
    if name is None or name == "reward":
        return "reward"
    if not _REWARD_NAME.fullmatch(name) or name.rpartition("_")[2] in (
        "reason",
        "metrics",
        "error",
    ):
        raise FormatError(
            f"{name!r} cannot name a reward: use letters, digits and underscores, and none of "
            "reason, metrics and error as the last word"
        )
    return REWARD_PREFIX + name


_REWARD_NAME = re.compile("[A-Za-z0-9_]+")


class _Version(msgspec.Struct):
    schema_version: int


Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
ChatMessages = list[dict[str, Any]]


class CompletionRow(msgspec.Struct, kw_only=True, eq=False):
    """One completion that was asked for; docs/format.md says what each field means. Of an episode,
    what is sampled is its first turn, and how it ended is of its last one."""

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
    segments: list[dict[str, Any]] | None = None
    """Of an episode: `tokens`, `logprobs` and `loss_mask` of each, arrays of int32, float32 and
    int8; in files of version 1 what JSON text says."""
    episode: dict[str, Any] | None = None
    """Of an episode: how it went, as `episodes` of a record says it."""
    first_finish_reason: str | None = None
    """Of an episode's first turn."""
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
        """Sampled tokens; of an episode, of all its turns."""
        if self.segments is not None:
            return sum(int(np.sum(segment["loss_mask"])) for segment in self.segments)
        return 0 if self.completion_ids is None else len(self.completion_ids)
