"""What became of each request, and when to try again. Pure: no clock, no randomness, no sleep;
those come in as arguments. Times are seconds of the clock of the loop that samples (`_clock.py`).

Invariant: one request, one `Attempt`, whatever its end. Whether a request may start, as retries,
breaker, budget and limits answer (`Go`, `Wait`, `Stop`), commits to nothing: whoever asks says
separately what it did, so several can be asked before one request is made.

Invariant: one budget for everything. Nothing below this retries, and Eval Protocol does not
resample our errors, so `max_attempts` is the number of requests that one completion can cost. Not
counted are probes for a server that is away, and requests that a server turned away while it loaded
weights: those end with `max_seconds`. The seed stays the same over all attempts: an
attempt whose reply was lost may have been sampled, and another draw in its place would favour
whatever is quick to arrive.

Invariant of a run's `RetryBudget`, at any time t seconds into the run, whatever the server does:

    retries <= burst + extra_ratio * first_attempts + trickle_per_second * t

Probes of a breaker are paced by the breaker and come on top. What the budget holds back is late,
not lost.
Source of the ratio: retry budgets of Twitter's Finagle (2016) and Google's SRE book, chapter 21.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

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
    """Never again in this run, or for this completion."""

    reason: str
    """What happened and what to do about it, for the user."""


MayStart: TypeAlias = Go | Wait | Stop


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


@dataclass(slots=True)
class CompletionAttempts:
    """The attempts at one completion, in order. Tell it each that ended; it says what next."""

    policy: RetryPolicy
    seed: int | None = None
    """The seed of every attempt."""
    history: list[Attempt] = field(default_factory=list)
    began: float | None = None
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

    def failed(self, attempt: Attempt, *, uniform: float) -> Wait | Stop:
        """Record a failure; when to try again, or why not. `uniform`: a draw from [0, 1)."""
        if attempt.kind is None:
            raise ValueError("this attempt did not fail; record it with succeeded()")
        self._ended(attempt)
        elapsed = attempt.ended - self.history[0].started
        wait = self.policy.delay(
            attempt,
            attempt=self.counted,
            elapsed=elapsed,
            uniform=uniform,
            turned_away=sum(past.loading and not past.probe for past in self.history),
        )
        if wait is not None:
            return Wait(attempt.ended + wait)
        return Stop(f"{self._why(attempt)}: {causes(self.history)} in {elapsed:.1f} s")

    def succeeded(self, attempt: Attempt) -> None:
        """Record the attempt that brought the completion."""
        self._ended(attempt)

    def _ended(self, attempt: Attempt) -> None:
        self.history.append(attempt)
        self.began = None

    def _why(self, attempt: Attempt) -> str:
        if not attempt.transient:
            return "another attempt would end the same"
        if self.counted >= self.policy.max_attempts:
            return f"max_attempts={self.policy.max_attempts} is reached"
        return f"the next attempt would begin after max_seconds={self.policy.max_seconds:g}"


_ROUNDING = 1e-6
"""Of a token: who waits until the date that was named must not find it missing by a rounding."""


class RetryBudget:
    """What one run may spend on retries: a token bucket that first attempts and time fill."""

    def __init__(
        self,
        *,
        began: float,
        extra_ratio: float = 0.2,
        burst: float = 512.0,
        trickle_per_second: float = 1.0,
    ) -> None:
        """
        Args:
            began: clock seconds at which the run began.
            extra_ratio: retries that each first attempt pays for: at most a fifth more load than
                was asked for, for as long as the server fails. Finagle's default; Google's is 0.1.
            burst: retries that can be saved up, and what there is at the start. One interruption
                fails every request in flight at once; twice 256 in flight come back without
                waiting for their turn.
            trickle_per_second: retries that time pays for, so that the last completions of a run,
                which no first attempt follows, still get theirs.
        """
        if not extra_ratio >= 0:
            raise ValueError(f"extra_ratio must not be negative, got {extra_ratio}")
        if not burst >= 1:
            raise ValueError(f"burst must be at least 1, got {burst}")
        if not trickle_per_second > 0:
            # Nothing would ever wake a retry once no first attempt is left.
            raise ValueError(f"trickle_per_second must be above 0, got {trickle_per_second}")
        self.extra_ratio, self.burst = extra_ratio, burst
        self.trickle_per_second = trickle_per_second
        self._tokens = burst
        self._filled_at = began
        self.first_attempts = 0
        self.retries = 0
        """Without probes."""
        self.probes = 0

    @property
    def attempts(self) -> int:
        return self.first_attempts + self.retries + self.probes

    def may_start(self, now: float, *, retry: bool, probe: bool = False) -> Go | Wait:
        """Whether there is room for one more attempt: always, if it is no retry."""
        if not retry or probe:
            return Go()
        self._fill(now)
        if self._tokens >= 1.0 - _ROUNDING:
            return Go()
        return Wait(now + (1.0 - self._tokens) / self.trickle_per_second)

    def started(self, now: float, *, retry: bool, probe: bool = False) -> None:
        """One more attempt has begun."""
        self._fill(now)
        if probe:
            self.probes += 1
        elif retry:
            self.retries += 1
            self._tokens -= 1.0
        else:
            self.first_attempts += 1
            self._add(self.extra_ratio)

    def _fill(self, now: float) -> None:
        self._add((now - self._filled_at) * self.trickle_per_second)
        self._filled_at = now

    def _add(self, tokens: float) -> None:
        # A run that went well for hours must not have saved up a storm.
        self._tokens = min(self.burst, self._tokens + tokens)
