"""A deterministic discrete-event simulator: a server of some shape, and a run that samples from it
through the real `RunLimits`, `RetryPolicy` and `CompletionAttempts`.

The server shares itself out: `tokens_per_second(n)` is what n requests in service get together, in
equal parts, so a request is done when the work per request has grown by its tokens. Everything
else is a queue of timed events. No thread, task or real clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from eval_protocol_rft.sampling._limits import RunLimits, RunStoppedError
from eval_protocol_rft.sampling._retry import (
    Attempt,
    CompletionAttempts,
    RetryPolicy,
    failed_attempt,
)
from eval_protocol_rft.sampling._types import SamplingError

ROUND_TRIP = 0.05
"""Seconds that a request takes before it is in service, and that a refusal takes."""


@dataclass
class Server:
    """What a server can do. Times are seconds from the run's start."""

    tokens_per_second: Callable[[float], float]
    """Of n requests in service together, at scale 1."""
    slots: float = math.inf
    """Requests in service; more wait in a queue, first come first served."""
    reject_above: float = math.inf
    """Requests in service and in the queue; more get a 429."""
    scales: list[tuple[float, float]] = field(default_factory=list)
    """From a time on, the server is so many times as large: `(second, scale)`."""
    outages: list[tuple[float, float, str]] = field(default_factory=list)
    """`(from, to, how)`: "refused", "503" or "503 retry-after". What is in flight is cut off."""
    tells_queue: bool = False
    """It says how long a request waited in the queue."""

    def scale(self, now: float) -> float:
        return next((s for since, s in reversed(self.scales) if now >= since), 1.0)

    def rate(self, n: int, now: float) -> float:
        """Tokens per second of each of n requests in service. k times as large: k servers that
        have n / k each."""
        scale = self.scale(now)
        return scale * self.tokens_per_second(n / scale) / n

    def outage(self, now: float) -> str | None:
        return next((how for start, end, how in self.outages if start <= now < end), None)


@dataclass
class Result:
    seconds: float
    tokens: int = 0
    completions: int = 0
    failed: list[str] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[tuple[float, int]] = field(default_factory=list)
    """When completions came, and their tokens."""
    limits: list[tuple[float, int]] = field(default_factory=list)
    rejected: int = 0
    histories: list[list[Attempt]] = field(default_factory=list)
    stopped: tuple[float, str] | None = None
    finished: float | None = None
    """When the last completion was done, where the work was limited."""

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds

    def tokens_between(self, start: float, end: float) -> int:
        return sum(tokens for at, tokens in self.ends if start <= at < end)

    def most_starts_within(self, window: float, start: float, end: float) -> int:
        """Most requests in any `window` seconds between two times."""
        times = [at for at in self.starts if start <= at < end]
        best, first = 0, 0
        for last, at in enumerate(times):
            while times[first] <= at - window:
                first += 1
            best = max(best, last - first + 1)
        return best


@dataclass
class _Job:
    attempts: CompletionAttempts
    tokens: int
    name: int


@dataclass
class _Flight:
    job: _Job
    started: float
    probe: bool
    served_at: float = 0.0
    dead: bool = False


