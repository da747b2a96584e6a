"""One evaluated row into trajectories: what the rollout record holds, checked, as arrays.

Invariant: a row is read exactly or refused with its name; a rollout that failed, and a completion
without a score, stay visible as such. An episode of several turns is one trajectory, with one
reward, however many segments it has. Rows are `EvaluationRow` objects or the plain dicts of the
JSONL that Eval Protocol writes; both are read by shape, so Eval Protocol is not imported. The
token data in `extra` may be lists or arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from eval_protocol_rft.record import (
    ARRAY_KEYS,
    CompletionResult,
    RecordError,
    RolloutRecord,
    SamplingRecord,
    result_score,
)
from eval_protocol_rft.sampling import Failure
from eval_protocol_rft.training._buffers import TokenBuffer, read_segments, stand_ins
from eval_protocol_rft.training._errors import TrainingDataError
from eval_protocol_rft.training._trajectory import Trajectory, reward_problem

_INTERNAL = 13
"""The one status code that Eval Protocol counts as a failed rollout."""


class InputMetadata(Protocol):
    @property
    def row_id(self) -> str | None: ...
    @property
    def completion_params(self) -> Mapping[str, Any]: ...


class ExecutionMetadata(Protocol):
    @property
    def experiment_id(self) -> str | None: ...
    @property
    def extra(self) -> dict[str, Any] | None: ...


class EvaluatedRow(Protocol):
    """What is read of an `EvaluationRow`."""

    @property
    def input_metadata(self) -> InputMetadata: ...
    @property
    def execution_metadata(self) -> ExecutionMetadata: ...
    @property
    def rollout_status(self) -> Any: ...
    @property
    def evaluation_result(self) -> Any: ...


Row = EvaluatedRow | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowRollout:
    """What one row's rollout left."""

    name: str
    """How messages call the row."""
    trajectories: tuple[Trajectory, ...]
    failures: tuple[Failure, ...]
    failed: str | None
    """What ended the whole rollout; then there are no trajectories."""
    tokenizer: str | None
    asked: int
    """Completions asked for, without the surplus of over-sampling."""
    cancelled: int = 0
    """The surplus that over-sampling cancelled."""
    question: Question | None = None
    """What was rendered into its prompt."""


class Question(NamedTuple):
    """What a prompt was made of: the same question may be rendered differently another day."""

    messages: Sequence[Any]
    """Those that were there before anything was sampled."""
    tools: Any
    chat_template_hash: str | None
    chat_template_kwargs: Mapping[str, Any]

    def same(self, other: Question) -> bool:
        """Whether both ask the same by the same template; no messages are no question."""
        return bool(self.messages) and (
            self.chat_template_hash == other.chat_template_hash
            and self.chat_template_kwargs == other.chat_template_kwargs
            and plain(self.tools) == plain(other.tools)
            and list(map(plain_message, self.messages)) == list(map(plain_message, other.messages))
        )


def field_of(value: Any, name: str) -> Any:
    """Attribute or key `name`, None where there is neither."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def row_key(row: Row) -> tuple[str | None, str]:
    """(experiment id, row id): the same for every run of a row, and for no other row.

    Raises:
        TrainingDataError: the row has no id.
    """
    row_id = field_of(field_of(row, "input_metadata"), "row_id")
    if row_id is None:
        raise TrainingDataError(
            "a row has no input_metadata.row_id, so its prompt group is unknown: pass key= with a "
            "function that names the group of a row"
        )
    return field_of(field_of(row, "execution_metadata"), "experiment_id"), row_id


def read_row(row: Row, buffer: TokenBuffer) -> RowRollout:
    """Read the rollout record and the scores of one row.

    Raises:
        TrainingDataError: no record, an invalid one, no scores at all, or a score that is no
            number; the message names row and completion.
    """
    name = _name(row)
    status = field_of(row, "rollout_status")
    if field_of(status, "code") == _INTERNAL:
        return RowRollout(name, (), (), str(field_of(status, "message")), None, _asked(row))
    extra = field_of(field_of(row, "execution_metadata"), "extra")
    params = field_of(field_of(row, "input_metadata"), "completion_params")
    try:
        record = _without_tokens(extra, params)
    except RecordError as error:
        raise TrainingDataError(f"{name}: {error}") from error
    sampling, firsts = record.sampling, record.sampling.first_policy_versions
    results: Sequence[CompletionResult | None] = record.completion_results or [None] * len(record)
    finish_reasons = record.finish_reasons
    if record.episodes is not None:
        finish_reasons = [episode.last_finish_reason for episode in record.episodes]
    row_id = field_of(field_of(row, "input_metadata"), "row_id")
    bias = _bias(sampling)
    names = [f"{name}, completion {index}" for index in sampling.indices]
    segments = read_segments(extra, buffer, row=name, names=names)
    trajectories = tuple(
        Trajectory(
            tokens=first.tokens,
            logprobs=first.logprobs,
            loss_mask=first.loss_mask,
            more=tuple(more),
            reward=reward,
            score_error=_score_error(results[i]) if reward is None else None,
            components=_components(results[i]),
            finish_reason=finish_reasons[i],
            policy_version=sampling.policy_versions[i],
            first_policy_version=firsts[i] if firsts else None,
            row_id=row_id,
            completion=sampling.indices[i],
            bias=bias,
            prompt_length=first.prompt_length,
            num_sampled=first.num_sampled,
        )
        for i, ((first, *more), reward) in enumerate(
            zip(segments, _rewards(row, record, name), strict=True)
        )
    )
    return RowRollout(
        name,
        trajectories,
        tuple(record.failures),
        None,
        sampling.tokenizer,
        sampling.n,
        len(sampling.cancelled),
        Question(
            _asked_messages(row, record),
            field_of(row, "tools"),
            sampling.chat_template_hash,
            sampling.chat_template_kwargs,
        ),
    )


def _score_error(result: CompletionResult | None) -> str | None:
    parts = [] if result is None else [part for part in (result.error, result.reason) if part]
    return ": ".join(dict.fromkeys(parts)) or None


def _asked_messages(row: Row, record: RolloutRecord) -> Sequence[Any]:
    """The row's messages without the answer, or the episode, that its rollout put behind them."""
    messages: Sequence[Any] = field_of(row, "messages") or []
    if record.episodes:
        return messages[: record.episodes[0].row_messages]
    answered = len(messages) and field_of(messages[-1], "role") == "assistant"
    return messages[:-1] if answered else messages


