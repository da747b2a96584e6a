"""What was sent and sampled, as ids: segments to train on, turns as they went over the wire.

Invariant: every sampled id is in exactly one segment, once, with `loss_mask` 1 and its own logprob;
every other id has 0 and 0.0. A segment begins with what was sent and ends with what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.sampling.types import Completion, FinishReason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """Turns of which each continues, id by id, what was there before it. N tokens."""

    tokens: NDArray[np.int64]
    """[N] ids sent and sampled, in order."""
    logprobs: NDArray[np.float32]
    """[N] sampling logprobs (nats) of sampled ids, 0.0 elsewhere."""
    loss_mask: NDArray[np.float32]
    """[N] 1.0 exactly on sampled ids."""

    def __len__(self) -> int:
        """N, the number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request and its answer, as a `token_turn_traces` entry has them."""

    prompt_ids: list[int]
    """All ids that were sent."""
    completion_ids: list[int]
    """[T] ids that came back."""
    completion_logprobs: list[float]
    """[T] their sampling logprobs (nats)."""
    finish_reason: FinishReason


@dataclass(slots=True)
class OpenSegment:
    """A segment that turns are added to. It holds each id once, however many turns sent it."""

    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, Completion]] = field(default_factory=list)
    """Where each turn's sampled ids begin, and the completion they are of."""

    def add(self, new_ids: Sequence[int], completion: Completion) -> None:
        """A turn: ids sent that were not yet there, then what was sampled."""
        self.ids.extend(new_ids)
        self.turns.append((len(self.ids), completion))
        self.ids.extend(completion.token_ids)

    def close(self) -> Segment:
        """The segment so far."""
        logprobs = np.zeros(len(self.ids), dtype=np.float32)
        mask = np.zeros(len(self.ids), dtype=np.float32)
        for start, completion in self.turns:
            sampled = slice(start, start + len(completion.token_ids))
            logprobs[sampled] = completion.logprobs
            mask[sampled] = 1.0
        return Segment(tokens=np.array(self.ids, dtype=np.int64), logprobs=logprobs, loss_mask=mask)

    def as_turns(self) -> Iterator[Turn]:
        """Its turns, each with the whole prompt that was sent."""
        for start, completion in self.turns:
            yield Turn(
                prompt_ids=self.ids[:start],
                completion_ids=list(completion.token_ids),
                completion_logprobs=list(completion.logprobs),
                finish_reason=completion.finish_reason,
            )
