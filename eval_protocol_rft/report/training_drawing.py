"""Figures from series: curves with their means, and layers on each other. Pure.

Invariant: the pointer is told what was measured, never a mean that is only drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from eval_protocol_rft.report.page_charts import BarChart
from eval_protocol_rft.report.training_charts import (
    Chart,
    Mark,
    Series,
    Span,
    line_chart,
    stacked_chart,
)
from eval_protocol_rft.report.training_series import (
    FloatArray,
    Measured,
    smoothed,
    smoothing_window,
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
