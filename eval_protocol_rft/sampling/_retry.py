"""What became of each request, and when to try again. Pure: no clock, no randomness, no sleep;
those come in as arguments. Times are seconds of the clock of the loop that samples (`_clock.py`).

Invariant: one request, one `Attempt`, whatever its end.

Invariant: one budget for everything. Nothing below this retries, and Eval Protocol does not
resample our errors, so `max_attempts` is the number of requests that one completion can cost. Not
counted are probes for a server that is away, and requests that a server turned away while it loaded
weights: those end with `max_seconds`. The seed stays the same over all attempts: an
attempt whose reply was lost may have been sampled, and another draw in its place would favour
whatever is quick to arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.sampling._types import FailureKind, SamplingError

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
        loading=error.loading,
        probe=probe,
        prompt=prompt,
    )


def causes(attempts: Sequence[Attempt]) -> str:
    """How many attempts and why: `4 attempts (3x unavailable 503, 1x timeout)`."""
    counts = Counter(attempt.cause for attempt in attempts)
    listed = ", ".join(f"{count}x {cause}" for cause, count in counts.most_common())
    noun = "attempt" if len(attempts) == 1 else "attempts"
    return f"{len(attempts)} {noun}" + (f" ({listed})" if listed else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter (delay uniform in [0, base * 2^(attempt-1)], capped),
    on top of the server's `Retry-After`: all who were told the same time would otherwise come back
    in the same instant. Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015."""

    max_attempts: Annotated[int, Ge(1), Flag(panel="Run")] = 8
    """Requests per completion, the first included."""
    max_seconds: float = 1800.0
    """No attempt is made that would have to wait beyond this, counted from the first one's start.
    Waiting for a slot comes on top."""
    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    """Longest backoff of our own."""
    retry_after_cap_seconds: float = 300.0
    """Most of a `Retry-After` that is honoured. Rate limits ask for up to a minute; hours are a
    clock that is wrong, or a quota that another attempt will only meet again."""

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("max_seconds", "base_seconds", "cap_seconds", "retry_after_cap_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def delay(
        self,
        error: SamplingError | Attempt,
        *,
        attempt: int,
        elapsed: float,
        uniform: float,
        turned_away: int = 0,
    ) -> float | None:
        """Seconds to wait after `attempt` (1-based) failed with `error`; None to give up.

        `attempt` is 0 where all so far were probes or turned away, which do not count.
        `elapsed`: seconds since the first attempt began. `uniform`: a draw from [0, 1).
        `turned_away`: attempts that met a server loading weights. They make the backoff longer.
        """
        if error.kind not in TRANSIENT_KINDS or attempt >= self.max_attempts:
            return None
        # 2.0**attempt overflows a float past 1023 attempts; the cap is reached long before.
        doublings = min(attempt + turned_away - 1, 60)
        ceiling = min(self.cap_seconds, self.base_seconds * 2.0**doublings)
        wait = min(error.retry_after or 0.0, self.retry_after_cap_seconds) + uniform * ceiling
        return wait if elapsed + wait <= self.max_seconds else None


class CompletionAttempts:
    """The attempts at one completion, in order. Tell it each that ended; it says what next."""

    def __init__(self, policy: RetryPolicy, seed: int | None = None) -> None:
        self.policy = policy
        self.seed = seed
        """The seed of every attempt."""
        self.history: list[Attempt] = []
        self.began: float | None = None
        """When the attempt began (clock seconds) that has not ended; None between attempts."""

    @property
    def requests(self) -> int:
        """Attempts made, one that has not ended included."""
        return len(self.history) + (self.began is not None)

    @property
    def first_began(self) -> float | None:
        """When the first attempt began (clock seconds); None before it."""
        return self.history[0].started if self.history else self.began

    @property
    def counted(self) -> int:
        """Attempts that count against `max_attempts`. A probe does not: who sends it is chance,
        and a completion must not be lost for having waited at the head of the queue. Nor does one
        that met a server loading weights: a swap takes minutes, and where few requests are in
        flight, a completion would spend all its attempts before the breaker opens."""
        return sum(not (attempt.probe or attempt.loading) for attempt in self.history)

    def failed(self, attempt: Attempt, *, uniform: float) -> float | None:
        """Record a failure; when to try again (clock seconds), None to give up. `uniform`: a draw
        from [0, 1)."""
        if attempt.kind is None:
            raise ValueError("this attempt did not fail; record it with succeeded()")
        self._ended(attempt)
        wait = self.policy.delay(
            attempt,
            attempt=self.counted,
            elapsed=attempt.ended - self.history[0].started,
            uniform=uniform,
            turned_away=sum(past.loading and not past.probe for past in self.history),
        )
        return None if wait is None else attempt.ended + wait

    def succeeded(self, attempt: Attempt) -> None:
        """Record the attempt that brought the completion."""
        self._ended(attempt)

    def _ended(self, attempt: Attempt) -> None:
        self.history.append(attempt)
        self.began = None
