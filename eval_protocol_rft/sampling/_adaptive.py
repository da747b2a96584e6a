"""A limit that finds how many requests are worth having in flight. Pure.

Invariant: the limit lies within [lowest, highest]. It rises only by trials, and a trial is judged
by what requests got after it, while the limit was what held others back. A clean sample is a
completion whose request began after the move had taken effect, that is after the first completion
with no more than the limit in flight: by then a raised limit is filled, a lowered one drained.

Throughput at a limit is measured as limit * (tokens / seconds of its completions): what one request
gets, times how many share it. The limit climbs on that: a trial further up is kept where it buys
throughput, one further down where it costs none. Latency against a baseline (TCP Vegas, Netflix's
gradient) would stop far too early: in batched decoding each request slows the others down a little
while the sum still grows. A 429 and a queue that the server tells of say more than a trial does,
and are followed at once.

The constants come from simulated servers (`tests/test_concurrency_simulated.py`): throughput flat,
slowly saturating or collapsing beyond a knee, hard limits, queues, long-tailed lengths, a quarter
or four times the capacity in mid run. "Worst" and "mean" are over these 17 shapes, as shares of the
best fixed limit's throughput. With the numbers here the worst is 0.90 and the mean 0.96; one shape,
the slowly saturating one, has 0.88 until its run is as many completions long as the others'.

The pace of simulated requests differs by 10%. Where it differs by 40%, as with prompts of very
different lengths, trials are judged by more chance: 0.8 to 0.99 on most shapes, 0.55 to 0.85 on
those that collapse or change. A fixed limit is the better choice there, if one is known.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from eval_protocol_rft.sampling._retry import Attempt

FEWEST, MOST = 16, 64
"""Clean samples that make a measurement: as many as are in flight, within these. Fewer than 16 are
noise where the work per token differs between requests; at most 32 cost half a percent of the mean,
256 gain nothing."""

BINDING = 0.8
"""The limit held others back where at least this part of it was in flight."""

EARLY, EARLY_SHARE = 16, 0.5
"""Samples of an early estimate, and how much of their time must lie after the move. What a request
did before the move is only inferred. With half of the time after it, an error of 5% in that
inference is 5% of the estimate, with a quarter 15%; with three quarters a trial in the wrong
direction is ended so late that the worst simulated server has 3% less."""

OVERLOADED, FEWEST_FAILURES = 0.1, 3
"""Share of failed requests that is a sign of overload, and the fewest that are: a server that loses
one in a hundred at random must not shrink to nothing."""

RECENT = 16
"""Latest clean samples, in which a change of the server shows."""


class Measurement:
    """What was measured at one limit since it was last moved."""

    def __init__(self, limit: int, *, rate_before: float | None = None) -> None:
        """`rate_before`: tokens per second that a request had before the move, where known."""
        self._limit = limit
        self._rate_before = rate_before
        self._settled_at: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._early = 0
        self._early_tokens = self._early_seconds = self._whole_seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """Measure anew at the same limit, which is in effect already."""
        self._count = self._tokens = self._failures = self._with_queue_times = 0
        self._seconds = self._queued = self._paces = self._squared_paces = 0.0
        self._shares: list[float] = []

    def succeeded(self, attempt: Attempt, in_flight: int) -> None:
        """A completion has arrived; `in_flight` other requests have not ended."""
        if self._settled_at is None:
            if in_flight <= self._limit:
                self._settled_at = attempt.ended
            return
        if in_flight + 1 < BINDING * self._limit:
            return
        before = max(0.0, self._settled_at - attempt.started)
        if before and self._rate_before is None:
            return
        self._early += 1
        self._early_tokens += attempt.tokens - before * (self._rate_before or 0.0)
        self._early_seconds += attempt.seconds - before
        self._whole_seconds += attempt.seconds
        if before:
            return
        self._recent.append((attempt.tokens, attempt.seconds))
        self._count += 1
        self._tokens += attempt.tokens
        self._seconds += attempt.seconds
        if attempt.tokens:
            pace = attempt.seconds / attempt.tokens
            self._paces += pace
            self._squared_paces += pace * pace
        if attempt.queue_seconds is not None:
            self._with_queue_times += 1
            self._queued += attempt.queue_seconds

    def failed(self, attempt: Attempt) -> bool:
        """A request failed in a way that overload brings; whether so many did that it is one."""
        if self._settled_at is None or attempt.started < self._settled_at:
            return False
        self._failures += 1
        share = self._failures / (self._count + self._failures)
        return self._failures >= FEWEST_FAILURES and share >= OVERLOADED

    def saw_queue(self, share: float) -> None:
        """A poll found this share of the requests at the server waiting."""
        if self._settled_at is not None:
            self._shares.append(share)

    @property
    def full(self) -> bool:
        """There are enough clean samples."""
        return self._count >= min(MOST, max(FEWEST, self._limit)) and self._seconds > 0

    @property
    def rate(self) -> float:
        """Tokens per second of one request, from clean samples."""
        return self._tokens / self._seconds

    @property
    def spread(self) -> float:
        """Standard deviation of the seconds per token of requests, relative to their mean."""
        if not self._paces:
            return 0.0
        squared = self._count * self._squared_paces / self._paces**2
        return math.sqrt(max(0.0, squared - 1.0))

    @property
    def early_rate(self) -> float | None:
        """The same before there are enough clean samples, from the time after the move of all
        samples; None where that is too little."""
        enough = max(EARLY, self._limit / 4)
        if self._early < enough or self._early_seconds < EARLY_SHARE * self._whole_seconds:
            return None
        return max(0.0, self._early_tokens) / self._early_seconds

    @property
    def recent_rate(self) -> float | None:
        """Of the latest clean samples; None where there are too few."""
        seconds = sum(seconds for _, seconds in self._recent)
        if len(self._recent) < RECENT or not seconds:
            return None
        return sum(tokens for tokens, _ in self._recent) / seconds

    @property
    def queue_share(self) -> float | None:
        """Share of their time that requests waited in the server's queues; None where nobody told.

        By Little's law it is also the share of the requests in flight that wait."""
        if self._with_queue_times and self._seconds:
            return self._queued / self._seconds
        return sum(self._shares) / len(self._shares) if self._shares else None


