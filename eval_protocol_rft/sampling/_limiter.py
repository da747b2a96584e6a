"""What every request of a run goes through before it starts: limit, breaker and budget together.

Invariant: `RunLimits.in_flight` is what was started and has neither ended nor been abandoned, and
it grows only while it is below the limit. A request starts in the same step of the event loop in
which it was allowed, and whoever waits is woken when its turn may have come.

`RunLimits` is pure; the caller owns the clock, the tasks and the waiting. Breaker, budget and limit
see the same events in the same order:

    answer = limits.may_start(now, retry=...)
    Go:   limits.started(now, ...); make the request; limits.ended(attempt), or abandoned()
    Wait: ask again at `until`, or when a request ends
    Stop: end the run with its reason

`RunLimiter` is that caller. A `ConcurrencyLimit` owns no task, client or clock either: it hears of
every request that ended and answers with a number, at least 1. `FixedLimit` is the simple one; see
`_adaptive.py` for the one that finds it by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling._breaker import CircuitBreaker
from eval_protocol_rft.sampling._clock import loop_clock, sampling_time
from eval_protocol_rft.sampling._retry import (
    UNTIL_SOMETHING_ENDS,
    Attempt,
    Go,
    MayStart,
    RetryBudget,
    Stop,
    Wait,
    failed_attempt,
)
from eval_protocol_rft.sampling._types import Completion, SamplingError


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


@dataclass(frozen=True, slots=True)
class FixedLimit:
    """Always the same."""

    limit: int

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """Changes nothing."""

    def outage(self) -> None:
        """Changes nothing."""


class RunLimits:
    """One run against one server."""

    def __init__(
        self, *, limit: ConcurrencyLimit, breaker: CircuitBreaker, budget: RetryBudget
    ) -> None:
        self.limit = limit
        self.breaker = breaker
        self.budget = budget
        self.in_flight = 0

    def may_start(self, now: float, *, retry: bool) -> MayStart:
        """Whether a request may start now. `retry`: it is not its completion's first."""
        limit = self.limit.limit
        breaker = self.breaker.may_start(now, in_flight=self.in_flight, limit=limit)
        if isinstance(breaker, Stop):
            return breaker
        probe = isinstance(breaker, Go) and breaker.probe
        budget = self.budget.may_start(now, retry=retry, probe=probe)
        if self.in_flight >= limit:
            return Wait(UNTIL_SOMETHING_ENDS)
        waits = [answer for answer in (breaker, budget) if isinstance(answer, Wait)]
        return max(waits, key=lambda wait: wait.until) if waits else breaker

    def started(self, now: float, *, retry: bool, probe: bool) -> None:
        """The request that was allowed has begun."""
        self.in_flight += 1
        self.breaker.started(now, probe=probe)
        self.budget.started(now, retry=retry, probe=probe)

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


_NO_LIMIT = 1 << 30
_NUMBER = re.compile(r"[0-9]+")
_MOST_MET = 256
"""Kinds of failures that are kept in mind."""
logger = logging.getLogger(__name__)


class RunStoppedError(EvalProtocolRftError, RuntimeError):
    """The run makes no further request, and says why. A RuntimeError on purpose: Eval Protocol does
    not resample on those."""


@dataclass(slots=True)
class Turn:
    """One request that may be made now. Tell it how it ended."""

    started: float
    probe: bool
    prompt: Hashable
    attempt: Attempt | None = None

    def succeeded(self, completion: Completion) -> Attempt:
        self.attempt = Attempt(
            started=self.started,
            ended=sampling_time(),
            tokens=len(completion.token_ids),
            queue_seconds=completion.queue_seconds,
            probe=self.probe,
            prompt=self.prompt,
        )
        return self.attempt

    def failed(self, error: SamplingError) -> Attempt:
        self.attempt = failed_attempt(
            error,
            started=self.started,
            ended=sampling_time(),
            probe=self.probe,
            prompt=self.prompt,
        )
        return self.attempt


class RunLimiter:
    """What all requests of a run against one server go through. Belongs to one event loop."""

    def __init__(
        self,
        *,
        limit: ConcurrencyLimit | None = None,
        patience_seconds: float = 1800.0,
        proven: bool = False,
    ) -> None:
        """
        Args:
            limit: how many requests may be in flight; None: the caller sees to it.
            patience_seconds: how long the server may be away.
            proven: the same settings have brought completions before this run.
        """
        self.limits = RunLimits(
            limit=limit or FixedLimit(_NO_LIMIT),
            breaker=CircuitBreaker(patience_seconds=patience_seconds, proven=proven),
            budget=RetryBudget(began=sampling_time()),
        )
        self._met: set[str] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def turn(
        self, slots: AbstractAsyncContextManager[object], *, retry: bool, prompt: Hashable
    ) -> AsyncIterator[Turn]:
        """Wait until a request may be made, and hold a slot while it is.

        Args:
            slots: a further bound, of the caller's. Nothing waits for the server while holding one.
            retry: it is not its completion's first request.
            prompt: which prompt it is for.

        Raises:
            RunStoppedError: no further request is made in this run.
        """
        with loop_clock().runs():
            while True:
                await self._may_start(retry)
                async with slots:
                    turn = self._start(retry, prompt)
                    if turn is None:
                        continue
                    try:
                        yield turn
                    finally:
                        if turn.attempt is None:
                            self.limits.abandoned(probe=turn.probe)
                        else:
                            self._ended(turn.attempt)
                        self._wake()
                    return

    def has_met(self, attempt: Attempt) -> bool:
        """Whether a failure like this one, numbers in its message aside, was asked about before."""
        failure = f"{attempt.cause}: {_NUMBER.sub('0', attempt.message)}"
        met = failure in self._met
        if len(self._met) < _MOST_MET:
            self._met.add(failure)
        return met

    def _ended(self, attempt: Attempt) -> None:
        """Tell the limits, and the user when the server goes away or comes back."""
        was_away = self._is_away()
        self.limits.ended(attempt)
        if self._is_away() and not was_away:
            why = f"{attempt.cause}: {attempt.message}"
            logger.warning("the server is away (%s); asking now and then until it is back", why)
        elif was_away and not self._is_away():
            logger.warning("the server is back")

    def _is_away(self) -> bool:
        return self.limits.breaker.state in ("open", "half-open")

    async def _may_start(self, retry: bool) -> None:
        """Come back when a request might start, or never could."""
        while True:
            answer = self.limits.may_start(sampling_time(), retry=retry)
            if isinstance(answer, Stop):
                raise RunStoppedError(answer.reason)
            if isinstance(answer, Go):
                return
            await self._until(answer.until)

    def _start(self, retry: bool, prompt: Hashable) -> Turn | None:
        now = sampling_time()
        answer = self.limits.may_start(now, retry=retry)
        if not isinstance(answer, Go):
            return None
        self.limits.started(now, retry=retry, probe=answer.probe)
        return Turn(now, answer.probe, prompt)

    async def _until(self, when: float) -> None:
        """Sleep until `when` (seconds of the loop's clock), or until something ends."""
        woken = asyncio.get_running_loop().create_future()
        self._waiting.append(woken)
        seconds = None if when == float("inf") else max(0.0, when - sampling_time())
        try:
            await asyncio.wait_for(woken, seconds)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake()  # it was our turn; let another have it
            raise
        finally:
            if not woken.done() or woken.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove(woken)

    def _wake(self) -> None:
        """Wake as many as there is room for; when the run is over, all."""
        stopped = self.limits.breaker.state == "tripped"
        room = max(1, self.limits.limit.limit - self.limits.in_flight)
        while self._waiting and (stopped or room > 0):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                room -= 1
