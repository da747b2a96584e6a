"""What became of a run, from its attempts: counts, latency, tokens, requests in flight, cost. Pure.

Invariant: memory does not grow with the run, and every attempt is in exactly one of completions,
retries and failures. What the events do not tell is named as unknown, never counted as 0.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from annotated_types import Ge

from eval_protocol_rft._options import Flag
from eval_protocol_rft.sampling._telemetry import AttemptEvent
from eval_protocol_rft.sampling._types import FailureKind

QUANTILE_ERROR = 0.01
"""Most that a latency quantile may be off, as a part of itself."""
SHORTEST = 1e-4
"""Seconds. Latencies below are told as 0."""
SERIES_POINTS = 64
"""Most points of the series of requests in flight."""
_FIRST_WIDTH = 2.0**-4
"""Seconds of a point before the run is too long for that: a power of two, so that doubling it is
exact."""
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Dollars per million tokens.

    Raises:
        ValueError: one is no amount of money.
    """

    prompt: Annotated[float, Ge(0), Flag("--price-in", only=True, metavar="USD", panel="Run")]
    """Per million prompt tokens; with --price-out, the end says what it cost."""
    completion: Annotated[float, Ge(0), Flag("--price-out", only=True, metavar="USD", panel="Run")]
    """Per million sampled tokens."""

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"the price of {name} tokens must be a number of dollars, at least 0, got "
                    f"{getattr(self, name)}"
                )


class InFlight(NamedTuple):
    """Requests in flight, on average over a part of the run."""

    start: float
    """Seconds since the first request began."""
    seconds: float
    mean: float


class Cost(NamedTuple):
    """Dollars for the completions, and for failed attempts as far as their tokens are known."""

    completion: float
    prompt: float | None
    """None where the prompt length of a completion was not told."""

    def __str__(self) -> str:
        if self.prompt is None:
            return f"completions ${self.completion:,.4f}, prompts unknown"
        total = self.prompt + self.completion
        return f"${total:,.4f}: prompts ${self.prompt:,.4f}, completions ${self.completion:,.4f}"


class RunSummary:
    """Told of each attempt of a run as it ends. `add` is an `Observer`."""

    def __init__(self, *, prices: Prices | None = None) -> None:
        self._prices = prices
        self._latency = LatencyHistogram()
        self._series = InFlightSeries()
        self._prompt_tokens = 0
        self._unknown_prompts = 0
        self.completions = 0
        self.retries: Counter[str] = Counter()
        """Failed attempts with another one to come, by cause: `unavailable 503`."""
        self.failures: Counter[FailureKind] = Counter()
        """Completions given up, by the kind of their last failure."""
        self.tokens = 0
        """Tokens of completions."""
        self.wasted_tokens = 0
        """Tokens that failed attempts report. No sampler reports any today, so: a lower bound."""
        self.uncounted = 0
        """Failed attempts without tokens and without an HTTP error status (cut off, late, broken
        replies): the server may have sampled tokens for them, and nobody knows how many."""
        self.wasted_seconds = 0.0
        """Sum of the times of all failed attempts."""
        self.max_in_flight = 0
        """Exact where every request ends in an event; cancelled ones are not seen."""

    def add(self, event: AttemptEvent) -> None:
        """Count one attempt. The cost needs the length of its prompt."""
        attempt, prompt_tokens = event.attempt, event.prompt_tokens
        self._series.add(attempt.started, attempt.ended)
        # Between two ends the number only grows, so its peaks are right before an end.
        self.max_in_flight = max(self.max_in_flight, event.in_flight + 1)
        if attempt.kind is None:
            self.completions += 1
            self.tokens += attempt.tokens
            self._latency.add(attempt.seconds)
            self._prompt_tokens += prompt_tokens or 0
            self._unknown_prompts += prompt_tokens is None
            return
        if event.gives_up:
            self.failures[attempt.kind] += 1
        else:
            self.retries[attempt.cause] += 1
        self.wasted_tokens += attempt.tokens
        self.wasted_seconds += attempt.seconds
        self.uncounted += not attempt.tokens and (attempt.status or 0) < 400

    @property
    def attempts(self) -> int:
        return self.completions + self.retries.total() + self.failures.total()

    @property
    def seconds(self) -> float:
        """Wall time: from the first start to the last end."""
        return self._series.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of completions over wall time; None where no time has passed."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def mean_in_flight(self) -> float | None:
        """Over wall time; None where no time has passed."""
        return self._series.busy / self.seconds if self.seconds else None

    def latency(self, percent: int) -> float | None:
        """Seconds within which `percent` % of the completions' last attempts ended: the least
        such latency, off by at most `QUANTILE_ERROR` of itself. None without completions."""
        return self._latency.quantile(percent)

    def in_flight(self) -> list[InFlight]:
        """Requests in flight over time: at most `SERIES_POINTS` points that cover the run."""
        return self._series.points()

    @property
    def cost(self) -> Cost | None:
        """None where no prices are known."""
        if self._prices is None:
            return None
        completion = (self.tokens + self.wasted_tokens) * self._prices.completion / 1e6
        prompt = self._prompt_tokens * self._prices.prompt / 1e6
        return Cost(completion, None if self._unknown_prompts else prompt)

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        return _lines(self)


