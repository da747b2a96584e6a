"""Rollouts of several turns in the record: what an episode's tokens were, and how it went.

Invariant: a segment's arrays have equal length, `loss_mask` is 1 exactly on sampled tokens, and a
logprob stands only there. The first segment of an episode begins with the record's prompt and the
episode's first turn, number for number. What breaks this is told with episode, segment and index.

Pure, and without a Python loop per token unless something is wrong.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, groupby
from typing import Any, TypeVar

import msgspec

from eval_protocol_rft.sampling import LOGPROB_NOISE, LOWEST_LOGPROB, FinishReason, logprob_problem

T = TypeVar("T")


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One contiguous token sequence of an episode. N tokens."""

    tokens: list[int]
    """[N] ids, as they went over the wire and came back."""
    logprobs: list[float]
    """[N] sampling logprobs (nats) of sampled tokens, 0.0 elsewhere."""
    loss_mask: list[int]
    """[N] 1 on sampled tokens, 0 elsewhere."""


class EpisodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How one episode went."""

    turns: int
    """Turns that the policy sampled."""
    stop_reason: str
    """What ended it; "length": its last turn was cut off at max_tokens."""
    finish_reason: FinishReason | None = None
    """Of the last turn. None says that it is "length" exactly where `stop_reason` is; needed where
    another limit than that of the turn cut it off."""
    step_rewards: list[float | None] = []
    """One per turn, in order, as far as the environment was asked; None where it gave none."""
    metrics: dict[str, Any] = {}
    messages: list[dict[str, Any]] = []
    """The whole conversation, the row's own messages included."""
    row_messages: int | None = None
    """How many of them are the row's own; the environment's first ones come behind."""

    @property
    def last_finish_reason(self) -> FinishReason:
        """Of the last turn."""
        return self.finish_reason or ("length" if self.stop_reason == "length" else "stop")


def turn_runs(loss_mask: Iterable[int]) -> Iterator[tuple[bool, int, int]]:
    """(sampled, start, stop) of each run of tokens that were all sampled, or all not. Something is
    always said between two turns, so a run that was sampled is one turn."""
    start = 0
    for sampled, run in groupby(loss_mask):
        stop = start + sum(1 for _ in run)
        yield bool(sampled), start, stop
        start = stop


def episodes_problem(
    trajectories: Sequence[Sequence[SegmentRecord]] | None,
    episodes: Sequence[EpisodeRecord] | None,
    *,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    finish_reasons: Sequence[FinishReason],
) -> str | None:
    """Say what keeps these from being the episodes of a record, or None.

    Args:
        trajectories: [G][S_i] the segments of each episode.
        episodes: [G] how each went.
        prompt_ids: [P] of every first turn.
        completion_ids, logprobs: [G][T_i] what the first turns sampled.
        finish_reasons: [G] of the first turns.
    """
    if trajectories is None and episodes is None:
        return None
    if trajectories is None or episodes is None:
        missing = "trajectories" if trajectories is None else "episodes"
        return f"{missing} is missing: trajectories and episodes come together"
    for name, values in (("trajectories", trajectories), ("episodes", episodes)):
        if len(values) != len(completion_ids):
            return f"{name} has {len(values)} entries for {len(completion_ids)} completions"
    for i, (segments, episode) in enumerate(zip(trajectories, episodes, strict=True)):
        problem = _episode_problem(episode, len(segments), finish_reasons[i])
        if problem:
            return f"episode {i}: {problem}"
        for k, segment in enumerate(segments):
            problem = _segment_problem(segment)
            if problem is None and k == 0:
                problem = _first_turn_problem(segment, prompt_ids, completion_ids[i], logprobs[i])
            if problem:
                return f"episode {i}, segment {k}: {problem}"
    return None


