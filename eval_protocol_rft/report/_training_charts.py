"""Geometry of curves over the steps of a run. Pure: series in, coordinates and labels out.

Invariant: a line joins neighbours only; where a value is missing it breaks, and a value without
neighbours is a dot.

Figures from series: curves with their means, and layers on each other. Pure.

Invariant: the pointer is told what was measured, never a mean that is only drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from eval_protocol_rft.report._charts import FRAME, BarChart, Frame, Tick, nice_step
from eval_protocol_rft.report._training_series import (
    FloatArray,
    Measured,
    binned,
    smoothed,
    smoothing_window,
)

LOG_FOOT = 1e-8
"""The lowest value that a logarithmic axis tells from others: below is rounding."""
MOST_DOTS = 60
"""Up to so many values of an evaluation each get a dot."""
MOST_COLUMNS = 200
"""Stacked areas of more steps are drawn as means of neighbours."""


@dataclass(frozen=True, slots=True)
class Span:
    """The steps that the horizontal axis goes over."""

    low: int
    high: int
    frame: Frame = FRAME

    @classmethod
    def over(cls, steps: Sequence[int], frame: Frame = FRAME) -> Span:
        """All of `steps`; at least one wide."""
        low, high = (min(steps), max(steps)) if steps else (0, 1)
        return cls(low, max(high, low + 1), frame)

    def x(self, step: float) -> float:
        share = (step - self.low) / (self.high - self.low)
        return self.frame.left + share * (self.frame.right - self.frame.left)

    def ticks(self) -> list[Tick]:
        step = max(1, round(nice_step(self.high - self.low, 5)))
        first = math.ceil(self.low / step) * step
        return [Tick(self.x(s), f"{s:,}") for s in range(first, self.high + 1, step)]


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps, and how they are drawn."""

    name: str
    steps: Sequence[int]
    values: FloatArray
    evaluated: bool = False
    """Of evaluations: neighbours are further apart, and each value gets a dot."""
    faint: bool = False
    """Behind a smoothed one."""
    colour: int = 0

    @property
    def drawable(self) -> bool:
        return bool(np.any(~np.isnan(self.values)))


@dataclass(frozen=True, slots=True)
class Curve:
    """One drawn series."""

    series: Series
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A horizontal line with a name: a bar not to go over."""

    value: float
    label: str
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class Area:
    """One layer of a stack."""

    name: str
    colour: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing over the steps."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    columns_of: int = 1
    """Steps whose mean a column of the areas is."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to heights."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    frame: Frame = FRAME

    def y(self, value: float) -> float:
        if self.log:
            share = (math.log10(max(value, self.low) / self.low)) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.frame.y(share)

    def labels(self) -> list[Tick]:
        return [Tick(self.y(value), label) for value, label in self.ticks]


def linear_scale(values: FloatArray, *, frame: Frame = FRAME) -> Scale:
    """From 0, or below where values are, to a round number above all."""
    known = values[~np.isnan(values)]
    low, high = (min(0.0, known.min()), max(0.0, known.max())) if len(known) else (0.0, 1.0)
    step = nice_step(high - low, 4)
    first = math.floor(low / step * (1 + 1e-9))
    last = max(math.ceil(high / step * (1 - 1e-9)), first + 1)
    ticks = tuple((i * step, _plain(i * step)) for i in range(first, last + 1))
    return Scale(first * step, last * step, ticks, frame=frame)


def log_scale(values: FloatArray, *, frame: Frame = FRAME) -> Scale:
    """Over the decades of the values; what is not above `LOG_FOOT` lies on the axis."""
    known = values[~np.isnan(values)]
    above = known[known > LOG_FOOT]
    high = math.ceil(math.log10(above.max()) - 1e-9) if len(above) else -6
    low = math.floor(math.log10(above.min()) + 1e-9) if len(above) else -8
    under = len(above) < len(known)
    if under:
        low = round(math.log10(LOG_FOOT))
    high = max(high, low + 1)
    every = math.ceil((high - low) / 5)
    ticks = [
        (10.0**i, f"1e{i}" if abs(i) > 3 else f"{10.0**i:g}") for i in range(low, high + 1, every)
    ]
    if under:
        ticks[0] = (ticks[0][0], f"≤{ticks[0][1]}")
    return Scale(10.0**low, 10.0**high, tuple(ticks), log=True, frame=frame)


def line_chart(
    series: Sequence[Series], span: Span, *, log: bool = False, marks: Sequence[Mark] = ()
) -> Chart:
    """Lay out curves. Those with no value at all are left out."""
    drawn = [one for one in series if one.drawable]
    values = np.concatenate([*(one.values for one in drawn), np.array([m.value for m in marks])])
    scale = (log_scale if log else linear_scale)(values, frame=span.frame)
    return Chart(
        x_ticks=span.ticks(),
        y_ticks=scale.labels(),
        curves=[curve(one, span, scale) for one in drawn],
        marks=[Mark(m.value, m.label, scale.y(m.value)) for m in marks] if drawn else [],
    )


def curve(series: Series, span: Span, scale: Scale) -> Curve:
    """The path of a series: broken where a value, or a whole step, is missing."""
    runs: list[list[tuple[float, float]]] = []
    before: int | None = None
    for step, value in zip(series.steps, series.values.tolist(), strict=True):
        if math.isnan(value):
            before = None
            continue
        if before is None or (not series.evaluated and step > before + 1):
            runs.append([])
        runs[-1].append((span.x(step), scale.y(value)))
        before = step
    path = " ".join(_joined(run) for run in runs if len(run) > 1)
    every = series.evaluated and len(series.steps) <= MOST_DOTS
    dots = [point for run in runs if every or len(run) == 1 for point in run]
    return Curve(series, path, dots)


