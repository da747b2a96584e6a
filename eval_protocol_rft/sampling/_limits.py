"""Whether a request of a run may start: breaker, budget and limit together. Pure: the caller owns
the clock, the tasks and the waiting. They see the same events in the same order:

    at = limits.earliest(now, retry=...)
    at <= now: limits.started(now, ...); make the request; limits.ended(attempt), or abandoned()
    at > now:  ask again then, or when a request ends

Asking commits to nothing, so several can be asked before one request is made.

Invariant: `RunLimits.in_flight` is what was started and has neither ended nor been abandoned, and
it grows only while it is below the limit. A `ConcurrencyLimit` owns no task, client or clock
either: it hears of every request that ended and answers with a number, at least 1. `FixedLimit` is
the simple one; see `_adaptive.py` for the one that finds it by itself.

Invariant: while the breaker is open, requests start no closer together than `FIRST_PROBE_SECONDS`,
and once it has tripped none starts. It closes when a probe has brought a completion, and then lets
requests in step by step, so that those that waited do not all arrive at once.

    closed --transient failures only--> open --probe starts--> half-open --it succeeds--> closed
                                         ^---------------------- it fails
    closed, half-open --the streak of failures says that the run is lost--> tripped

`Streak` is the one rule that says so. A success ends a streak of refusals, but only one that began
after the streak did: what the server accepted before the key expired says nothing about the key.

Invariant of a run's `RetryBudget`, at any time t seconds into the run, whatever the server does:

    retries <= burst + extra_ratio * first_attempts + trickle_per_second * t

Probes of a breaker are paced by the breaker and come on top. What the budget holds back is late,
not lost.
Source of the ratio: retry budgets of Twitter's Finagle (2016) and Google's SRE book, chapter 21.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Literal, Protocol

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling._retry import Attempt

ACCOUNT_STATUSES = frozenset({401, 402, 403, 404, 405, 407, 412})
"""Key, bill, access, model, path, proxy, suspended account: no prompt makes a difference."""

ACCOUNT_STREAK = 8
"""So many of them in a row end the run, or half of those in flight where that is more: with one of
several replicas misconfigured, as many come back at once while the others are still sampling."""

PROMPT_STREAK = 16
"""So many different prompts in a row, refused before anything succeeded or answered with what is no
exact token data, end the run; the n completions of one prompt are one piece of evidence. Once the
settings have proven to work, a refusal is of the prompt: data sets have long stretches of prompts
that are too long."""

FIRST_CONTACT_SECONDS = 60.0
"""So long a server may refuse connections before the first completion: a wrong address is likelier
then than an outage. One that answers, if only with 503, may be scaling up, and has the whole
patience."""


class Streak:
    """Failures in a row, and whether the run is lost by them. It is when

    - `ACCOUNT_STREAK` requests or more were refused for what no prompt can mend,
    - `PROMPT_STREAK` different prompts or more failed for good, for as long as a completion takes,
    - or no request has succeeded for `patience_seconds`.
    """

    def __init__(self, *, patience_seconds: float, proven: bool) -> None:
        """As for `CircuitBreaker`."""
        self._patience = patience_seconds
        self._proven = proven
        self._slowest_success: float | None = None
        self._failing_since: float | None = None
        """The first transient failure since the last success."""
        self._refused_since: float | None = None
        self._refused = self._account = 0
        self._prompts: set[Hashable] = set()

    def succeeded(self, attempt: Attempt) -> None:
        self._proven = True
        self._slowest_success = max(self._slowest_success or 0.0, attempt.seconds)
        self._failing_since = None
        if self._refused_since is not None and attempt.started >= self._refused_since:
            self._refused_since, self._refused, self._account = None, 0, 0
            self._prompts.clear()

    def failed(self, attempt: Attempt, *, in_flight: int) -> str | None:
        """Record a failure; why the run is lost by it, or None. `in_flight`: requests that have
        not ended."""
        if attempt.transient:
            return self._failed_for_now(attempt)
        of_account = attempt.status in ACCOUNT_STATUSES
        if attempt.kind == "refused" and self._proven and not of_account:
            return None
        if self._refused_since is None:
            self._refused_since = attempt.ended
        self._refused += 1
        self._account += of_account
        # The refusals that have been counted are enough; the set must not grow with the data set.
        if len(self._prompts) < PROMPT_STREAK:
            self._prompts.add(self._refused if attempt.prompt is None else ("id", attempt.prompt))
        if self._account >= max(ACCOUNT_STREAK, in_flight / 2):
            return self._refusals(self._account, "requests", attempt)
        # Refusals are quick and completions slow: for as long as the slowest took, a stretch of
        # bad prompts looks the same as a server that refuses them all.
        seconds = attempt.ended - self._refused_since
        if len(self._prompts) >= PROMPT_STREAK and seconds >= (self._slowest_success or 0.0):
            return self._refusals(self._refused, "requests for different prompts", attempt)
        return None

    def _failed_for_now(self, attempt: Attempt) -> str | None:
        now, patience = attempt.ended, self._patience
        self._failing_since = now if self._failing_since is None else self._failing_since
        if self._slowest_success is None and attempt.kind == "connection":
            patience = min(patience, FIRST_CONTACT_SECONDS)
        seconds = now - self._failing_since
        if seconds < patience:
            return None
        return (
            f"no request succeeded for {seconds:.0f} s; {_last(attempt)}. Run again once the "
            "server answers"
        )

    def _refusals(self, count: int, what: str, attempt: Attempt) -> str:
        return (
            f"{count} {what} in a row failed for good and none that began since then succeeded; "
            f"{_last(attempt)}. The rest of the data set would fare no better: mend the cause and "
            "run again"
        )


def _last(attempt: Attempt) -> str:
    return f"the last one: {attempt.cause}: {attempt.message or 'no message'}"


State = Literal["closed", "open", "half-open", "tripped"]

OPEN_AFTER = 16
"""Transient failures in a row that open it, or half of those in flight where that is more: one of
several replicas that is down fails fast while the others are still sampling."""

FIRST_PROBE_SECONDS = 1.0
"""From opening to the first probe: a restart behind a load balancer takes about as long."""

LONGEST_PROBE_SECONDS = 30.0
"""Probes come at twice the distance each time one fails, up to this. It bounds both the requests
that an outage costs (two a minute) and the time that passes before its end is seen."""

LONGEST_RETRY_AFTER = 300.0
"""Most of a `Retry-After` that delays the next probe, as in `RetryPolicy`."""

SHORTEST_RAMP, LONGEST_RAMP = 5.0, 60.0
"""Seconds over which requests are let in again after closing. Between them it takes as long as a
completion takes on average: then those that waited arrive at the rate at which requests came
before the outage, so that both together are twice that rate."""

_SMOOTHING = 0.1
"""Weight of the newest completion in the average of their seconds."""


class CircuitBreaker:
    """One server, seen by one run."""

    def __init__(self, *, patience_seconds: float = 1800.0, proven: bool = False) -> None:
        """
        Args:
            patience_seconds: how long requests may fail, none succeeding, before the run stops.
                A deployment that scales up from nothing takes minutes.
            proven: the same settings have brought completions before this run.
        """
        self._streak = Streak(patience_seconds=patience_seconds, proven=proven)
        self._failures = 0
        """Transient ones in a row, without those of status 429."""
        self._opened_at: float | None = None
        self._next_probe = 0.0
        self._distance = FIRST_PROBE_SECONDS
        self._probes_in_flight = 0
        self._closed_at = -LONGEST_RAMP
        self._typical_seconds: float | None = None
        self.stopped: str | None = None
        """Why no request of this run may start any more: what happened and what to do about it."""

    @property
    def state(self) -> State:
        if self.stopped is not None:
            return "tripped"
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._probes_in_flight else "open"

    @property
    def is_open(self) -> bool:
        """Whether what starts now is one of the few that find out whether the server is back."""
        return self._opened_at is not None

    def earliest(self, *, in_flight: int, limit: int) -> float:
        """From when (clock seconds) one more request may begin beside `in_flight` others of at most
        `limit`."""
        if self._opened_at is not None:
            return self._next_probe
        return self._closed_at + self._ramp_seconds() * min(1.0, in_flight / max(1, limit))

    def started(self, now: float) -> bool:
        """A request has begun; whether it is a probe."""
        if self._opened_at is None:
            return False
        if self._probes_in_flight:
            # The last one was not turned away: the server may be back. Ask a little faster.
            self._distance = max(FIRST_PROBE_SECONDS, self._distance / 2)
        self._probes_in_flight += 1
        self._next_probe = now + self._distance
        return True

    def abandoned(self, *, probe: bool) -> None:
        """A request was cancelled by us: nothing was learnt from it."""
        self._probes_in_flight -= probe

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """A request has ended; `in_flight` others have not."""
        self._probes_in_flight -= attempt.probe
        if attempt.kind is None:
            self._succeeded(attempt)
            return
        reason = self._streak.failed(attempt, in_flight=in_flight)
        self.stopped = self.stopped or reason
        if attempt.transient:
            self._failed_for_now(attempt, in_flight)

    def _succeeded(self, attempt: Attempt) -> None:
        self._streak.succeeded(attempt)
        self._failures = 0
        typical = attempt.seconds if self._typical_seconds is None else self._typical_seconds
        self._typical_seconds = typical + _SMOOTHING * (attempt.seconds - typical)
        if self._opened_at is not None and attempt.started >= self._opened_at:
            self._opened_at, self._closed_at = None, attempt.ended

    def _failed_for_now(self, attempt: Attempt, in_flight: int) -> None:
        if self._opened_at is not None:
            self._probe_failed(attempt)
        elif attempt.status != 429:
            # 429 is the word of a server that works: whom to slow down is the limit's business.
            self._failures += 1
            if self._failures >= max(OPEN_AFTER, in_flight / 2):
                self._opened_at = attempt.ended
                self._distance = FIRST_PROBE_SECONDS
                self._next_probe = attempt.ended + self._asked(attempt)

    def _probe_failed(self, attempt: Attempt) -> None:
        if attempt.probe:
            self._distance = min(LONGEST_PROBE_SECONDS, self._distance * 2)
            self._next_probe = max(self._next_probe, attempt.ended + self._asked(attempt))

    def _asked(self, attempt: Attempt) -> float:
        return max(self._distance, min(attempt.retry_after or 0.0, LONGEST_RETRY_AFTER))

    def _ramp_seconds(self) -> float:
        return min(LONGEST_RAMP, max(SHORTEST_RAMP, self._typical_seconds or 0.0))


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
                fails every request in flight at once, and all of them come back twice without
                waiting for their turn: it grows to twice the most that were in flight.
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

    def earliest(self, now: float, *, retry: bool, probe: bool = False) -> float:
        """From when there is room for one more attempt: at once, if it is no retry."""
        if not retry or probe:
            return now
        self._fill(now)
        if self._tokens >= 1.0 - _ROUNDING:
            return now
        return now + (1.0 - self._tokens) / self.trickle_per_second

    def started(self, now: float, *, retry: bool, probe: bool = False, in_flight: int = 0) -> None:
        """One more attempt has begun, and `in_flight` are there now."""
        self._fill(now)
        more = 2 * in_flight - self.burst
        if more > 0:
            self.burst += more
            self._tokens += more
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


class ConcurrencyLimit(Protocol):
    """How many requests may be in flight."""

    @property
    def limit(self) -> int:
        """At least 1."""
        ...

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """A request has ended; `in_flight` others have not."""
        ...

    def outage(self) -> None:
        """The server is away: what failed just now was no sign of too many requests."""
        ...


class FixedLimit:
    """Always the same."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """Changes nothing."""

    def outage(self) -> None:
        """Changes nothing."""


class RunStoppedError(EvalProtocolRftError, RuntimeError):
    """The run makes no further request, and says why. A RuntimeError on purpose: Eval Protocol does
    not resample on those."""


class RunLimits:
    """One run against one server."""

    def __init__(
        self, *, limit: ConcurrencyLimit, breaker: CircuitBreaker, budget: RetryBudget
    ) -> None:
        self.limit = limit
        self.breaker = breaker
        self.budget = budget
        self.in_flight = 0

    def earliest(self, now: float, *, retry: bool) -> float:
        """From when (clock seconds) a request may start, unless another one ends before: now where
        that is not above `now`; infinity where one in flight has to end first. `retry`: it is not
        its completion's first.

        Raises:
            RunStoppedError: none may start any more.
        """
        if self.breaker.stopped is not None:
            raise RunStoppedError(self.breaker.stopped)
        limit = self.limit.limit
        at = self.breaker.earliest(in_flight=self.in_flight, limit=limit)
        probe = self.breaker.is_open and at <= now
        at = max(at, self.budget.earliest(now, retry=retry, probe=probe))
        return at if self.in_flight < limit else math.inf

    def started(self, now: float, *, retry: bool) -> bool:
        """The request that was allowed has begun; whether it is a probe, which finds out whether
        the server is back."""
        self.in_flight += 1
        probe = self.breaker.started(now)
        self.budget.started(now, retry=retry, probe=probe, in_flight=self.in_flight)
        return probe

    def ended(self, attempt: Attempt) -> None:
        """It has ended."""
        self.in_flight -= 1
        self.breaker.ended(attempt, in_flight=self.in_flight)
        if self.breaker.state in ("open", "half-open"):
            # What fails during an outage says nothing of how many the server can take.
            self.limit.outage()
        else:
            self.limit.ended(attempt, in_flight=self.in_flight)

    def abandoned(self, *, probe: bool) -> None:
        """It was cancelled by us."""
        self.in_flight -= 1
        self.breaker.abandoned(probe=probe)
