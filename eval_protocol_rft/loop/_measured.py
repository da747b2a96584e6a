"""What a small run took, for the plan of a large one: completions, tokens, seconds.

Invariant: pure, and counted, not guessed: what is not known is None.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.training import PromptGroup, Trajectory


class PlanError(EvalProtocolRftError, ValueError):
    """Nothing can be planned from this."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per completion."""

    mean: float
    deviation: float | None = None
    """Of single completions (n - 1); None where it is not known, or there is one."""
    error: float | None = None
    """Standard error of the mean. Completions of one prompt are alike, so it is that of the means
    of prompts; None with fewer than two prompts."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a small run took."""

    source: str
    prompts: int
    completions: int
    """That came back."""
    failed: int = 0
    truncated: int = 0
    tokens_in: Spread | None = None
    """Prompt tokens that requests for one completion send, over all its turns."""
    tokens_out: Spread
    """Sampled tokens."""
    tokens_trained: Spread | None = None
    """Tokens that the trainer reads: prompt and completion, or all segments of an episode."""
    compared: int = 0
    """Prompts of which at least two completions are scored, and ..."""
    with_gradient: int = 0
    """... those of them that are not all scored alike."""
    seconds: float | None = None
    """Wall-clock of sampling and scoring it."""
    step_seconds: float | None = None
    """Mean seconds of the trainer per step, where it trained."""


def _spread(groups: Sequence[Sequence[int]]) -> Spread:
    """Of values by prompt."""
    values = [value for group in groups for value in group]
    means = [statistics.fmean(group) for group in groups if group]
    return Spread(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        error=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
    )


def tokens_sent(trajectory: Trajectory) -> int:
    """Prompt tokens of all requests that one completion, or the turns of an episode, took: before
    each turn the whole conversation is sent."""
    total = 0
    for segment in trajectory.segments:
        sampled = np.concatenate([[0.0], segment.loss_mask])
        total += int(np.flatnonzero(np.diff(sampled) > 0).sum())
    return total


def measure_groups(
    groups: Iterable[PromptGroup], *, source: str, seconds: float | None = None
) -> Measured:
    """What these groups took.

    Args:
        groups: sampled, scored or not.
        source: what they are, for the plan.
        seconds: wall-clock that they took.

    Raises:
        PlanError: no completion came back.
    """
    sent, sampled, read = ([] for _ in range(3))
    prompts = failed = truncated = compared = with_gradient = 0
    why = "there are no rows"
    for group in groups:
        prompts += 1
        failed += len(group.failures) + len(group.failed_rows)
        why = next(iter([*group.failed_rows, *(f.message for f in group.failures)]), why)
        truncated += sum(t.truncated for t in group.trajectories)
        sent.append([tokens_sent(t) for t in group.trajectories])
        sampled.append([t.total_sampled for t in group.trajectories])
        read.append([sum(len(s.tokens) for s in t.segments) for t in group.trajectories])
        rewards = [t.reward for t in group.trajectories if t.reward is not None]
        compared += len(rewards) > 1
        with_gradient += len(set(rewards)) > 1
    completions = sum(map(len, sampled))
    if not completions:
        raise PlanError(f"{source}: no completion came back: {why}")
    return Measured(
        source=source,
        prompts=prompts,
        completions=completions,
        failed=failed,
        truncated=truncated,
        tokens_in=_spread(sent),
        tokens_out=_spread(sampled),
        tokens_trained=_spread(read),
        compared=compared,
        with_gradient=with_gradient,
        seconds=seconds,
    )


def measure_run(lines: Sequence[Mapping[str, Any]], *, source: str) -> Measured:
    """What a run of `train` took, by its `metrics.jsonl`.

    Raises:
        PlanError: it took no step.
    """
    steps = [line for line in lines if line.get("kind") == "step"]
    completions = sum(line["completions"] for line in steps)
    if not completions:
        raise PlanError(f"{source}: the run took no step, so there is nothing to plan from")
    sampled = sum(line["completion_tokens_mean"] * line["completions"] for line in steps)
    prompts = sum(line["groups"] for line in steps)
    trainer = ("batch", "train", "publish")
    seconds = [sum(line["seconds"][name] for name in trainer) for line in steps]
    return Measured(
        source=source,
        prompts=prompts,
        completions=completions,
        truncated=sum(line["truncated"] for line in steps),
        tokens_out=Spread(mean=sampled / completions),
        compared=prompts,
        with_gradient=sum(line["groups_trained"] for line in steps),
        step_seconds=statistics.fmean(seconds),
    )
