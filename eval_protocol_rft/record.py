"""What was rolled out for one prompt: the one form of it, on its way from a sampler or a file to a
trainer. In `execution_metadata.extra` it is plain JSON, see docs/record.md.

Invariant: every per-completion list has the same length and order. A record that breaks this cannot
be built; what is read has had each of its numbers checked, once: `RecordError` names field,
completion and index. Token data stay what they are, lists of `extra` or arrays of a file's columns,
and are not copied; `read_record` gives them as segments too, which is what trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from msgspec.structs import force_setattr

from eval_protocol_rft import _segments
from eval_protocol_rft._segments import EpisodeRecord, Segment, TokenBuffer
from eval_protocol_rft._segments import RecordError as RecordError
from eval_protocol_rft.sampling import Failure, FinishReason

if TYPE_CHECKING:
    Numbers = Sequence[int]
    Logprobs = Sequence[float]
    Segments = list[Segment]
else:  # checked when they are read as arrays, not one by one before
    Numbers = Logprobs = Any
    Segments = list[Any]

SCHEMA_VERSION = 1
ARRAY_KEYS = (
    "prompt_ids",
    "completion_ids",
    "inference_logprobs",
    "raw_logprobs",
    "token_turn_traces",
    "assistant_turn_payloads",
    "trajectories",
)
"""The keys of `extra` that grow with the number of tokens."""
PUBLISHED_KEYS = (
    "prompt_ids",
    "completion_ids",
    "inference_logprobs",
    "completions_text",
    "truncated",
    "finish_reasons",
)
"""What the published contract promises. A row with these alone is read too."""


class SamplingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the completions were sampled. Lists are per surviving completion."""

    model: str | None = None
    """None, as the four below, where a row that another program wrote does not say."""
    tokenizer: str | None = None
    chat_template_hash: str | None = None
    """First 16 hex digits of the SHA-256 of the chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the template was given beside the conversation: `reasoning_effort`, ..."""
    raw: bool = False
    """The prompt is the one message's text as the tokenizer reads it, with no chat template."""
    add_special_tokens: bool = True
    """Of raw text: whether the tokenizer put before it what it puts before every text (BOS)."""
    rendered_as: list[str] = []
    """What of the row's messages the prompt writes otherwise, as chat servers do: several text
    parts joined, the role developer as system."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: list[str] = []
    n: int
    """Completions wanted: survivors plus failures, without over-sampling. With it, survivors,
    failures and `cancelled` are n + over_sample."""
    seed: int | None = None
    """What the per-completion seeds were derived from."""
    began_at: float = 0.0
    """Unix time (seconds) at which the first completion was asked for."""
    indices: list[int]
    """Place of each survivor among the n + over_sample asked for."""
    seeds: list[int | None]
    policy_versions: list[str | None]
    first_policy_versions: list[str | None] = []
    """For completions whose sampling spans several versions: the first that is not the one in
    `policy_versions`. Empty where there is no such completion."""
    past_end: list[list[int]] = []
    """Ids that the server handed out behind the stop string or token that it says ended the
    completion (speculative decoding does): no evaluator saw them, and they are in no other list.
    Empty where there are none."""
    request_ids: list[str | None]
    attempts: list[int]
    seconds: list[float]
    retry_causes: list[list[str]] = []
    """Why the attempts before the successful one failed, in order. Empty where every completion
    came at the first attempt, and in records from before this was told."""
    over_sample: int = 0
    """k: n + k were asked for, and the first n to survive kept."""
    cancelled: list[int] = []
    """Places of the surplus that was cancelled when n had survived. What is slow is cancelled, so
    the survivors are shorter than the policy's completions are."""
    straggler_seconds: float | None = None
    """Deadline, counted from the first request. What it cut off is a failure of kind `cancelled`,
    with the same bias."""
    logprobs: Literal["sampling", "unknown"] = "sampling"
    """What `inference_logprobs` holds: the values the sampler drew with. Unknown: the proxy that
    they came from does not say whether these or the model's own, which are the same at temperature
    1 and over the whole vocabulary."""
    prompts: Literal["row", "agent"] = "row"
    """Who made the prompts. An agent's may differ from one rollout of a row to the next."""
    support_truncated: bool = False
    """True where top_p, top_k or another setting kept part of the vocabulary from being drawn."""
    split_reasoning: bool = True
    """True where thinking goes to `Message.reasoning_content`."""
    other: dict[str, Any] = {}
    """Further request fields that were sent."""