START = 16
"""Keeps a small server busy, and is four doublings from 256."""

HIGHEST = 512
"""A bound where nobody gave one: sockets and memory of one process."""

BIG_STEP = 2.0
"""Steps while the best is far away. With 1.5 the worst falls to 0.84: the way is longer and each
overshoot as dear. With 3 to 0.76: beyond a knee where throughput collapses, what is in flight takes
minutes to drain."""

SMALL_STEP = 1.2
"""Steps around the best, at least by one. A trial beyond a steep knee costs most of its time: with
1.5 the worst is 0.80. 1.1 is as good as 1.2 here, but its gain is within a real server's noise."""

ACCELERATION = 2.0
"""Power by which a step grows when its trial is kept: 1.2, 1.44, 2. Four times the
capacity is found in four trials."""

WORTH = 0.07
"""Least elasticity (relative gain of throughput per relative gain of the limit) for which more
requests are kept in flight. It leaves 7% of what an endlessly saturating server has to give. With
0.15 that server falls by another 2%; 0.02 gains 1% there and goes three times as far for it."""

COSTS_NOTHING = 0.03
"""Elasticity below which fewer requests cost nothing: they wait in no queue and fail in no outage.
Below `WORTH`, or trials would go up and down in turn."""

CLEARLY = 0.5
"""Elasticity at which a trial up is kept on an early estimate while the best is far: half of what a
server with room to spare gives. Makes a doubling take one completion's time instead of two."""

HOPELESS = 0.85
"""Share of the throughput before, below which a trial ends on an early estimate. With 0.7 the mean
falls by 0.5%; 0.95 gains 0.3% here, but is as close as an early estimate errs."""

LONGEST_HOLD = 6
"""Measurements from a failed trial to the next, after a few have failed. With 2 the worst is 0.86:
trials cost. With 12 a server that grew is noticed so late that it has 0.895."""

BACK_OFF = 0.97
"""Of the requests that a server took when it turned others away. With 0.9, 6% more of a server
with a hard limit is idle, with TCP's 0.5, 36% more. With 1.0 nothing is left for whoever shares
the limit with us."""


OVERLOAD_CUT = 0.7
"""Of the limit, where so many fail with 5xx or time out. There, unlike with a 429, what the server
could have taken is unknown."""

