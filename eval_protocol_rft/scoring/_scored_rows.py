"""A row before and after its completions are scored: one view per completion, which is what the
user's evaluator gets to see; then `rewards` and one `EvaluateResult`, which is what the row says.

Invariant: a view shares nothing mutable with its row or with another view, so an evaluator may
change what it is given. It looks like the row would if that completion were its answer, and holds
no rollout record, so nothing can score it once per completion again. The row changes in one step,
after every completion has its result. Its messages and the other keys of `extra` stay as they are,
and a completion without a score enters no average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, MetricResult, StepOutput

from eval_protocol_rft import record, rollout
from eval_protocol_rft._segments import EpisodeRecord
from eval_protocol_rft._statistics import mean_pass_at_k, powers_of_two
from eval_protocol_rft.record import RecordError, Score
from eval_protocol_rft.rollout import as_message, chat_finish_reason, recorded_answers
from eval_protocol_rft.scoring._evaluator import scored_alive
from eval_protocol_rft.scoring._results import STEP_OUTPUTS

HIDDEN_KEYS = frozenset(
    {
        *record.ARRAY_KEYS,
        "rft_schema",
        "rewards",
        "completion_results",
        "completion_messages",
        "episodes",
    }
)
"""Keys of `extra` that a view has not: token arrays, the record's mark, and earlier scores."""


class _ScoredPart(msgspec.Struct, frozen=True):
    """The part of a rollout record that scoring needs. Reading no more than this leaves the
    token arrays untouched, and rows that were logged without them can be scored."""

    completions_text: list[str]
    finish_reasons: list[str]
    rft_schema: int = record.SCHEMA_VERSION
    sampling: dict[str, Any] | None = None
    """None where only the published keys are there."""
    completion_messages: list[dict[str, Any] | None] | None = None
    episodes: list[EpisodeRecord] | None = None


def rollout_failed(row: EvaluationRow) -> bool:
    """Whether the row's status is one of the errors."""
    return record.is_failure(row.rollout_status.code)


def completion_views(row: EvaluationRow) -> list[EvaluationRow] | None:
    """A view of `row` per completion, in order; None where the row has no rollout record, or has
    one that an earlier rollout left and this one failed to replace.

    A view is the row with the completion as its last message, no evaluation_result, that
    completion's finish reason, and an `extra` that has `completion_index` and `finish_reason` but
    none of `HIDDEN_KEYS`. The other fields are deep copies of the row's. Of an episode it has all
    messages, and `extra["episode"]` with its turns, stop reason, step rewards and metrics; and the
    evaluation_result of one that was scored while its environment was alive.

    Raises:
        RecordError: the record is unreadable, or the row's last message is not its first
            completion.
    """
    extra = row.execution_metadata.extra
    if not extra or rollout_failed(row) or not record.has_record(extra):
        return None
    part = _read(row, extra)
    if part.episodes is not None:
        return _episode_views(row, extra, part.episodes)
    answers = recorded_answers(
        part.completions_text,
        part.completion_messages,
        split_reasoning=_splits_reasoning(row, part),
    )
    messages = [as_message(answer) for answer in answers]
    if messages:
        _check_last_message(row, messages[0])
    template = _template(row, extra)
    return [
        _view(template, index, [message], chat_finish_reason(finish_reason, message.tool_calls))
        for index, (message, finish_reason) in enumerate(
            zip(messages, part.finish_reasons, strict=True)
        )
    ]


def _episode_views(
    row: EvaluationRow, extra: dict[str, Any], episodes: list[EpisodeRecord]
) -> list[EvaluationRow]:
    template = _template(row, extra)
    return [_episode_view(template, index, episode) for index, episode in enumerate(episodes)]


def episode_view(row: EvaluationRow, index: int, episode: EpisodeRecord) -> EvaluationRow:
    """The view of an episode that is not yet on its row."""
    return _episode_view(_template(row, row.execution_metadata.extra or {}), index, episode)


def _episode_view(template: EvaluationRow, index: int, episode: EpisodeRecord) -> EvaluationRow:
    messages = [Message(**message) for message in episode.messages]
    called = messages[-1].tool_calls if messages else None
    last = chat_finish_reason(episode.last_finish_reason, called)
    view = _view(template.model_copy(update={"messages": []}), index, messages, last)
    about = {
        "turns": episode.turns,
        "stop_reason": episode.stop_reason,
        "step_rewards": list(episode.step_rewards),
        "metrics": dict(episode.metrics),
    }
    extra = {**(view.execution_metadata.extra or {}), "episode": about}
    view.execution_metadata.extra = extra
    if (alive := scored_alive(extra)) is not None:
        view.evaluation_result = _result(alive)
    return view


