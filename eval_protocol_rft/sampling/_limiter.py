"""Waiting for leave to make a request: `RunControl` with a clock and tasks around it.

Invariant: a request is made only on a decision that was taken in the same step of the event loop,
each one that began ends or is abandoned exactly once, and whoever waits is woken when its turn may
have come.

Everything that decides whether a request of a run may start, as one machine. Pure.

Invariant: `in_flight` is what was started and has neither ended nor been abandoned, and it grows
only while it is below the limit. Breaker, budget and limit see the same events in the same order.

The caller owns the clock, the tasks and the waiting:

    decision = control.may_start(now, retry=...)
    Go:   control.started(now, ...); make the request; control.ended(attempt), or abandoned()
    Wait: ask again at `until`, or when a request ends
    Stop: end the run with its reason

How many requests may be in flight: the interface, and the simple choice. Pure.

Invariant: a limit owns no task, client or clock. It hears of every request that ended and answers
with a number, at least 1. See `adaptive.py` for the one that finds it by itself.
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

from eval_protocol_rft.sampling._attempts import (
    UNTIL_SOMETHING_ENDS,
    Attempt,
    Decision,
    Go,
    Stop,
    Wait,
    failed_attempt,
)
from eval_protocol_rft.sampling._breaker import CircuitBreaker
from eval_protocol_rft.sampling._clock import loop_clock, sampling_time
from eval_protocol_rft.sampling._retry import BudgetMeter, RunBudget
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


class RunControl:
    """One run against one server."""

    def __init__(
        self, *, limit: ConcurrencyLimit, breaker: CircuitBreaker, budget: BudgetMeter
    ) -> None:
        self.limit = limit
        self.breaker = breaker
        self.budget = budget
        self.in_flight = 0

    def may_start(self, now: float, *, retry: bool) -> Decision:
        """Whether a request may start now. `retry`: it is not its completion's first."""
        limit = self.limit.limit
        decision = self.breaker.may_start(now, in_flight=self.in_flight, limit=limit)
        if isinstance(decision, Stop):
            return decision
        probe = not isinstance(decision, Wait) and decision.probe
        allowance = self.budget.may_start(now, retry=retry, probe=probe)
        if isinstance(allowance, Stop):
            return allowance
        if self.in_flight >= limit:
            return Wait(UNTIL_SOMETHING_ENDS)
        waits = [answer for answer in (decision, allowance) if isinstance(answer, Wait)]
        return max(waits, key=lambda wait: wait.until) if waits else decision

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


class RunStoppedError(RuntimeError):
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


class RunGuard:
    """What all requests of a run against one server go through. Belongs to one event loop."""

    def __init__(
        self,
        *,
        limit: ConcurrencyLimit | None = None,
        budget: RunBudget | None = None,
        patience_seconds: float = 1800.0,
        proven: bool = False,
    ) -> None:
        """
        Args:
            limit: how many requests may be in flight; None: the caller sees to it.
            budget: of the run; None: the default one.
            patience_seconds: how long the server may be away.
            proven: the same settings have brought completions before this run.
        """
        self.control = RunControl(
            limit=limit or FixedLimit(_NO_LIMIT),
            breaker=CircuitBreaker(patience_seconds=patience_seconds, proven=proven),
            budget=BudgetMeter(budget or RunBudget(), began=sampling_time()),
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
                            self.control.abandoned(probe=turn.probe)
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
        """Tell the machines, and the user when the server goes away or comes back."""
        was_away = self._is_away()
        self.control.ended(attempt)
        if self._is_away() and not was_away:
            why = f"{attempt.cause}: {attempt.message}"
            logger.warning("the server is away (%s); asking now and then until it is back", why)
        elif was_away and not self._is_away():
            logger.warning("the server is back")

    def _is_away(self) -> bool:
        return self.control.breaker.state in ("open", "half-open")

    async def _may_start(self, retry: bool) -> None:
        """Come back when a request might start, or never could."""
        while True:
            decision = self.control.may_start(sampling_time(), retry=retry)
            if isinstance(decision, Stop):
                raise RunStoppedError(decision.reason)
            if isinstance(decision, Go):
                return
            await self._until(decision.until)

    def _start(self, retry: bool, prompt: Hashable) -> Turn | None:
        now = sampling_time()
        decision = self.control.may_start(now, retry=retry)
        if not isinstance(decision, Go):
            return None
        self.control.started(now, retry=retry, probe=decision.probe)
        return Turn(now, decision.probe, prompt)

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
        stopped = self.control.breaker.state == "tripped"
        room = max(1, self.control.limit.limit - self.control.in_flight)
        while self._waiting and (stopped or room > 0):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                room -= 1
