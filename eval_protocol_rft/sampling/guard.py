"""Waiting for leave to make a request: `RunControl` with a clock and tasks around it.

Invariant: a request is made only on a decision that was taken in the same step of the event loop,
each one that began ends or is abandoned exactly once, and whoever waits is woken when its turn may
have come.
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

from eval_protocol_rft.sampling.attempts import Attempt, failed_attempt
from eval_protocol_rft.sampling.breaker import CircuitBreaker
from eval_protocol_rft.sampling.budget import BudgetMeter, RunBudget
from eval_protocol_rft.sampling.clock import loop_clock, sampling_time
from eval_protocol_rft.sampling.concurrency import ConcurrencyLimit, FixedLimit
from eval_protocol_rft.sampling.control import RunControl
from eval_protocol_rft.sampling.decisions import Go, Stop
from eval_protocol_rft.sampling.types import Completion, SamplingError

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