def _result(alive: Mapping[str, Any]) -> EvaluateResult | None:
    """What was said of an episode while its environment was alive; None where it says nothing that
    can be read."""
    try:
        score = msgspec.convert({k: v for k, v in alive.items() if k != "by"}, Score)
        metrics = dict(score.metrics or {})
        steps = metrics.pop(STEP_OUTPUTS, None)
        return EvaluateResult(
            score=score.reward or 0.0,
            is_score_valid=score.reward is not None,
            reason=score.reason,
            metrics={name: MetricResult.model_validate(one) for name, one in metrics.items()},
            error=score.error,
            step_outputs=None if steps is None else [StepOutput.model_validate(s) for s in steps],
        )
    except (msgspec.ValidationError, ValueError, TypeError):
        return None


def _splits_reasoning(row: EvaluationRow, part: _ScoredPart) -> bool:
    """Whether thoughts are apart from content, as in the row's own answer."""
    if part.sampling is not None:
        return bool(part.sampling.get("split_reasoning", True))
    if not row.messages or not part.completions_text:
        return True
    split = rollout.assistant_message(part.completions_text[0], split_reasoning=True)
    return rollout.is_same_answer(row.messages[-1], split)


def _read(row: EvaluationRow, extra: dict[str, Any]) -> _ScoredPart:
    where = f"row {row.input_metadata.row_id}"
    try:
        fields = (
            extra if record.is_marked(extra) else {key: extra[key] for key in record.PUBLISHED_KEYS}
        )
        part = msgspec.convert(fields, _ScoredPart)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: invalid rollout record: {error}") from error
    if part.rft_schema != record.SCHEMA_VERSION:
        raise RecordError(
            f"{where}: rft_schema is {part.rft_schema}, this version reads {record.SCHEMA_VERSION}"
        )
    if len(part.completions_text) != len(part.finish_reasons):
        raise RecordError(
            f"{where}: {len(part.completions_text)} completions_text but "
            f"{len(part.finish_reasons)} finish_reasons"
        )
    if len(part.completion_messages or part.completions_text) != len(part.completions_text):
        raise RecordError(
            f"{where}: {len(part.completions_text)} completions_text but "
            f"{len(part.completion_messages or ())} completion_messages"
        )
    return part


def _check_last_message(row: EvaluationRow, first: Message) -> None:
    """The prompt is everything before the last message, so that one must be the completion."""
    last = row.messages[-1] if row.messages else None
    if last is None or not rollout.is_same_answer(last, first):
        raise RecordError(
            f"row {row.input_metadata.row_id}: its last message is not its completion 0, so the "
            f"prompt cannot be told from the answer: {_shown(last)} against {_shown(first)}; "
            "restore row.messages as the rollout left them"
        )


def _shown(message: Message | None) -> str:
    return "no message" if message is None else f"{message.role} {str(message.content)[:60]!r}"


def _template(row: EvaluationRow, extra: dict[str, Any]) -> EvaluationRow:
    """What the views of a row have in common; it shares everything with the row."""
    visible = {key: value for key, value in extra.items() if key not in HIDDEN_KEYS}
    metadata = row.execution_metadata.model_copy(update={"extra": visible})
    return row.model_copy(
        update={
            "messages": row.messages[:-1],
            "evaluation_result": None,
            "execution_metadata": metadata,
        }
    )


def _view(
    template: EvaluationRow, index: int, messages: list[Message], finish_reason: str
) -> EvaluationRow:
    view = template.model_copy(deep=True)
    view.messages.extend(messages)
    metadata = view.execution_metadata
    metadata.finish_reason = finish_reason
    metadata.tool_call_count = sum(len(message.tool_calls or []) for message in messages)
    metadata.extra = {
        **(metadata.extra or {}),
        "completion_index": index,
        "finish_reason": finish_reason,
    }
    return view


Aggregation = Literal["mean", "first", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """How completions are scored and what a row's own score is."""

    aggregation: Aggregation = "mean"
    """How the row's score comes from its valid scores; `first`: the first completion that has
    one."""
    pass_threshold: float = 1.0
    """A completion passes where its score is at least this."""
    max_concurrency: int = 96
    """Calls of an async evaluator in flight per event loop, over all rows. As many as Eval
    Protocol allows rows in evaluation, so that a judge's load does not grow with n."""

    def __post_init__(self) -> None:
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"aggregation must be one of {get_args(Aggregation)}, got {self.aggregation!r}"
            )
        if not math.isfinite(self.pass_threshold):
            raise ValueError(f"pass_threshold must be finite, got {self.pass_threshold}")
        if self.max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {self.max_concurrency}")


def commit_scores(row: EvaluationRow, results: Sequence[Score], options: ScoringOptions) -> None:
    """Write the results of all completions of `row`, replacing earlier ones."""
    extra = row.execution_metadata.extra or {}
    failed = len(extra.get("failures") or [])
    evaluation_result = summarize(results, failed, options)
    evaluation_result.step_outputs = _steps(results, extra.get("episodes"))
    row.execution_metadata.extra = {
        **extra,
        "rewards": [result.reward for result in results],
        "completion_results": [
            {**msgspec.to_builtins(result), "metrics": result.metrics or {}} for result in results
        ],
    }
    row.evaluation_result = evaluation_result


