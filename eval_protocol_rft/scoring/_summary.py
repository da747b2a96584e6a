"""From a result per completion to what the row says: `rewards` and one `EvaluateResult`.

Invariant: the row changes in one step, after every completion has its result. Its messages and the
other keys of `extra` stay as they are, and a completion without a score enters no average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
from eval_protocol.models import EvaluateResult, EvaluationRow, MetricResult, StepOutput

from eval_protocol_rft._statistics import mean_pass_at_k, powers_of_two
from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring._results import STEP_OUTPUTS

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
