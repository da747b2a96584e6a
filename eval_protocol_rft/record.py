"""The contract in `execution_metadata.extra`: what a rollout leaves on a row for a trainer.

Invariant: plain JSON, and every per-completion list has the same length and order. A record that
breaks this cannot be built or read: `RecordError` names the field and the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal

import msgspec

from eval_protocol_rft._episode_record import EpisodeRecord, SegmentRecord, episodes_problem
from eval_protocol_rft.sampling import Failure, FinishReason, token_data_problem

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


class RecordError(ValueError):
    """`extra` holds no rollout record, or one that contradicts itself."""


class SamplingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the completions were sampled. Lists are per surviving completion."""

    model: str | None = None
    """None, as the four below, where a row that another program wrote does not say."""
    tokenizer: str | None = None
    chat_template_hash: str | None = None
    """First 16 hex digits of the SHA-256 of the chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the template was given beside the conversation: `reasoning_effort`, ..."""
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
    logprobs: Literal["sampling"] = "sampling"
    """What `inference_logprobs` holds: the values the sampler drew with."""
    support_truncated: bool = False
    """True where top_p, top_k or another setting kept part of the vocabulary from being drawn."""
    split_reasoning: bool = True
    """True where thinking goes to `Message.reasoning_content`."""
    other: dict[str, Any] = {}
    """Further request fields that were sent."""


class TokenTurnTrace(msgspec.Struct, frozen=True, kw_only=True):
    """One turn as the public fw-ai/cookbook adapter reads it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_logprobs: list[float]
    finish_reason: str


class AssistantTurnPayload(msgspec.Struct, frozen=True, kw_only=True):
    """What was sampled for one message of the assistant, as public converters read it."""

    assistant_turn_index: int
    """Which of the row's assistant messages it is, from 0; those of the prompt count."""
    completion_ids: list[int]
    completion_logprobs: list[float]


class CompletionResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the evaluator said of one completion. `score` is None where it said nothing valid."""

    score: float | None
    reason: str | None = None
    metrics: dict[str, Any] = {}
    error: str | None = None


class RolloutRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """All completions of one row, exact to the token. G completions, T_i tokens each.

    Where rollouts have several turns, a completion is the first turn of its episode, and
    `trajectories` and `episodes` hold the whole of it; rewards are the episode's.
    """

    prompt_ids: list[int]
    """[P] ids that went to the sampler."""
    completion_ids: list[list[int]]
    """[G][T_i] sampled ids, the sampled end-of-turn token included."""
    inference_logprobs: list[list[float]]
    """[G][T_i] sampling logprobs, nats."""
    completions_text: list[str]
    """[G] decoded from the ids, without the end-of-turn token and without a stop string."""
    truncated: list[bool]
    finish_reasons: list[FinishReason]
    """[G] as the sampler said it."""
    sampling: SamplingRecord
    completion_messages: list[dict[str, Any] | None] | None = None
    """[G] the assistant's message (content, `reasoning_content`, `tool_calls`), read when the
    completion came; None where it is what `prompts.answer_fields` reads out of the text. Left out
    where that is so of all of them."""
    failures: list[Failure] = []
    """Completions that could not be had, each with its place among those asked for."""
    raw_logprobs: list[list[float] | None] | None = None
    token_turn_traces: list[TokenTurnTrace] = []
    assistant_turn_payloads: list[AssistantTurnPayload] = []
    """The same turns by the row's assistant messages, without their prompts."""
    trajectories: list[list[SegmentRecord]] | None = None
    """[G][S_i] the segments of each episode, in order; None for rollouts of one turn."""
    episodes: list[EpisodeRecord] | None = None
    """[G] how each episode went; there exactly where `trajectories` is."""
    rewards: list[float | None] | None = None
    """[G] after scoring; None where a completion has no valid score, which is not 0.0."""
    completion_results: list[CompletionResult] | None = None
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
        return [sum(sum(s.loss_mask) for s in segments) for segments in self.trajectories]

    @property
    def ends_truncated(self) -> list[bool]:
        """[G] whether each completion was cut off; of an episode, its last turn."""
        if self.episodes is None:
            return self.truncated
        return [episode.last_finish_reason == "length" for episode in self.episodes]

    def _problem(self) -> str | None:
        if self.rft_schema != SCHEMA_VERSION:
            return f"rft_schema is {self.rft_schema}, this version reads {SCHEMA_VERSION}"
        if not self.prompt_ids:
            return "prompt_ids is empty"
        if min(self.prompt_ids) < 0:
            index = next(i for i, token in enumerate(self.prompt_ids) if token < 0)
            return f"prompt_ids[{index}] is {self.prompt_ids[index]}: not a token id"
        size = len(self.completion_ids)
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
        for i, (ids, logprobs) in enumerate(
            zip(self.completion_ids, self.inference_logprobs, strict=True)
        ):
            raw = self.raw_logprobs[i] if self.raw_logprobs is not None else None
            problem = token_data_problem(ids, logprobs, raw)
            if problem:
                return f"completion {i}: {problem}"
        return episodes_problem(
            self.trajectories,
            self.episodes,
            prompt_ids=self.prompt_ids,
            completion_ids=self.completion_ids,
            logprobs=self.inference_logprobs,
            finish_reasons=self.finish_reasons,
        )

    def to_extra(self) -> dict[str, Any]:
        """The record as plain JSON values, to be merged into `execution_metadata.extra`. Keys that
        do not apply (no scores yet, no raw logprobs, one turn) are left out.
        """
        values: dict[str, Any] = msgspec.to_builtins(self)
        return {key: value for key, value in values.items() if value is not None}

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
        if not has_record(extra):
            raise RecordError(
                "no rollout record in execution_metadata.extra: was the row produced by "
                "FireworksTrainingRolloutProcessor, and did its rollout succeed?"
            )
        assert extra is not None  # noqa: S101 - it has a record
        try:
            return msgspec.convert(extra if is_marked(extra) else _marked(extra, params), cls)
        except msgspec.ValidationError as error:
            raise RecordError(f"invalid rollout record: {error}") from error


