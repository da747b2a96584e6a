"""What became of one request: the event that limits, breaker, budget and retries learn from.

Invariant: one request, one `Attempt`, whatever its end. Times are seconds of the clock of the loop
that samples, see `_clock.py`.

Whether a request may start, as breaker, budget and limits answer: go, wait, or stop.

Invariant: an answer commits to nothing. Whoever asks says separately what it did, so several can
be asked before one request is made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from eval_protocol_rft.sampling._types import FailureKind, LoadingError, SamplingError

TRANSIENT_KINDS: frozenset[FailureKind] = frozenset({"unavailable", "connection", "timeout"})
"""A refusal or a reply that breaks the contract would come back the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request that has ended."""

    started: float
    ended: float
    kind: FailureKind | None = None
    """Why it failed; None for a completion."""
    status: int | None = None
    """HTTP status of a failure, if it got one."""
    message: str = ""
    retry_after: float | None = None
    """Seconds that the server asked us to wait."""
    tokens: int = 0
    """Sampled tokens; 0 for a failure."""
    queue_seconds: float | None = None
    """Part of the time that the request spent in the server's queues, where the server tells."""
    loading: bool = False
    """The server turned it away because it was loading weights."""
    probe: bool = False
    """It was let through to find out whether the server is back."""
    prompt: Hashable = None
    """Which prompt it was for; None where unknown: then every request counts as a prompt."""

    def __post_init__(self) -> None:
        if self.ended < self.started:
            raise ValueError(f"an attempt ended at {self.ended} but started at {self.started}")

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def transient(self) -> bool:
        """It failed in a way that may pass."""
        return self.kind in TRANSIENT_KINDS

    @property
    def cause(self) -> str:
        """In a word or two: `ok`, `timeout`, `unavailable 503`."""
        if self.kind is None:
            return "ok"
        return self.kind if self.status is None else f"{self.kind} {self.status}"


def failed_attempt(
    error: SamplingError,
    *,
    started: float,
    ended: float,
    probe: bool = False,
    prompt: Hashable = None,
) -> Attempt:
    """The `Attempt` that ended in `error`."""
    return Attempt(
        started=started,
        ended=ended,
        kind=error.kind,
        status=error.status,
        message=str(error),
        retry_after=error.retry_after,
        loading=isinstance(error, LoadingError),
        probe=probe,
        prompt=prompt,
    )


def causes(attempts: Sequence[Attempt]) -> str:
    """How many attempts and why: `4 attempts (3x unavailable 503, 1x timeout)`."""
    counts = Counter(attempt.cause for attempt in attempts)
    listed = ", ".join(f"{count}x {cause}" for cause, count in counts.most_common())
    noun = "attempt" if len(attempts) == 1 else "attempts"
    return f"{len(attempts)} {noun}" + (f" ({listed})" if listed else "")


UNTIL_SOMETHING_ENDS = math.inf
"""`Wait.until` where no date can be named: ask again when a request in flight has ended."""


@dataclass(frozen=True, slots=True)
class Go:
    """Make the request."""

    probe: bool = False
    """It is one of the few that find out whether the server is back."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now; ask again."""

    until: float
    """Clock seconds before which the answer stays the same unless a request ends."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Never again in this run."""

    reason: str
    """What happened and what to do about it, for the user."""


MayStart: TypeAlias = Go | Wait | Stop
