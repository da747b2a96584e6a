"""What was sampled turn by turn: how an episode went, and its turns as public readers have them.

Invariant: a turn's ids and logprobs are those that went over the wire. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec

from eval_protocol_rft._segments import Segment
from eval_protocol_rft.sampling import FinishReason


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


def episode_problem(episode: EpisodeRecord, segments: int, first: FinishReason) -> str | None:
    """Say what keeps `episode` from being one of so many segments, whose first turn ended for the
    reason `first`; or None."""
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


def turn_runs(loss_mask: Iterable[float]) -> Iterator[tuple[bool, int, int]]:
    """(sampled, start, stop) of each run of tokens that were all sampled, or all not. Something is
    always said between two turns, so a run that was sampled is one turn."""
    start = 0
    for sampled, run in groupby(loss_mask):
        stop = start + sum(1 for _ in run)
        yield bool(sampled), start, stop
        start = stop


def turn_trace(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
) -> dict[str, Any]:
    """One turn as the public fw-ai/cookbook adapter reads it: an entry of `token_turn_traces`."""
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "completion_logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def episode_traces(segments: Sequence[Segment], last: FinishReason) -> list[dict[str, Any]]:
    """`token_turn_traces` of an episode: each run of sampled tokens, behind all of its segment
    before it. `last` is the finish reason of its last turn."""
    traces = []
    for segment in segments:
        tokens, logprobs = segment.tokens.tolist(), segment.logprobs.tolist()
        for sampled, start, stop in turn_runs(segment.loss_mask.tolist()):
            if sampled:
                trace = turn_trace(tokens[:start], tokens[start:stop], logprobs[start:stop], "stop")
                traces.append(trace)
    traces[-1]["finish_reason"] = last
    return traces


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
