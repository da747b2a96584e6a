"""What a session comes to: its tree of turns as the segments of one trajectory, and all that the
record says of it.

Invariant: under `first` every sampled token is trained once, in the first branch that has it and
behind exactly the ids it was sampled behind; further branches have it as context. Under `each` it
is trained in every branch; under `longest` one branch alone is trained. The record says which, and
holds all that a client changed and that was not honoured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from eval_protocol_rft import sampling
from eval_protocol_rft._segments import EpisodeRecord, Segment
from eval_protocol_rft.episodes._rendering import Rewrite
from eval_protocol_rft.episodes._turns import Turn, segments_of, with_versions
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall
from eval_protocol_rft.episodes.gateway._settings import Asked, Departure, Shared
from eval_protocol_rft.episodes.gateway._tree import Edit, Node, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What became of a session."""

    segments: list[Segment]
    """Empty where nothing was sampled."""
    record: EpisodeRecord
    first: sampling.Survivor | None
    """The first turn that is trained, with the attempts of all calls; None where there is none."""
    first_prompt: sampling.TokenIds
    path: list[Turn]
    """The conversation of the last call."""
    tools: Sequence[dict[str, Any]] | None
    """Of that conversation."""
    sent_tokens: int
    """Of all calls, each with its whole prompt."""
    sampled_tokens: int
    sampled_with: Sequence[sampling.SamplingParams]
    """With which calls were sampled that draw from another distribution, each once."""
    failure: sampling.Failure | None
    """A call that got no completion, and was not answered later: what the agent did then says
    nothing of the policy."""


def branches_of(turns: Sequence[Turn]) -> list[list[Turn]]:
    """[B] the paths to the turns that nothing was sampled behind: the branch that began first
    stands first, as in a walk through the tree.

    Args:
        turns: all of a session, in the order in which they were sampled.
    """
    order = {id(turn): number for number, turn in enumerate(turns)}
    behind = {id(turn.prompt.behind) for turn in turns}
    paths = [turn.path() for turn in turns if id(turn) not in behind]
    return sorted(paths, key=lambda path: [order[id(turn)] for turn in path])


def trained_branches(turns: Sequence[Turn], shared: Shared) -> list[list[Turn]]:
    """[B] the branches that are trained: all, or the one with the most sampled tokens."""
    branches = branches_of(turns)
    if shared == "longest" and branches:
        return [max(branches, key=_sampled)]
    return branches


def segments_in(branches: Sequence[Sequence[Turn]], shared: Shared) -> list[Segment]:
    """The segments of a trajectory, in the order of its branches.

    Args:
        branches: as `trained_branches` gives them.
        shared: `first` or `longest`: what an earlier branch has trained is context in a later one;
            `each`: it is trained again.
    """
    segments: list[Segment] = []
    trained: set[int] = set()
    for path in branches:
        done = frozenset() if shared == "each" else frozenset(trained)
        segments += segments_of(path, lambda turn, done=done: id(turn) not in done)  # type: ignore[misc]
        trained.update(map(id, path))
    return segments


def _sampled(path: Sequence[Turn]) -> int:
    return sum(len(turn.completion.token_ids) for turn in path)


