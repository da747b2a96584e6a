"""What was measured since the limit was last moved. Pure.

Invariant: a clean sample is a completion whose request began after the move had taken effect, that
is after the first completion with no more than the limit in flight. By then a raised limit is
filled and a lowered one is drained. Samples count only while the limit was what held others back.
"""

from __future__ import annotations

import math
from collections import deque

from eval_protocol_rft.sampling.attempts import Attempt

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


class Epoch:
    """Measurements at one limit."""

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
        self._count = self._tokens = self._failures = self._told = 0
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
            self._told += 1
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
        """The same before the epoch is full, from the time after the move of all samples; None
        where that is too little."""
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
        if self._told and self._seconds:
            return self._queued / self._seconds
        return sum(self._shares) / len(self._shares) if self._shares else None