SLOWED, SPED_UP = 0.7, 1.3
"""Change of what a request gets that shows another server. Noise of 16 requests is a few percent; a
change that matters is a factor of 2 and more. (0.5, 2) and (0.85, 1.15) do as well."""

SIGMAS = 5.0
"""Standard errors that such a change must have besides. It is looked for at every completion: where
the pace of requests differs by 40%, three of them came by chance every few minutes, and throughput
fell to two thirds."""

SMOOTHING = 0.3
"""Weight of the newest measurement at an unchanged limit: evens out about five."""

QUEUE_ENOUGH = 0.05
"""Share of their time that requests wait in the server's queue: from here on no more are tried."""

QUEUE_TOO_LONG, QUEUE_KEPT = 0.3, 1.15
"""From this share on, the limit goes to what is in service (Little's law), and 15% more, so that
the queue never runs dry between two completions."""


_TINY = 1e-9
"""Of a throughput or its gain: keeps completions without tokens from dividing by zero."""


class ServerLoad(NamedTuple):
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
        self._measurement = Measurement(start)
        self._base: _Base | None = None
        self._trial = 0
        """+1 or -1 while a trial further up or down is on."""
        self._next = 1
        """Direction of the next trial."""
        self._step = BIG_STEP
        self._far = True
        """No trial has failed since the server was new or changed: the best is far away."""
        self._hold = self._held = 0
        """Measurements from a failed trial to the next, and how many of them have passed."""
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
            self._measurement.succeeded(attempt, in_flight)
            if self._trial:
                self._decide_trial()
            else:
                self._watch()

    def observe(self, load: ServerLoad) -> None:
        """Take a poll of the server's metrics into account."""
        if load.waiting or load.running:
            self._measurement.saw_queue(load.waiting / (load.waiting + load.running))
        if load.preempted and not self._trial:
            self._cut(self._limit * BACK_OFF)

    def _failed(self, attempt: Attempt, in_flight: int) -> None:
        self._before_cuts = self._before_cuts or self._limit
        if attempt.status == 429:
            # Those in flight are what the server did take.
            self._cut(in_flight * BACK_OFF)
        elif self._measurement.failed(attempt):
            self._cut(self._limit * OVERLOAD_CUT)

    def _cut(self, to: float) -> None:
        if to < self._limit:
            self._wait_longer()
            self._base, self._trial, self._next = None, 0, 1
            self._move(to)

    def _decide_trial(self) -> None:
        assert self._base is not None  # noqa: S101 - narrows the type
        best, measurement = max(self._base.throughput, _TINY), self._measurement
        early = measurement.early_rate
        if measurement.full:
            moved = abs(math.log(self._limit / self._base.limit))
            gain = math.log(max(self._limit * measurement.rate / best, _TINY)) / moved
            kept = gain > (WORTH if self._trial > 0 else -COSTS_NOTHING)
            self._end_trial(measurement.rate if kept else None)
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
        self._base = _Base(
            self._limit, rate, self._measurement.spread, rough=not self._measurement.full
        )
        self._hold, self._next = 0, trial
        self._step = min(BIG_STEP, self._step**ACCELERATION)
        self._go_on()

    def _watch(self) -> None:
        """Measure where we are, and see whether the server has changed."""
        recent = self._measurement.recent_rate
        if self._base is not None and not self._base.rough and recent is not None:
            noise = SIGMAS * self._base.spread / math.sqrt(RECENT)
            change = recent / self._base.rate
            if change < min(SLOWED, 1 / (1 + noise)):
                self._changed(-1)
                self._move(self._limit / BIG_STEP)
                return
            if change > max(SPED_UP, 1 + noise):
                self._changed(1)
                self._measurement.restart()
                return
        if self._measurement.full:
            rate = self._measurement.rate
            if self._base is not None and not self._base.rough:
                rate = self._base.rate + SMOOTHING * (rate - self._base.rate)
            self._base = _Base(self._limit, rate, self._measurement.spread, rough=False)
            self._held += 1
            self._go_on()

    def _go_on(self) -> None:
        """After a measurement: the next trial, or stay for another measurement."""
        queue = self._measurement.queue_share
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
        self._measurement.restart()

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
        self._measurement = Measurement(limit, rate_before=self._base.rate if self._base else None)
        return moved
