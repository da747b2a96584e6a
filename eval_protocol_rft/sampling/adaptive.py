"""A limit that finds how many requests are worth having in flight. Pure.

Invariant: the limit lies within [lowest, highest]. It rises only by trials, and a trial is judged
by what requests got after it, while the limit was what held others back.

Throughput at a limit is measured as limit * (tokens / seconds of its completions): what one request
gets, times how many share it. The limit climbs on that: a trial further up is kept where it buys
throughput, one further down where it costs none. Latency against a baseline (TCP Vegas, Netflix's
gradient) would stop far too early: in batched decoding each request slows the others down a little
while the sum still grows. A 429 and a queue that the server tells of say more than a trial does,
and are followed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from eval_protocol_rft.sampling.attempts import Attempt
from eval_protocol_rft.sampling.epoch import RECENT, Epoch
from eval_protocol_rft.sampling.tuning import (
    ACCELERATION,
    BACK_OFF,
    BIG_STEP,
    CLEARLY,
    COSTS_NOTHING,
    HIGHEST,
    HOPELESS,
    LONGEST_HOLD,
    OVERLOAD_CUT,
    QUEUE_ENOUGH,
    QUEUE_KEPT,
    QUEUE_TOO_LONG,
    SIGMAS,
    SLOWED,
    SMALL_STEP,
    SMOOTHING,
    SPED_UP,
    START,
    WORTH,
)

_TINY = 1e-9
"""Of a throughput or its gain: keeps completions without tokens from dividing by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What a server's metrics say at one moment, as vLLM's do."""

    running: int
    """`vllm:num_requests_running`."""
    waiting: int
    """`vllm:num_requests_waiting`."""
    preempted: int = 0
    """How much `vllm:num_preemptions_total` has grown since the last poll."""


class _Base(NamedTuple):
    """The limit that a trial is compared with."""

    limit: int
    rate: float
    """Tokens per second of one request."""
    spread: float
    """Relative standard deviation of their seconds per token."""
    rough: bool
    """It is an early estimate: the next full one replaces it."""

    @property
    def throughput(self) -> float:
        return self.limit * self.rate


class AdaptiveLimit:
    """A `ConcurrencyLimit` that starts low, doubles while that pays, then keeps trying a little
    more and a little less."""

    def __init__(self, *, start: int = START, lowest: int = 1, highest: int = HIGHEST) -> None:
        if not 1 <= lowest <= start <= highest:
            raise ValueError(
                f"wanted 1 <= lowest <= start <= highest, got {lowest}, {start} and {highest}"
            )
        self._lowest, self._highest = lowest, highest
        self._limit = start
        self._epoch = Epoch(start)
        self._base: _Base | None = None
        self._trial = 0
        """+1 or -1 while a trial further up or down is on."""
        self._next = 1
        """Direction of the next trial."""
        self._step = BIG_STEP
        self._far = True
        """No trial has failed since the server was new or changed: the best is far away."""
        self._hold = self._held = 0
        """Epochs from a failed trial to the next, and how many of them have passed."""
        self._before_cuts: int | None = None
        """The limit at the first failure since the last success."""

    @property
    def limit(self) -> int:
        return self._limit

    def outage(self) -> None:
        """The server is away: go on where we were before it began to fail."""
        base = self._base.limit if self._base else self._limit
        self._move(self._before_cuts or base)
        self._base, self._trial, self._before_cuts = None, 0, None

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """A request has ended; `in_flight` others have not."""
        if attempt.transient:
            self._failed(attempt, in_flight)
        elif attempt.kind is None:
            self._before_cuts = None
            self._epoch.succeeded(attempt, in_flight)
            if self._trial:
                self._judge_trial()
            else:
                self._watch()

    def observe(self, load: ServerLoad) -> None:
        """Take a poll of the server's metrics into account."""
        if load.waiting or load.running:
            self._epoch.saw_queue(load.waiting / (load.waiting + load.running))
        if load.preempted and not self._trial:
            self._cut(self._limit * BACK_OFF)

    def _failed(self, attempt: Attempt, in_flight: int) -> None:
        self._before_cuts = self._before_cuts or self._limit
        if attempt.status == 429:
            # Those in flight are what the server did take.
            self._cut(in_flight * BACK_OFF)
        elif self._epoch.failed(attempt):
            self._cut(self._limit * OVERLOAD_CUT)

    def _cut(self, to: float) -> None:
        if to < self._limit:
            self._wait_longer()
            self._base, self._trial, self._next = None, 0, 1
            self._move(to)

    def _judge_trial(self) -> None:
        assert self._base is not None  # noqa: S101 - narrows the type
        best, epoch = max(self._base.throughput, _TINY), self._epoch
        early = epoch.early_rate
        if epoch.full:
            moved = abs(math.log(self._limit / self._base.limit))
            gain = math.log(max(self._limit * epoch.rate / best, _TINY)) / moved
            kept = gain > (WORTH if self._trial > 0 else -COSTS_NOTHING)
            self._end_trial(epoch.rate if kept else None)
        elif early is None:
            return
        elif self._limit * early < (HOPELESS - self._base.spread**2) * best:
            # Requests caught in flight are slow ones, by the square of the spread (the inspection
            # paradox), so an early estimate is low by as much.
            self._end_trial(None)
        elif self._far and self._trial > 0 and self._limit * early > best * self._step**CLEARLY:
            self._end_trial(early)

    def _end_trial(self, rate: float | None) -> None:
        """`rate`: of the trial if it is kept, None to go back."""
        assert self._base is not None  # noqa: S101 - narrows the type
        trial, self._trial = self._trial, 0
        if rate is None:
            self._wait_longer()
            self._next = -trial
            self._move(self._base.limit)
            return
        self._base = _Base(self._limit, rate, self._epoch.spread, rough=not self._epoch.full)
        self._hold, self._next = 0, trial
        self._step = min(BIG_STEP, self._step**ACCELERATION)
        self._go_on()

    def _watch(self) -> None:
        """Measure where we are, and see whether the server has changed."""
        recent = self._epoch.recent_rate
        if self._base is not None and not self._base.rough and recent is not None:
            noise = SIGMAS * self._base.spread / math.sqrt(RECENT)
            change = recent / self._base.rate
            if change < min(SLOWED, 1 / (1 + noise)):
                self._changed(-1)
                self._move(self._limit / BIG_STEP)
                return
            if change > max(SPED_UP, 1 + noise):
                self._changed(1)
                self._epoch.restart()
                return
        if self._epoch.full:
            rate = self._epoch.rate
            if self._base is not None and not self._base.rough:
                rate = self._base.rate + SMOOTHING * (rate - self._base.rate)
            self._base = _Base(self._limit, rate, self._epoch.spread, rough=False)
            self._held += 1
            self._go_on()

    def _go_on(self) -> None:
        """After a measurement: the next trial, or stay for another epoch."""
        queue = self._epoch.queue_share
        if queue is not None and queue > QUEUE_TOO_LONG:
            self._wait_longer()
            self._base = None
            self._move(self._limit * (1 - queue) * QUEUE_KEPT)
            return
        if self._held >= self._hold and (queue is None or queue < QUEUE_ENOUGH):
            direction = self._next if queue is None else 1
            # By one at least, or a limit of 4 could not grow in small steps.
            by = max(1.0, self._limit * self._step - self._limit)
            down = min(self._limit - 1.0, self._limit / self._step)
            if self._move(self._limit + by if direction > 0 else down):
                self._trial = direction
                return
            # At a bound: the best is here or a little way back.
            self._next, self._step, self._far = -direction, SMALL_STEP, False
        self._epoch.restart()

    def _wait_longer(self) -> None:
        self._step, self._far = SMALL_STEP, False
        self._held, self._hold = 0, min(LONGEST_HOLD, 2 * self._hold or 1)

    def _changed(self, direction: int) -> None:
        self._base, self._next, self._step, self._far = None, direction, BIG_STEP, True
        self._held = self._hold = 0

    def _move(self, to: float) -> bool:
        """Set the limit; whether it is another one now."""
        limit = min(self._highest, max(self._lowest, math.floor(to)))
        moved = limit != self._limit
        self._limit = limit
        self._epoch = Epoch(limit, rate_before=self._base.rate if self._base else None)
        return moved