_MESSAGE_KEYS = (
    "role",
    "content",
    "reasoning_content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
)


def plain_message(message: Any) -> dict[str, Any]:
    """A message of Eval Protocol, or its JSON, as plain JSON without empty fields."""
    fields = {name: field_of(message, name) for name in _MESSAGE_KEYS}
    return {name: plain(value) for name, value in fields.items() if value is not None}


def plain(value: Any) -> Any:
    """Plain JSON of what Eval Protocol's models hold, without their empty fields."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _name(row: Row) -> str:
    row_id = field_of(field_of(row, "input_metadata"), "row_id")
    extra = field_of(field_of(row, "execution_metadata"), "extra") or {}
    run = extra.get("run_index")
    return f"row {row_id!r}" + (f", run {run}" if run is not None else "")


def _asked(row: Row) -> int:
    """What a row without a record asked for, as its completion params say."""
    params = field_of(field_of(row, "input_metadata"), "completion_params")
    n = field_of(params, "n")
    return n if isinstance(n, int) else 1


def _without_tokens(
    extra: Mapping[str, Any] | None, params: Mapping[str, Any] | None
) -> RolloutRecord:
    """The record with stand-ins for the token data: everything else in it is validated as always,
    and the tokens, which `read_segments` checks, are not copied on the way."""
    without: dict[str, Any] = {}
    if extra:
        for key in ("prompt_ids", "completion_ids", "inference_logprobs"):
            if not isinstance(extra.get(key), Sized):
                return RolloutRecord.from_extra(extra)  # which says what is missing
        without = {
            "prompt_ids": [0],
            "completion_ids": [[0]] * len(extra["completion_ids"]),
            "inference_logprobs": [[0.0]] * len(extra["inference_logprobs"]),
        }
        if extra.get("trajectories") is not None:
            segments = stand_ins(extra["trajectories"])
            if segments is None:
                return RolloutRecord.from_extra(extra)  # likewise
            without["trajectories"] = segments
    rest = {key: value for key, value in (extra or {}).items() if key not in ARRAY_KEYS}
    return RolloutRecord.from_extra({**rest, **without}, params)


def _rewards(row: Row, record: RolloutRecord, name: str) -> list[float | None]:
    """[G] one per completion; a row of one completion may carry it as its evaluation result."""
    rewards = record.rewards
    if rewards is None:
        result = field_of(row, "evaluation_result")
        if result is None or len(record) != 1:
            raise TrainingDataError(
                f"{name}: {len(record)} completions without rewards. Put @score_each_completion "
                "under @evaluation_test, or score the rows with score_rows()"
            )
        rewards = [result_score(result)]
    for index, reward in zip(record.sampling.indices, rewards, strict=True):
        problem = reward_problem(reward)
        if problem:
            raise TrainingDataError(f"{name}, completion {index}: {problem}")
    return rewards


def _components(result: CompletionResult | None) -> dict[str, float | None]:
    """The metrics that are scores: a number, or an object with `score` and `is_score_valid`."""
    if result is None or not result.metrics:
        return {}
    found: dict[str, float | None] = {}
    for name, metric in result.metrics.items():
        score = field_of(metric, "score") if isinstance(metric, Mapping) else metric
        if isinstance(metric, Mapping) and metric.get("is_score_valid") is False:
            score = None
        if reward_problem(score) is None:
            found[name] = score
    return found


def _bias(sampling: SamplingRecord) -> str | None:
    if sampling.temperature == 0:
        return "temperature=0: greedy completions are no samples"
    if sampling.support_truncated:
        return f"truncated support (top_p={sampling.top_p}, top_k={sampling.top_k})"
    return None