class LatencyHistogram:
    """Counts in buckets whose bounds grow by a constant factor, as DDSketch has them (Masson et
    al., 2019, arXiv:1908.10693): from `SHORTEST` to an hour in under 900 buckets."""

    _GROWTH = (1 + QUANTILE_ERROR) / (1 - QUANTILE_ERROR)
    _LOG_GROWTH = math.log(_GROWTH)

    def __init__(self) -> None:
        self._counts: Counter[int | None] = Counter()
        """By i: how many in (growth^(i-1), growth^i]; None: below `SHORTEST`."""

    def add(self, seconds: float) -> None:
        short = seconds < SHORTEST
        self._counts[None if short else math.ceil(math.log(seconds) / self._LOG_GROWTH)] += 1

    def quantile(self, percent: int) -> float | None:
        """As `RunSummary.latency`.

        Raises:
            ValueError: `percent` is not in [0, 100].
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent={percent}: a quantile lies in [0, 100]")
        # In whole numbers: 0.07 * 100 is more than 7 in floating point.
        left = max(-(-percent * self._counts.total() // 100), 1)
        for bucket in sorted(self._counts, key=lambda i: -math.inf if i is None else i):
            left -= self._counts[bucket]
            if left <= 0:
                # The value that is as far, in parts of itself, from one bound as from the other.
                return 0.0 if bucket is None else 2 * self._GROWTH**bucket / (self._GROWTH + 1)
        return None


class InFlightSeries:
    """Requests in flight over time, integrated exactly over each point.

    A point is a stretch of time that keeps, of the starts and ends within, how many more starts
    there are (`net`) and how much more their times sum to (`moment`). Both add up, so when the run
    outgrows `SERIES_POINTS` points two become one. Attempts may come in any order.
    """

    def __init__(self) -> None:
        self._zero = self._began = self._ended = 0.0
        self._width = _FIRST_WIDTH
        self._points: dict[int, tuple[int, float]] = {}
        self.busy = 0.0
        """Seconds that attempts took, summed."""

    @property
    def seconds(self) -> float:
        return self._ended - self._began

    def add(self, started: float, ended: float) -> None:
        if not self._points:
            # Times count from the first one told: small numbers, whose sums stay precise.
            self._zero, self._began, self._ended = started, 0.0, ended - started
        start, end = started - self._zero, ended - self._zero
        self._began, self._ended = min(self._began, start), max(self._ended, end)
        self.busy += ended - started
        while self._index(self._ended) - self._index(self._began) >= SERIES_POINTS:
            self._halve()
        self._note(self._index(start), 1, start)
        self._note(self._index(end), -1, -end)

    def _index(self, time: float) -> int:
        return math.floor(time / self._width)

    def _note(self, index: int, net: int, moment: float) -> None:
        old_net, old_moment = self._points.get(index, (0, 0.0))
        self._points[index] = (old_net + net, old_moment + moment)

    def _halve(self) -> None:
        old, self._points = self._points, {}
        self._width *= 2
        for index, (net, moment) in old.items():
            self._note(index >> 1, net, moment)

    def points(self) -> list[InFlight]:
        points: list[InFlight] = []
        level = 0
        if not self.seconds:
            return points
        for index in range(self._index(self._began), self._index(self._ended) + 1):
            net, moment = self._points.get(index, (0, 0.0))
            low = max(index * self._width, self._began)
            high = min((index + 1) * self._width, self._ended)
            if high > low:
                area = level * (high - low) + net * high - moment
                mean = max(area / (high - low), 0.0)  # rounding may leave a little below zero
                points.append(InFlight(low - self._began, high - low, mean))
            level += net
        return points


def _lines(run: RunSummary) -> list[str]:
    if not run.attempts:
        return ["attempts   none"]
    lines = [
        f"attempts   {run.attempts:,}: {run.completions:,} completed, "
        f"{run.retries.total():,} retried, {run.failures.total():,} given up"
    ]
    for name, counts in (("retries", run.retries), ("failures", run.failures)):
        if counts:
            listed = ", ".join(f"{count:,}x {cause}" for cause, count in counts.most_common())
            lines.append(f"{name:<10} {listed}")
    quantiles = [(percent, run.latency(percent)) for percent in (50, 95, 99)]
    texts = [f"p{percent} {_seconds(value)}" for percent, value in quantiles if value is not None]
    lines.append(f"latency    {'  '.join(texts) or 'no completion'}")
    rate = "" if run.tokens_per_second is None else f", {run.tokens_per_second:,.0f}/s"
    lines.append(f"tokens     {run.tokens:,} in {run.seconds:,.1f} s{rate}")
    if run.wasted_seconds:
        unknown = f"; unknown for {run.uncounted:,} failed attempts" if run.uncounted else ""
        lines.append(
            f"wasted     {run.wasted_seconds:,.1f} s, {run.wasted_tokens:,} tokens{unknown}"
        )
    mean = "" if run.mean_in_flight is None else f"mean {run.mean_in_flight:.1f}, "
    lines.append(f"in flight  {mean}max {run.max_in_flight:,}  {_bars(run.in_flight())}".rstrip())
    cost = run.cost
    if cost is not None:
        lines.append(f"cost       {cost}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 1000 else f"{value:.3g} s"


def _bars(points: list[InFlight]) -> str:
    top = max((point.mean for point in points), default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[math.ceil(point.mean / top * steps)] for point in points) if top else ""
