"""Geometry of the page's charts. Pure: numbers in, coordinates and labels out; the template draws.

Invariant: the height of a bar is proportional to its count.

Values counted in bins for the page's histograms. Pure.

Invariant: every value is in exactly one bin.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.report._page_stats import PassPoint

_MOST_SINGLE_VALUES = 12
"""Up to so many different values each get a bin of their own."""
_BINS = 20


@dataclass(frozen=True, slots=True)
class Bin:
    """How many values v lie in low <= v < high, or equal low where both are the same."""

    low: float
    high: float
    count: int
    marked: int = 0
    """Those of `count` to set apart."""


def reward_bins(rewards: NDArray[np.float64]) -> list[Bin]:
    """Each value by itself where there are few, else bins of one width with round edges."""
    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= _MOST_SINGLE_VALUES:
        return [Bin(float(v), float(v), int(n)) for v, n in zip(values, counts, strict=True)]
    edges = _edges(float(values[0]), float(values[-1]))
    place = np.searchsorted(edges, values, side="right") - 1
    totals = np.bincount(place, weights=counts, minlength=len(edges) - 1)
    return [
        Bin(low, high, int(total))
        for low, high, total in zip(edges[:-1], edges[1:], totals, strict=True)
    ]


def length_bins(lengths: Mapping[tuple[int, bool], int]) -> list[Bin]:
    """Bins of whole numbers, all of one width; `marked` counts truncated completions.

    Args:
        lengths: (tokens, truncated) -> completions.
    """
    if not lengths:
        return []
    low = min(length for length, _ in lengths)
    high = max(length for length, _ in lengths)
    step = max(1, round(nice_step(high - low + 1, _BINS)))
    start = low // step * step
    totals = [[0, 0] for _ in range((high - start) // step + 1)]
    for (length, truncated), count in lengths.items():
        totals[(length - start) // step][truncated] += count
    return [
        Bin(start + i * step, start + (i + 1) * step, whole + cut, cut)
        for i, (whole, cut) in enumerate(totals)
    ]


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten of which `parts` span at least `span`;
    1 where there is nothing to span, or too little for a float to be divided exactly."""
    least = span / parts
    if least < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10, 20) if m * power >= least * (1 - 1e-9))


def _edges(low: float, high: float) -> list[float]:
    """Bin edges from at most `low` to above `high`, round where floats allow it."""
    step = nice_step(high - low, _BINS)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step), math.floor(high / step)
    # Rounded, so that the edge at 0.3 is the number that a reward of 0.3 is.
    edges = [round(i * step, digits) for i in range(first - 1, last + 3)]
    below = [edge for edge in edges if edge <= low]
    within = sorted({edge for edge in edges if low < edge <= high})
    above = [edge for edge in edges if edge > high]
    return [
        below[-1] if below else low,
        *within,
        above[0] if above else math.nextafter(high, math.inf),
    ]


@dataclass(frozen=True, slots=True)
class Frame:
    """A drawing, and the plot in it; around the plot there is room for labels."""

    width: float = 400
    height: float = 230
    left: float = 62
    right: float = 388
    top: float = 12
    bottom: float = 184

    def y(self, share: float) -> float:
        """Where a bar ends that is `share` of the plot's height."""
        return self.bottom - share * (self.bottom - self.top)


FRAME = Frame()
_PLOT_WIDTH = FRAME.right - FRAME.left
_PLOT_HEIGHT = FRAME.bottom - FRAME.top
_GAP = 0.12
"""Share of a bin's width that stays empty, so that bars can be told apart."""
_WIDEST_BAR = 72.0
"""A few bars as wide as the plot would look like a flag."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at an axis, and where it belongs."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of two parts that stand on each other: marked below, the others above."""

    x: float
    width: float
    y: float
    height: float
    marked_y: float
    marked_height: float
    bin: Bin
    label: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """A histogram."""

    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a curve."""

    x: float
    y: float
    point: PassPoint


@dataclass(frozen=True, slots=True)
class CurveChart:
    """pass@k over k, k on a logarithmic axis."""

    dots: list[Dot]
    path: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def bar_chart(bins: Sequence[Bin], *, whole_numbers: bool = False) -> BarChart:
    """Lay out a histogram. `whole_numbers`: the bins hold integers, so 3 <= v < 4 is just 3."""
    top = max((b.count for b in bins), default=0)
    step = max(1.0, nice_step(top, 4))
    limit = max(step, math.ceil(top / step) * step)
    slot = _PLOT_WIDTH / max(1, len(bins))
    heights = [(b.count / limit * _PLOT_HEIGHT, b.marked / limit * _PLOT_HEIGHT) for b in bins]
    width = min(slot * (1 - _GAP), _WIDEST_BAR)
    bars = [
        Bar(
            x=FRAME.left + (i + 0.5) * slot - width / 2,
            width=width,
            y=FRAME.bottom - height,
            height=height - marked,
            marked_y=FRAME.bottom - marked,
            marked_height=marked,
            bin=b,
            label=_range(b, whole_numbers=whole_numbers),
        )
        for i, (b, (height, marked)) in enumerate(zip(bins, heights, strict=True))
    ]
    values = np.arange(0, limit + step / 2, step).tolist()
    return BarChart(
        bars=bars,
        x_ticks=_bin_ticks(bins, slot, whole_numbers=whole_numbers),
        y_ticks=[Tick(FRAME.y(value / limit), format(value, ",.0f")) for value in values],
    )


def curve_chart(points: Sequence[PassPoint]) -> CurveChart:
    """Lay out the pass@k curve."""
    last = points[-1].k if points else 1

    def x(k: int) -> float:
        return FRAME.left + (math.log(k) / math.log(last) if last > 1 else 0.5) * _PLOT_WIDTH

    dots = [Dot(x(point.k), FRAME.y(point.estimate), point) for point in points]
    ks = sorted({1, last, *(2**i for i in range(last.bit_length()))})
    if len(ks) > 2 and last / ks[-2] < 1.3:
        ks.pop(-2)  # its label would run into the last one's
    return CurveChart(
        dots=dots,
        path=" ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in dots),
        x_ticks=[Tick(x(k), str(k)) for k in ks],
        y_ticks=[Tick(FRAME.y(value), f"{value:g}") for value in (0, 0.25, 0.5, 0.75, 1)],
    )


def _bin_ticks(bins: Sequence[Bin], slot: float, *, whole_numbers: bool) -> list[Tick]:
    """Labels below bars: of single values in the middle, as many as have room; of ranges at their
    edges, the round ones."""
    if not bins:
        return []
    room = max(2, int(_PLOT_WIDTH / (max(len(f"{b.low:g}") for b in bins) * 8 + 14)))
    if all(b.low == b.high or (whole_numbers and b.high - b.low == 1) for b in bins):
        ticks = [Tick(FRAME.left + (i + 0.5) * slot, f"{b.low:g}") for i, b in enumerate(bins)]
        return ticks[:: math.ceil(len(ticks) / room)]
    edges = [*(b.low for b in bins), bins[-1].high]
    step = nice_step(edges[-1] - edges[0], room)
    return [
        Tick(FRAME.left + i * slot, f"{edge:g}")
        for i, edge in enumerate(edges)
        if abs(math.remainder(edge, step)) < step / 1e4
    ]


def _range(b: Bin, *, whole_numbers: bool) -> str:
    if b.low == b.high:
        return f"{b.low:g}"
    if whole_numbers:
        return f"{b.low:g}" if b.high - b.low == 1 else f"{b.low:g} to {b.high - 1:g}"
    return f"{b.low:g} to below {b.high:g}"