class Simulation:
    """`run()` once."""

    def __init__(
        self,
        server: Server,
        limits: RunLimits,
        *,
        lengths: Callable[[random.Random], int],
        seconds: float,
        jobs: int | None = None,
        policy: RetryPolicy | None = None,
        noise: float = 0.1,
        error_rate: float = 0.0,
        error: Callable[[int], SamplingError] = lambda n: SamplingError(
            "busy", kind="unavailable", status=503
        ),
        window: int | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            jobs: completions wanted; None for as many as fit into `seconds`.
            noise: standard deviation of a request's work relative to its tokens.
            error_rate: share of requests that fail with `error(name)` whatever the load.
            window: completions begun and not done; None for no bound.
        """
        self.server, self.limits = server, limits
        self.policy = policy or RetryPolicy()
        self.lengths, self.horizon, self.jobs = lengths, seconds, jobs
        self.noise, self.error_rate, self.error, self.window = noise, error_rate, error, window
        self.random = random.Random(seed)
        self.now = self.work = 0.0
        self.result = Result(seconds)
        self.serial: Iterator[int] = itertools.count()
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.serving: list[tuple[float, int, _Flight]] = []
        self.queue: deque[_Flight] = deque()
        self.ready: deque[_Job] = deque()
        self.made = self.open = 0
        self.wake_at = math.inf

    def run(self) -> Result:
        for start, end, _ in self.server.outages:
            self.at(start, self._cut_off)
            self.at(end, lambda: None)
        for at, _ in self.server.scales:
            self.at(at, self._serve)
        self._pump()
        while self.result.stopped is None:
            done_at, rate = math.inf, 0.0
            if self.serving:
                rate = self.server.rate(len(self.serving), self.now)
                done_at = self.now + (self.serving[0][0] - self.work) / rate
            at = min(done_at, self.timers[0][0] if self.timers else math.inf)
            if at >= self.horizon:
                break
            self.work += (at - self.now) * rate
            self.now = at
            if done_at <= at:
                _, _, flight = heapq.heappop(self.serving)
                self._serve()
                self._succeed(flight)
            else:
                heapq.heappop(self.timers)[2]()
            self._pump()
            if self.jobs is not None and self.made == self.jobs and not self.open:
                self.result.finished = self.now
                break
        return self.result

    # The client.

    def _pump(self) -> None:
        while True:
            if self.ready and self._start(self.ready[0], retry=True):
                self.ready.popleft()
                continue
            if self.jobs is not None and self.made >= self.jobs:
                return
            if self.window is not None and self.open >= self.window:
                return
            job = _Job(CompletionAttempts(self.policy), 0, self.made)
            if not self._start(job, retry=False):
                return
            self.made += 1
            self.open += 1

    def _start(self, job: _Job, *, retry: bool) -> bool:
        try:
            at = self.limits.earliest(self.now, retry=retry)
        except RunStoppedError as error:
            self.result.stopped = self.result.stopped or (self.now, str(error))
            return False
        if at > self.now:
            self._wake(at)
            return False
        if not job.tokens:
            job.tokens = max(1, self.lengths(self.random))
        probe = self.limits.started(self.now, retry=retry)
        self.result.starts.append(self.now)
        flight = _Flight(job, self.now, probe)
        self.at(self.now + ROUND_TRIP, lambda: self._arrive(flight))
        return True

    def _wake(self, until: float) -> None:
        if until < self.wake_at and until < self.horizon:
            self.wake_at = until

            def wake() -> None:
                self.wake_at = math.inf

            self.at(max(until, self.now), wake)

    def _succeed(self, flight: _Flight) -> None:
        attempt = Attempt(
            started=flight.started,
            ended=self.now,
            tokens=flight.job.tokens,
            queue_seconds=(
                flight.served_at - flight.started - ROUND_TRIP if self.server.tells_queue else None
            ),
            probe=flight.probe,
            prompt=flight.job.name,
        )
        flight.job.attempts.succeeded(attempt)
        self.result.tokens += attempt.tokens
        self.result.completions += 1
        self.result.ends.append((self.now, attempt.tokens))
        self._done(flight.job)
        self._report(attempt)

    def _fail(self, flight: _Flight, error: SamplingError) -> None:
        attempt = failed_attempt(
            error,
            started=flight.started,
            ended=self.now,
            probe=flight.probe,
            prompt=flight.job.name,
        )
        self.result.rejected += 1
        after = flight.job.attempts.failed(attempt, uniform=self.random.random())
        if after is not None:
            self.at(after, lambda: self.ready.append(flight.job))
        else:
            self.result.failed.append(attempt.cause)
            self._done(flight.job)
        self._report(attempt)

    def _report(self, attempt: Attempt) -> None:
        self.limits.ended(attempt)
        limit = self.limits.limit.limit
        if not self.result.limits or self.result.limits[-1][1] != limit:
            self.result.limits.append((self.now, limit))

    def _done(self, job: _Job) -> None:
        self.open -= 1
        self.result.histories.append(job.attempts.history)

    # The server.

    def _arrive(self, flight: _Flight) -> None:
        how = self.server.outage(self.now)
        if how == "refused":
            self._fail(flight, SamplingError("connection refused", kind="connection"))
        elif how is not None:
            asked = 20.0 if how.endswith("retry-after") else None
            self._fail(
                flight,
                SamplingError("scaling up", kind="unavailable", status=503, retry_after=asked),
            )
        elif self.error_rate and self.random.random() < self.error_rate:
            self._fail(flight, self.error(flight.job.name))
        elif len(self.serving) + len(self.queue) >= self.server.reject_above * self._scale():
            self._fail(flight, SamplingError("too many requests", kind="unavailable", status=429))
        else:
            self.queue.append(flight)
            self._serve()

    def _serve(self) -> None:
        while self.queue and len(self.serving) < self.server.slots * self._scale():
            flight = self.queue.popleft()
            flight.served_at = self.now
            work = flight.job.tokens * max(0.1, self.random.gauss(1.0, self.noise))
            heapq.heappush(self.serving, (self.work + work, next(self.serial), flight))

    def _cut_off(self) -> None:
        cut = [flight for _, _, flight in self.serving] + list(self.queue)
        self.serving.clear()
        self.queue.clear()
        for flight in cut:
            self._fail(flight, SamplingError("connection reset", kind="connection"))

    def _scale(self) -> float:
        return self.server.scale(self.now)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (when, next(self.serial), action))
