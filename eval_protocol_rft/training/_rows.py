"""A rollout record, or the evaluated row that it is on, as what trains.

Invariant: a row is read exactly or refused with its name; a rollout that failed, and a completion
without a score, stay visible as such. An episode of several turns is one trajectory, with one
reward, however many segments it has. Rows are `EvaluationRow` objects or the plain dicts of the
JSONL that Eval Protocol writes; both are read by shape, so Eval Protocol is not imported. The
token data in `extra` may be lists or arrays.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from eval_protocol_rft._segments import Segment
from eval_protocol_rft._segments import TokenBuffer as TokenBuffer
from eval_protocol_rft.record import (
    RecordError,
    RolloutRecord,
    SamplingRecord,
    Score,
    is_failure,
    read_record,
    result_score,
)
from eval_protocol_rft.training._errors import TrainingDataError
from eval_protocol_rft.training._trajectory import PromptGroup, Trajectory, reward_problem


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


def field_of(value: Any, name: str) -> Any:
    """Attribute or key `name`, None where there is neither."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def row_key(row: Row) -> tuple[str | None, str, str | None]:
    """(experiment id, row id, model): the same for every run of a row, and for no other row. A
    groupwise test has the answers of several models to a row in one experiment.

    Raises:
        TrainingDataError: the row has no id.
    """
    asked = field_of(row, "input_metadata")
    row_id = field_of(asked, "row_id")
    if row_id is None:
        raise TrainingDataError(
            "a row has no input_metadata.row_id, so its prompt group is unknown: pass key= with a "
            "function that names the group of a row"
        )
    model = field_of(field_of(asked, "completion_params"), "model")
    return field_of(field_of(row, "execution_metadata"), "experiment_id"), row_id, model


def read_row(row: Row, buffer: TokenBuffer, *, key: Hashable = None) -> PromptGroup:
    """Read the rollout record and the scores of one row: what it has of its prompt group.

    Raises:
        TrainingDataError: no record, an invalid one, no scores at all, or a score that is no
            number; the message names row and completion.
    """
    name = _name(row)
    asked = field_of(row, "input_metadata")
    params = field_of(asked, "completion_params")
    status = field_of(row, "rollout_status")
    if is_failure(field_of(status, "code")):
        n = field_of(params, "n")
        message = str(field_of(status, "message"))
        asked_for = n if isinstance(n, int) else 1
        return PromptGroup(
            key=key, trajectories=(), failed_rows=(message,), asked=asked_for, name=name
        )
    extra = field_of(field_of(row, "execution_metadata"), "extra") or {}
    record, segments = read_named(name, extra, params, buffer)
    messages = _asked_messages(row, record)
    return group_of(
        record,
        segments,
        _rewards(row, record, name),
        key=key,
        name=name,
        row_id=field_of(asked, "row_id"),
        question=question_of(messages, field_of(row, "tools"), record.sampling),
    )


def read_named(
    name: str,
    extra: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    buffer: TokenBuffer,
) -> tuple[RolloutRecord, list[tuple[Segment, ...]]]:
    """`read_record`, but for token data that nothing trains on. What is wrong is a
    `TrainingDataError` that begins with `name`."""
    try:
        trained = {key: value for key, value in extra.items() if key not in _NOT_TRAINED}
        return read_record(trained, params, buffer)
    except RecordError as error:
        place = str(error)
        joint = ", " if place.startswith("completion ") else ": "
        raise TrainingDataError(name + joint + place) from error


def group_of(
    record: RolloutRecord,
    segments: Sequence[tuple[Segment, ...]],
    rewards: Sequence[float | None],
    *,
    key: Hashable,
    name: str,
    row_id: str | None,
    question: tuple[Any, ...] | None,
) -> PromptGroup:
    """What a record has of its prompt group.

    Args:
        record: what was rolled out.
        segments: [G] of each completion, as `read_record` gives them.
        rewards: [G]
        key: of the group.
        name: how messages call the record.
        row_id: of its row.
        question: see `question_of`.

    Raises:
        TrainingDataError: a reward is no number.
    """
    sampling, firsts = record.sampling, record.sampling.first_policy_versions
    results: Sequence[Score | None] = record.completion_results or [None] * len(record)
    finish_reasons = record.last_finish_reasons
    bias = _bias(sampling)
    trajectories = []
    for i, ((first, *more), reward) in enumerate(zip(segments, rewards, strict=True)):
        if problem := reward_problem(reward):
            raise TrainingDataError(f"{name}, completion {sampling.indices[i]}: {problem}")
        trajectories.append(
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
        )
    return PromptGroup(
        key=key,
        trajectories=tuple(trajectories),
        failures=tuple(record.failures),
        cancelled=len(sampling.cancelled),
        tokenizer=sampling.tokenizer,
        asked=sampling.n,
        name=name,
        question=question,
    )


def question_of(messages: Sequence[Any], tools: Any, sampling: SamplingRecord) -> tuple[Any, ...]:
    """What a prompt is made of: the same question may be rendered differently another day.

    Args:
        messages: those that were there before anything was sampled.
        tools: that were rendered into the prompt.
        sampling: says by which chat template.
    """
    return messages, tools, sampling.chat_template_hash, sampling.chat_template_kwargs


def same_question(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """Whether both ask the same by the same template; no messages are no question."""
    if not one or not other or not one[0]:
        return False
    messages, tools, *template = one
    others, other_tools, *other_template = other
    return (
        template == other_template
        and plain(tools) == plain(other_tools)
        and list(map(plain_message, messages)) == list(map(plain_message, others))
    )


def _score_error(result: Score | None) -> str | None:
    parts = [] if result is None else [part for part in (result.error, result.reason) if part]
    return ": ".join(dict.fromkeys(parts)) or None


def _asked_messages(row: Row, record: RolloutRecord) -> Sequence[Any]:
    """The row's messages without the answer, or the episode, that its rollout put behind them."""
    messages: Sequence[Any] = field_of(row, "messages") or []
    if record.episodes:
        return messages[: record.episodes[0].row_messages]
    answered = len(messages) and field_of(messages[-1], "role") == "assistant"
    return messages[:-1] if answered else messages


_NOT_TRAINED = frozenset({"raw_logprobs", "token_turn_traces", "assistant_turn_payloads"})
"""Keys of `extra` that hold token data and that no datum is made of."""
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
    return rewards


def _components(result: Score | None) -> dict[str, float | None]:
    """The metrics that are scores: a number, or an object with `score` and `is_score_valid`."""
    if result is None or not result.metrics:
        return {}
    scores: dict[str, float | None] = {}
    for name, metric in result.metrics.items():
        score = field_of(metric, "score") if isinstance(metric, Mapping) else metric
        if isinstance(metric, Mapping) and metric.get("is_score_valid") is False:
            score = None
        if reward_problem(score) is None:
            scores[name] = score
    return scores


def _bias(sampling: SamplingRecord) -> str | None:
    if sampling.temperature == 0:
        return "temperature=0: greedy completions are no samples"
    if sampling.support_truncated:
        return f"truncated support (top_p={sampling.top_p}, top_k={sampling.top_k})"
    return None