def commit_failed_rollout(row: EvaluationRow) -> EvaluationRow:
    """Mark the score of a row whose rollout failed as invalid, and say why. Its 0.0 is only there
    because the type wants a float."""
    status = row.rollout_status
    row.evaluation_result = EvaluateResult(
        score=0.0,
        is_score_valid=False,
        reason=f"not judged, because the rollout failed: {status.message}",
    )
    return row


def summarize(results: Sequence[Score], failed: int, options: ScoringOptions) -> EvaluateResult:
    """One result for a row.

    Args:
        results: [G] per completion.
        failed: completions that could not be sampled.

    Returns:
        The aggregate of the valid scores; as metrics the shares of completions that were scored,
        were not, and could not be sampled, with their counts in `data`, the mean, min and max of
        the scores, and pass@k for k = 1, 2, 4, ... up to the number of valid scores, and that
        number itself. Without a valid score it is marked invalid; its score of 0.0 is only there
        because the type wants a float.

    Every metric is in [0, 1]: Eval Protocol's page refuses others, and shows none of its rows then.
    Where the scores themselves are not, their range is told in the reason.
    """
    scores = [result.reward for result in results if result.reward is not None]
    asked = len(results) + failed
    metrics = {
        "completions_scored": _share(len(scores), asked, "have a valid score"),
        "completions_unscored": _share(len(results) - len(scores), asked, "have no valid score"),
        "completions_failed": _share(failed, asked, "could not be sampled"),
    }
    problems = _problems(results, failed)
    if not scores:
        return EvaluateResult(
            score=0.0,
            is_score_valid=False,
            reason=f"no completion has a valid score: {problems or 'there are no completions'}",
            metrics=metrics,
        )
    reason = f"{options.aggregation} of {len(scores)} scored completions"
    if not _in_range(scores):
        reason += f", from {min(scores):g} to {max(scores):g}"
    return EvaluateResult(
        score=_aggregate(scores, options.aggregation),
        reason=f"{reason}; {problems}" if problems else reason,
        metrics=metrics | _score_metrics(scores, options.pass_threshold),
    )


def _steps(
    results: Sequence[Score], episodes: Sequence[Mapping[str, Any]] | None
) -> list[StepOutput] | None:
    """Of the row's own conversation, which is the first completion's: what the evaluator said of
    its steps, or else the rewards that the environment gave."""
    steps = (results[0].metrics or {}).get(STEP_OUTPUTS) if results else None
    if steps:
        try:
            return [StepOutput.model_validate(step) for step in steps]
        except (TypeError, ValueError):
            return None  # a metric that only has the name
    if not episodes:
        return None
    rewards = enumerate(episodes[0].get("step_rewards") or [])
    return [StepOutput(step_index=i, base_reward=r) for i, r in rewards if r is not None] or None


def _aggregate(scores: Sequence[float], aggregation: Aggregation) -> float:
    match aggregation:
        case "mean":
            return math.fsum(scores) / len(scores)
        case "first":
            return scores[0]
        case "max":
            return max(scores)


def _score_metrics(scores: Sequence[float], threshold: float) -> dict[str, MetricResult]:
    n = len(scores)
    passed = sum(score >= threshold for score in scores)
    ks = sorted({n, *powers_of_two(n)})
    why = f"{passed} of {n} scored completions reached {threshold:g}"
    over = f"over {n} scored completions"
    rewards = {
        "reward_mean": _metric(_aggregate(scores, "mean"), over),
        "reward_min": _metric(min(scores), over),
        "reward_max": _metric(max(scores), over),
    }
    return {
        **(rewards if _in_range(scores) else {}),
        **{f"pass@{p.k}": _metric(p.value, why) for p in mean_pass_at_k([n], [passed], ks)},
    }


def _in_range(scores: Sequence[float]) -> bool:
    return min(scores) >= 0.0 and max(scores) <= 1.0


def _share(count: int, of: int, what: str) -> MetricResult:
    return MetricResult(
        score=count / of if of else 0.0,
        reason=f"{count} of {of} completions {what}",
        data={"count": count},
    )


def _metric(score: float, reason: str) -> MetricResult:
    return MetricResult(score=score, reason=reason)


def _problems(results: Sequence[Score], failed: int) -> str:
    """What kept completions from having a score, by way of the first one."""
    unscored = [(i, result) for i, result in enumerate(results) if result.reward is None]
    parts = []
    if unscored:
        index, first = unscored[0]
        parts.append(f"{len(unscored)} unscored, first completion {index}: {first.error}")
    if failed:
        parts.append(f"{failed} could not be sampled")
    return "; ".join(parts)