def stacked_chart(
    parts: Mapping[str, FloatArray], steps: Sequence[int], span: Span, *, shares: bool
) -> Chart:
    """Lay out areas on each other, the first one lowest.

    Args:
        parts: [len(steps)] each; a step where one is missing is left empty.
        shares: of their sum, so that all steps are equally high.
    """
    size = math.ceil(len(steps) / MOST_COLUMNS) or 1
    names = list(parts)
    if not names or not steps:
        return Chart(x_ticks=[], y_ticks=[])
    heights = np.array([binned(parts[name], size) for name in names])
    if shares:
        total = heights.sum(axis=0)
        heights = np.divide(heights, total, out=np.full_like(heights, np.nan), where=total > 0)
    tops = np.cumsum(heights, axis=0)
    highest = np.array([1.0]) if shares else tops.reshape(-1)
    scale = linear_scale(highest, frame=span.frame)
    starts = np.array(steps[::size], np.float64)
    ends = np.append(starts[1:], steps[-1] + 1.0)
    # A lost step is a gap, not a wider neighbour.
    ends = np.minimum(ends, starts + size)
    edges = [
        (span.x(max(a - 0.5, span.low)), span.x(min(b - 0.5, span.high)))
        for a, b in zip(starts, ends, strict=True)
    ]
    areas = []
    for i, name in enumerate(names):
        lower = tops[i] - heights[i]
        filled = [
            (*edge, scale.y(top), scale.y(low))
            for edge, top, low in zip(edges, tops[i].tolist(), lower.tolist(), strict=True)
            if not math.isnan(top)
        ]
        areas.append(Area(name, i, " ".join(_outline(run) for run in _touching(filled))))
    return Chart(x_ticks=span.ticks(), y_ticks=scale.labels(), areas=areas, columns_of=size)


_Column = tuple[float, float, float, float]
"""Left, right, top, bottom."""


def _touching(columns: Sequence[_Column]) -> list[list[_Column]]:
    runs: list[list[_Column]] = [[column] for column in columns[:1]]
    for before, column in pairwise(columns):
        if column[0] - before[1] > 1e-6:
            runs.append([])
        runs[-1].append(column)
    return runs


def _outline(run: Sequence[_Column]) -> str:
    upper = [p for left, right, top, _ in run for p in ((left, top), (right, top))]
    lower = [p for left, right, _, low in reversed(run) for p in ((right, low), (left, low))]
    return _joined([*upper, *lower]) + "Z"


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x:.2f},{y:.1f}" for x, y in points)


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return (
        f"{value:.4g}"
        if abs(value) >= 1e-3
        else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    )


UNMEASURED = "not measured in this run"
MANY_STEPS = 150
"""Of more steps than this the eye sees a band: means are drawn over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One chart and what is written around it."""

    id: str
    title: str
    unit: str
    """Of the vertical axis."""
    chart: Chart | BarChart
    series: list[Series] = field(default_factory=list)
    """What the pointer is told; those with no value are left out."""
    note: str = ""
    label: str = "step"
    """Of the horizontal axis."""
    nothing: str = ""
    """Why there is nothing to draw, where that is so."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Draws what was measured in one run; all charts have the same horizontal axis."""

    steps: Measured
    evaluations: Measured
    span: Span

    def of_steps(self, name: str, values: FloatArray, *, colour: int = 0) -> Series:
        return Series(name, self.steps.steps, values, colour=colour)

    def of_evaluations(self, name: str, values: FloatArray, colour: int = 0) -> Series:
        return Series(name, self.evaluations.steps, values, evaluated=True, colour=colour)

    def curves(
        self,
        id: str,  # noqa: A002
        title: str,
        unit: str,
        series: Sequence[Series],
        *,
        log: bool = False,
        marks: Sequence[Mark] = (),
        note: str = "",
        smooth_from: float = MANY_STEPS,
    ) -> Figure:
        told = [one for one in series if one.drawable]
        drawn = told
        window = smoothing_window(len(self.steps.lines))
        many = len(self.steps.lines) > max(window, smooth_from)
        if many and not all(one.evaluated for one in told):
            drawn = [one for raw in told for one in _with_means(raw, window)]
            note = f"Strong: means over {window} steps. {note}".strip()
        return Figure(
            id=id,
            title=title,
            unit=unit,
            chart=line_chart(drawn, self.span, log=log, marks=marks),
            series=told,
            note=note,
            nothing="" if told else UNMEASURED,
        )

    def layers(
        self,
        id: str,  # noqa: A002
        title: str,
        unit: str,
        parts: dict[str, FloatArray],
        *,
        shares: bool,
        nothing: str,
        note: str = "",
    ) -> Figure:
        chart = stacked_chart(parts, self.steps.steps, self.span, shares=shares)
        if chart.columns_of > 1:
            note = f"Drawn as means over {chart.columns_of} steps. {note}".strip()
        series = [self.of_steps(n, v, colour=i) for i, (n, v) in enumerate(parts.items())]
        return Figure(
            id=id,
            title=title,
            unit=unit,
            chart=chart,
            series=series,
            note=note,
            nothing="" if parts else nothing,
        )


def _with_means(raw: Series, window: int) -> list[Series]:
    if raw.evaluated:
        return [raw]
    return [replace(raw, faint=True), replace(raw, values=smoothed(raw.values, window))]