class Score(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one evaluator said of one completion."""

    reward: float | None = msgspec.field(default=None, name="score")
    """None: no valid score, which is not 0."""
    reason: str | None = None
    metrics: dict[str, Any] | None = None
    """Further scores by name."""
    error: str | None = None
    """Why there is no reward."""


UNSCORED = Score()


class RolloutRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """All completions of one row, exact to the token. G completions, T_i tokens each.

    Where rollouts have several turns, a completion is the first turn of its episode, and
    `trajectories` and `episodes` hold the whole of it; rewards are the episode's.
    """

    prompt_ids: Numbers
    """[P] ids that went to the sampler."""
    completion_ids: Sequence[Numbers]
    """[G][T_i] sampled ids, the sampled end-of-turn token included."""
    inference_logprobs: Sequence[Logprobs]
    """[G][T_i] sampling logprobs, nats."""
    completions_text: list[str]
    """[G] decoded from the ids, without the end-of-turn token and without a stop string."""
    truncated: list[bool]
    finish_reasons: list[FinishReason]
    """[G] as the sampler said it."""
    sampling: SamplingRecord
    completion_messages: list[dict[str, Any] | None] | None = None
    """[G] the assistant's message (content, `reasoning_content`, `tool_calls`), read when the
    completion came; None where it is what `rollout.answer_fields` reads out of the text. Left out
    where that is so of all of them."""
    failures: list[Failure] = []
    """Completions that could not be had, each with its place among those asked for."""
    raw_logprobs: Sequence[Logprobs | None] | None = None
    token_turn_traces: list[dict[str, Any]] = []
    """Each turn of the completion that became the message, see `turn_trace`."""
    assistant_turn_payloads: list[dict[str, Any]] = []
    """The same turns by the row's assistant messages, without their prompts, see
    `turn_payloads`."""
    trajectories: list[Segments] | None = None
    """[G][S_i] the segments of each episode, in order; None for rollouts of one turn."""
    episodes: list[EpisodeRecord] | None = None
    """[G] how each episode went; there exactly where `trajectories` is."""
    rewards: list[float | None] | None = None
    """[G] after scoring; None where a completion has no valid score, which is not 0.0."""
    completion_results: list[Score] | None = None
    rft_schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise RecordError(problem)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def sampled_counts(self) -> list[int]:
        """[G] sampled tokens of each completion; of an episode, of all its turns."""
        if self.trajectories is None:
            return [len(ids) for ids in self.completion_ids]
        return [sum(s.num_sampled for s in segments) for segments in self.trajectories]

    @property
    def last_finish_reasons(self) -> list[FinishReason]:
        """[G] of each completion; of an episode, of its last turn."""
        if self.episodes is None:
            return self.finish_reasons
        return [episode.last_finish_reason for episode in self.episodes]

    @property
    def ends_truncated(self) -> list[bool]:
        """[G] whether each completion was cut off; of an episode, its last turn."""
        if self.episodes is None:
            return self.truncated
        return [reason == "length" for reason in self.last_finish_reasons]

    def _problem(self) -> str | None:
        if self.rft_schema != SCHEMA_VERSION:
            return f"rft_schema is {self.rft_schema}, this version reads {SCHEMA_VERSION}"
        for name in ("completion_ids", "inference_logprobs"):
            if not _is_list(getattr(self, name)):
                kind = type(getattr(self, name)).__name__
                return f"{name} is {kind}, not a list of lists or arrays"
        size = len(self.completion_ids)
        if (self.trajectories is None) != (self.episodes is None):
            missing = "trajectories" if self.trajectories is None else "episodes"
            return f"{missing} is missing: trajectories and episodes come together"
        for name in (*_PER_COMPLETION, *_PER_COMPLETION_OR_NONE):
            values = getattr(self, name)
            if values is not None and len(values) != size:
                return f"{name} has {len(values)} entries for {size} completions"
        for name in _PER_COMPLETION_SAMPLING:
            values = getattr(self.sampling, name)
            if len(values) != size:
                return f"sampling.{name} has {len(values)} entries for {size} completions"
        for name in ("first_policy_versions", "retry_causes", "past_end"):
            values = getattr(self.sampling, name)
            if values and len(values) != size:
                return f"sampling.{name} has {len(values)} entries, not {size} or none"
        if self.trajectories is None or self.episodes is None:
            return None
        for i, (segments, episode) in enumerate(zip(self.trajectories, self.episodes, strict=True)):
            if problem := _segments.episode_problem(episode, len(segments), self.finish_reasons[i]):
                return f"episode {i}: {problem}"
        return None

    def to_extra(self) -> dict[str, Any]:
        """The record as plain JSON values, to be merged into `execution_metadata.extra`. Keys that
        do not apply (no scores yet, no raw logprobs, one turn) are left out. Lists of token data
        are the record's own.
        """
        names = [n for n in self.__struct_fields__ if getattr(self, n) is not None]
        return {
            name: _listed(getattr(self, name))
            if name in ARRAY_KEYS
            else msgspec.to_builtins(getattr(self, name))
            for name in names
        }

    @classmethod
    def from_extra(
        cls, extra: Mapping[str, Any] | None, params: Mapping[str, Any] | None = None
    ) -> RolloutRecord:
        """Read the record out of `extra`, which may hold foreign keys beside it.

        Args:
            extra: with a record, or with the published keys alone; then lengths and scores are
                what it says, and the completions are numbered as they stand.
            params: the row's completion params, which say how it was sampled where `extra` does
                not.

        Raises:
            RecordError: there is no record, or a field is missing, mistyped or contradictory.
        """
        return read_record(extra, params)[0]


def read_record(
    extra: Mapping[str, Any] | None,
    params: Mapping[str, Any] | None = None,
    buffer: TokenBuffer | None = None,
) -> tuple[RolloutRecord, list[tuple[Segment, ...]]]:
    """`RolloutRecord.from_extra`, and its token data as arrays in `buffer`: [G] the segments of
    each completion. Of an episode these are those of all its turns."""
    if not has_record(extra):
        raise RecordError(
            "no rollout record in execution_metadata.extra: was the row produced by "
            "FireworksTrainingRolloutProcessor, and did its rollout succeed?"
        )
    assert extra is not None  # noqa: S101 - it has a record
    try:
        fields = extra if is_marked(extra) else _marked(extra, params)
        record = msgspec.convert(fields, RolloutRecord)
    except msgspec.ValidationError as error:
        raise RecordError(f"invalid rollout record: {error}") from error
    return record, segments_of(record, buffer or TokenBuffer())


def segments_of(record: RolloutRecord, buffer: TokenBuffer) -> list[tuple[Segment, ...]]:
    """[G] the segments of each completion, laid out in `buffer` and checked; an episode's are those
    that the record holds from then on.

    Raises:
        RecordError: a number is no token id or no logprob, or lists contradict each other; the
            message names completion, segment and index.
    """
    names = [f"completion {index}" for index in record.sampling.indices]
    trajectories = record.trajectories
    if trajectories is None:
        first_turns = _segments.lay_out(
            record.prompt_ids, record.completion_ids, record.inference_logprobs, buffer, names
        )
    else:
        first_turns = _first_turns(record, names)
    for raw, ids, name in zip(
        record.raw_logprobs or (), record.completion_ids, names, strict=False
    ):
        if raw is not None:
            _segments.check_logprobs(raw, len(ids), f"{name}: raw_logprobs")
    if trajectories is None:
        return [(segment,) for segment in first_turns]
    read: list[tuple[Segment, ...]] = []
    for raw_segments, first_turn, name in zip(trajectories, first_turns, names, strict=True):
        segments = []
        for k, segment in enumerate(raw_segments):
            try:
                segments.append(_segments.read_segment(segment, buffer))
            except RecordError as error:
                raise RecordError(f"{name}, segment {k}: {error}") from error
        if problem := _segments.beginning_problem(segments[0], first_turn):
            raise RecordError(f"{name}, segment 0: {problem}")
        read.append(tuple(segments))
    force_setattr(record, "trajectories", [list(segments) for segments in read])
    return read


def _first_turns(record: RolloutRecord, names: Sequence[str]) -> list[Segment]:
    """[G] of each episode the first turn, which is only compared with what its first segment begins
    with."""
    ids, logprobs = record.completion_ids, record.inference_logprobs
    prompts = [episode.prompt_ids for episode in record.episodes or ()]
    if not any(prompts):
        return _segments.lay_out(record.prompt_ids, ids, logprobs, TokenBuffer(0), names)
    return [
        _segments.lay_out(
            prompt or record.prompt_ids, ids[i : i + 1], logprobs[i : i + 1], TokenBuffer(0), [name]
        )[0]
        for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]


def has_record(extra: Mapping[str, Any] | None) -> bool:
    """Whether there is a rollout record in `extra`: ours, or the published keys alone."""
    return extra is not None and (
        is_marked(extra) or all(extra.get(k) is not None for k in PUBLISHED_KEYS)
    )


def is_failure(code: Any) -> bool:
    """Whether the code of a row's `rollout_status` is an error: those of gRPC, and Eval Protocol's
    own for responses that it refuses. `Status.is_error` knows INTERNAL alone. What `extra` of such
    a row holds is of an earlier rollout."""
    return isinstance(code, int) and (0 < code < _FIRST_OWN_CODE or code == _RESPONSE_QUALITY_ERROR)


_FIRST_OWN_CODE = 100
"""`Status.Code`: gRPC's codes are below, Eval Protocol's own from here on (finished, running)."""
_RESPONSE_QUALITY_ERROR = 103


def is_marked(extra: Mapping[str, Any]) -> bool:
    """Whether the record in `extra` is one of ours, with all that belongs to it."""
    return "rft_schema" in extra


def result_score(result: Any) -> float | None:
    """The score of an `evaluation_result`, an object or its JSON; None where there is no valid
    one. It is the reward of a row's only completion where the record has no rewards."""

    def field(name: str) -> Any:
        return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)

    return None if field("is_score_valid") is False else field("score")