def has_record(extra: Mapping[str, Any] | None) -> bool:
    """Whether there is a rollout record in `extra`: ours, or the published keys alone."""
    return extra is not None and (
        is_marked(extra) or all(extra.get(k) is not None for k in PUBLISHED_KEYS)
    )


def is_marked(extra: Mapping[str, Any]) -> bool:
    """Whether the record in `extra` is one of ours, with all that belongs to it."""
    return "rft_schema" in extra


def result_score(result: Any) -> float | None:
    """The score of an `evaluation_result`, an object or its JSON; None where there is no valid
    one. It is the reward of a row's only completion where the record has no rewards."""

    def field(name: str) -> Any:
        return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)

    return None if field("is_score_valid") is False else field("score")


def turn_payloads(
    traces: Sequence[Mapping[str, Any]], messages: Sequence[Any]
) -> list[dict[str, Any]]:
    """`assistant_turn_payloads` of turns whose answers are the last assistant messages of a row.

    Args:
        traces: the turns, in order, as in `token_turn_traces`.
        messages: of the row, as objects or as JSON.
    """
    roles = [m.get("role") if isinstance(m, Mapping) else m.role for m in messages]
    first = max(roles.count("assistant") - len(traces), 0)
    return [
        {
            "assistant_turn_index": index,
            "completion_ids": trace["completion_ids"],
            "completion_logprobs": trace["completion_logprobs"],
        }
        for index, trace in enumerate(traces, start=first)
    ]


def _marked(extra: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The published keys, and what is known beside them, as a record of ours."""
    size = len(extra["completion_ids"]) if isinstance(extra["completion_ids"], Sized) else 0
    nothing: list[None] = [None] * size
    own = {key: extra[key] for key in (*PUBLISHED_KEYS, *_BESIDE) if key in extra}
    sampling = {
        **{key: (params or {}).get(key) for key in _HOW_SAMPLED},
        "n": size,
        "indices": list(range(size)),
        "seeds": nothing,
        "policy_versions": nothing,
        "request_ids": nothing,
        "attempts": [1] * size,
        "seconds": [0.0] * size,
    }
    top_p, top_k = sampling["top_p"], sampling["top_k"]
    sampling["support_truncated"] = top_p not in (None, 1) or top_k not in (None, 0, -1)
    return {**own, "rft_schema": SCHEMA_VERSION, "sampling": sampling}


_BESIDE = ("rewards", "completion_results", "raw_logprobs")
_HOW_SAMPLED = ("model", "temperature", "top_p", "top_k", "max_tokens")
_PER_COMPLETION = ("inference_logprobs", "completions_text", "truncated", "finish_reasons")
_PER_COMPLETION_OR_NONE = ("completion_messages", "raw_logprobs", "rewards", "completion_results")
_PER_COMPLETION_SAMPLING = (
    "indices",
    "seeds",
    "policy_versions",
    "request_ids",
    "attempts",
    "seconds",
)