class SessionLog:
    """What the calls of a session used up, asked for and came to."""

    def __init__(self) -> None:
        self.calls = self.bytes = self.tokens = self.sent = 0
        """That were made; of all requests; sampled and sent anew; sent, each prompt whole."""
        self.departures: Counter[bytes] = Counter()
        """As JSON."""
        self.answered_at: dict[int, float] = {}
        """By the turn, Unix seconds."""
        self._began = sampling.sampling_time()
        self._attempts = 0
        self._causes: list[str] = []
        self._edits: list[Edit] = []
        self._notes: dict[str, None] = {}
        self._ignored: dict[str, None] = {}
        """Fields of requests that change no token."""
        self._sampled_with: dict[str, sampling.SamplingParams] = {}
        self._survivors: dict[int, sampling.Survivor] = {}
        """By the turn, as the next two."""
        self._tools: dict[int, list[dict[str, Any]] | None] = {}
        self._rewards: dict[int, float] = {}

    def sampled(self, params: sampling.SamplingParams) -> None:
        """Completions were drawn with `params`."""
        drawn_with = params.temperature, params.top_p, params.top_k, params.extra
        self._sampled_with.setdefault(repr(drawn_with), params)

    def answered(
        self,
        turn: Turn,
        survivor: sampling.Survivor,
        call: ModelCall,
        asked: Asked,
        place: Place,
    ) -> None:
        """A turn was sampled. What its call asked for or said otherwise is noted once, for any
        number of answers."""
        self.tokens += len(turn.completion.token_ids)
        self._attempts += survivor.attempts
        self._causes += survivor.causes
        self._survivors[id(turn)] = survivor
        self._tools[id(turn)] = call.tools
        self.answered_at[id(turn)] = time.time()
        self.departures.update(msgspec.json.encode(one) for one in asked.departures)
        self._notes.update(dict.fromkeys(place.notes))
        self._ignored.update(dict.fromkeys(call.ignored))
        self._edits += place.edits
        asked.departures.clear()
        place.edits.clear()

    def rate(self, turn: Turn | None, value: float) -> None:
        """A turn was worth so much.

        Raises:
            CallError: there is no such turn, or the value is no finite number.
        """
        if turn is None:
            raise CallError("there is no such answer in this session", status=404, param="id")
        if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
            raise CallError(f"a reward is a finite number, not {value!r}", param="reward")
        self._rewards[id(turn)] = float(value)

    def tools_of(self, turn: Turn) -> list[dict[str, Any]] | None:
        """That the turn's call offered."""
        return self._tools[id(turn)]

    def record(
        self,
        turns: Sequence[Turn],
        conversation: Sequence[Node],
        *,
        shared: Shared,
        stop_reason: str,
        undelivered: int,
        failure: sampling.Failure | None,
    ) -> SessionRecord:
        """The session as one trajectory.

        Args:
            turns: all of it, in the order in which they were sampled.
            conversation: of the last call that was answered, with its answer.
            shared: see `segments_in`.
            stop_reason: what ended it.
            undelivered: answers that no client had whole.
            failure: of a call that was not answered later.
        """
        branches = trained_branches(turns, shared)
        last = conversation[-1].turn if conversation else None
        first = branches[0][0] if branches else None
        return SessionRecord(
            segments=segments_in(branches, shared),
            record=EpisodeRecord(
                turns=len({id(turn) for path in branches for turn in path}),
                stop_reason=stop_reason,
                finish_reason=branches[-1][-1].completion.finish_reason if branches else None,
                step_rewards=self._step_rewards(branches),
                metrics=self._metrics(turns, len(branches), shared, undelivered),
                messages=[node.message for node in conversation],
            ),
            first=None if first is None else self._first_survivor(first, turns),
            first_prompt=sampling.TokenIds() if first is None else first.prompt.ids,
            path=[] if last is None else last.path(),
            tools=None if last is None else self.tools_of(last),
            sent_tokens=self.sent,
            sampled_tokens=sum(len(turn.completion.token_ids) for turn in turns),
            sampled_with=list(self._sampled_with.values()),
            failure=failure,
        )

    def _first_survivor(self, first: Turn, turns: Sequence[Turn]) -> sampling.Survivor:
        return replace(
            self._survivors[id(first)],
            completion=with_versions(
                [first.completion, *(turn.completion for turn in turns if turn is not first)]
            ),
            attempts=self._attempts,
            seconds=sampling.sampling_time() - self._began,
            causes=tuple(self._causes),
        )

    def _step_rewards(self, branches: Sequence[Sequence[Turn]]) -> list[float | None]:
        if not self._rewards:
            return []
        turns = {id(turn): None for path in branches for turn in path}
        return [self._rewards.get(turn) for turn in turns]

    def _metrics(
        self, turns: Sequence[Turn], branches: int, shared: Shared, undelivered: int
    ) -> dict[str, Any]:
        rewrites: dict[int, Rewrite] = {
            id(turn.prompt.rewrite): turn.prompt.rewrite
            for turn in turns
            if turn.prompt.rewrite is not None
        }
        departures = [
            {**msgspec.to_builtins(msgspec.json.decode(one, type=Departure)), "calls": count}
            for one, count in self.departures.items()
        ]
        told: dict[str, Any] = {
            "history_rewrites": [msgspec.to_builtins(one) for one in rewrites.values()],
            "client_edits": [msgspec.to_builtins(one) for one in self._edits],
            "departures": departures,
            "rendered_as": list(self._notes),
            "ignored_fields": sorted(self._ignored),
            "undelivered": undelivered,
        }
        return {
            "calls": self.calls,
            "branches": branches,
            "shared": shared,
            **{name: value for name, value in told.items() if value},
        }