def _episode_problem(episode: EpisodeRecord, segments: int, first: FinishReason) -> str | None:
    if episode.turns < 1:
        return f"turns is {episode.turns}: an episode has at least one"
    if not 1 <= segments <= episode.turns:
        return f"{segments} segments for {episode.turns} turns: a segment holds at least one turn"
    if len(episode.step_rewards) > episode.turns:
        return f"step_rewards has {len(episode.step_rewards)} entries for {episode.turns} turns"
    for turn, reward in enumerate(episode.step_rewards):
        if reward is not None and not math.isfinite(reward):
            return (
                f"step_rewards[{turn}] is {reward!r}: a finite number, or None where there is none"
            )
    last = episode.last_finish_reason
    if episode.stop_reason == "length" and last != "length":
        return 'stop_reason is "length" and the finish_reason of its last turn is "stop"'
    if episode.turns == 1 and last != first:
        return (
            f'its only turn has the finish reason "{first}" in finish_reasons and "{last}" here '
            f'(stop_reason "{episode.stop_reason}"): give the episode its finish_reason'
        )
    return None


def _segment_problem(segment: SegmentRecord) -> str | None:
    tokens, logprobs, mask = segment.tokens, segment.logprobs, segment.loss_mask
    if not len(tokens) == len(logprobs) == len(mask):
        return f"{len(tokens)} tokens, {len(logprobs)} logprobs, loss_mask of {len(mask)}"
    if not set(mask) <= {0, 1}:
        return _at("loss_mask", mask, lambda m: m not in (0, 1), "it must be 0 or 1")
    if 1 not in mask:
        return "loss_mask has no 1: a segment in which nothing was sampled is none; leave it out"
    if mask[0]:
        return "loss_mask[0] is 1: the first token follows nothing, so nothing predicts it"
    if min(tokens) < 0:
        return _at("tokens", tokens, lambda t: t < 0, "not a token id")
    if not (min(logprobs) >= LOWEST_LOGPROB and max(logprobs) <= LOGPROB_NOISE) or any(
        map(math.isnan, logprobs)
    ):
        index = next(i for i, value in enumerate(logprobs) if logprob_problem(value))
        return f"logprobs[{index}] is {logprobs[index]!r}: {logprob_problem(logprobs[index])}"
    if any(compress(logprobs, map(operator.not_, mask))):
        index = next(i for i, (v, m) in enumerate(zip(logprobs, mask, strict=True)) if v and not m)
        return (
            f"logprobs[{index}] is {logprobs[index]!r} where loss_mask is 0: put 0.0 where the "
            "policy sampled nothing"
        )
    return None


def _first_turn_problem(
    segment: SegmentRecord,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    logprobs: Sequence[float],
) -> str | None:
    prompt, stop = len(prompt_ids), len(prompt_ids) + len(completion_ids)
    expected: tuple[tuple[str, list[Any], list[Any]], ...] = (
        ("tokens", segment.tokens, [*prompt_ids, *completion_ids]),
        ("loss_mask", segment.loss_mask, [0] * prompt + [1] * len(completion_ids)),
        # To float32, which is what trains: who keeps arrays of it may write them as they are.
        ("logprobs", _rounded(segment.logprobs[:stop]), _rounded([*[0.0] * prompt, *logprobs])),
    )
    for name, values, wanted in expected:
        if values[:stop] == wanted:
            continue
        index = next(
            (i for i, (a, b) in enumerate(zip(values, wanted, strict=False)) if a != b), len(values)
        )
        found = values[index] if index < len(values) else "missing"
        return (
            f"{name}[{index}] is {found}, and {wanted[index]} in the record's prompt and first "
            "turn, which an episode begins with"
        )
    return None


def _rounded(values: Sequence[float]) -> list[float]:
    return array("f", values).tolist()


def _at(name: str, values: Sequence[T], wrong: Callable[[T], bool], rule: str) -> str:
    index = next(i for i, value in enumerate(values) if wrong(value))
    return f"{name}[{index}] is {values[index]!r}: {rule}"