def score_of_result(result: Mapping[str, Any]) -> Score:
    """What an `evaluation_result` says of a row's only completion: the evaluator judged the row as
    it is, and left no rewards in the record."""
    reward, reason = result_score(result), result.get("reason")
    error = None if reward is not None else "the evaluator marked the score as invalid"
    return Score(reward=reward, reason=reason, error=error)


def _marked(extra: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The published keys, and what is known beside them, as a record of ours."""
    size = len(extra["completion_ids"]) if isinstance(extra["completion_ids"], Sized) else 0
    published = {key: extra[key] for key in (*PUBLISHED_KEYS, *_BESIDE) if key in extra}
    sampling = sampling_of_params(with_body(params or {}), size)
    return {**published, "rft_schema": SCHEMA_VERSION, "sampling": sampling}


def sampling_of_params(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """`sampling` of a record of so many completions, where the row's completion params are all that
    says how they were sampled."""
    nothing: list[None] = [None] * size
    top_p, top_k = params.get("top_p"), params.get("top_k")
    return {
        **{key: params.get(key) for key in _HOW_SAMPLED},
        "n": size,
        "indices": list(range(size)),
        "seeds": nothing,
        "policy_versions": nothing,
        "request_ids": nothing,
        "attempts": [1] * size,
        "seconds": [0.0] * size,
        "support_truncated": top_p not in (None, 1) or top_k not in (None, 0, -1),
    }


def with_body(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Completion params with what their `extra_body` says, an object or its JSON."""
    body = params.get("extra_body")
    with contextlib.suppress(msgspec.DecodeError):
        body = msgspec.json.decode(body) if isinstance(body, str) else body
    return {**body, **params} if isinstance(body, Mapping) else params


def _is_list(values: Any) -> bool:
    return isinstance(values, Sized) and not isinstance(values, (str, bytes, Mapping))


def _listed(values: Any) -> Any:
    """Lists of numbers, in lists where they are arrays, and of segments as objects."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    if isinstance(values, Segment):
        return values.to_json()
    if isinstance(values, Mapping):
        return {name: _listed(value) for name, value in values.items()}
    if isinstance(values, list | tuple) and values and isinstance(values[0], _NESTED):
        return [_listed(value) for value in values]
    return values


_NESTED = (list, tuple, np.ndarray, Mapping, Segment, type(None))
_BESIDE = ("rewards", "completion_results", "raw_logprobs")
_HOW_SAMPLED = ("model", "temperature", "top_p", "top_k", "max_tokens")
_PER_COMPLETION = ("inference_logprobs", "completions_text", "truncated", "finish_reasons")
_PER_COMPLETION_OR_NONE = (
    "completion_messages",
    "raw_logprobs",
    "rewards",
    "completion_results",
    "trajectories",
    "episodes",
)
_PER_COMPLETION_SAMPLING = (
    "indices",
    "seeds",
    "policy_versions",
    "request_ids",
    "attempts",
    "seconds",
)
