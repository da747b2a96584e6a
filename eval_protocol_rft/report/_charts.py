"""The charts of all pages: histograms, pass@k, lines and layers over the steps of a run.

Invariant: what is drawn is what was measured. A line joins neighbours only: it breaks where a value
is missing, and a value without neighbours is a dot. A bar is as high as its count. What the pointer
tells is never a mean that is only drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval_protocol_rft._statistics import Array, Bar, PassAtK
from eval_protocol_rft.report import _svg as drawing
from eval_protocol_rft.report._html import visible
from eval_protocol_rft.report._svg import LARGEST, PLOT, light, own_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES_COLOURS = 6
_MOST_DOTS = 60
"""Up to so many values of an evaluation each get a dot."""
_MOST_COLUMNS = 200
"""Layers of more steps are drawn as means of neighbours."""
_LETTER, _LINE = 7.5, 16.0
"""Width of a letter and height of a line, in units of the drawing."""
_PLACES = 8
"""So many places along a bar its name may stand at, above it or below."""
_WIDEST_BAR = 72.0
"""A few bars as wide as the plot would look like a flag."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps; NaN where a value is missing."""

    name: str
    steps: Sequence[int]
    values: Array
    evaluated: bool = False
    """Of evaluations: neighbours are further apart, and each value gets a dot."""
    colour: int = 0

    @property
    def drawable(self) -> bool:
        return bool(np.any(~np.isnan(self.values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing and what is written around it."""

    id: str
    title: str
    svg: str = ""
    """Empty where there is nothing to draw."""
    numbers: Sequence[Sequence[str]] = ()
    """What is drawn, as a table: its head, then its rows."""
    keys: Sequence[tuple[str, int]] = ()
    """Names and colours."""
    series: Sequence[Series] = ()
    """What the pointer tells of."""
    note: str = ""
    nothing: str = ""
    """Why there is nothing to draw, where that is so."""


@own_settings
def histogram(
    name: str,
    title: str,
    bins: Sequence[Bar],
    *,
    label: str,
    unit: str = "completions",
    marked: tuple[str, Sequence[int]] | None = None,
    whole_numbers: bool = False,
    nothing: str,
) -> Chart:
    """Bars of one width, one per bin: marked values below, the others above.

    Args:
        marked: a name for some of them, and how many of each bin have it.
        whole_numbers: the bins hold integers, so 3 <= v < 4 is just 3.
        nothing: why there is nothing to draw where there are no bins.
    """
    if not bins:
        return Chart(id=name, title=title, nothing=nothing)
    names = [_bin_name(b, whole_numbers=whole_numbers) for b in bins]
    mark, marks = marked or ("", [0] * len(bins))
    numbers = [[label, unit] + [mark] * bool(mark)]
    numbers += [
        [values, f"{b.count:,}"] + [f"{of_them:,}"] * bool(mark)
        for values, b, of_them in zip(names, bins, marks, strict=True)
        if b.count
    ]
    figure = drawing.new_figure()
    axes = drawing.plot_axes(figure, label, unit)
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.set_xticks(*_bin_ticks(bins, whole_numbers=whole_numbers))
    drawing.linear_axis(axes, 0, max(b.count for b in bins), whole_numbers=True)
    slot = (PLOT["right"] - PLOT["left"]) / len(bins)
    width = min(0.88, _WIDEST_BAR / slot)
    counts, below = np.array([b.count for b in bins]), np.array(marks)
    titles = {}
    for part, colour, foot, height in (
        ("marked", "c1", np.zeros_like(below), below),
        ("bar", "c0", below, counts - below),
    ):
        places = np.flatnonzero(height)
        drawn = axes.bar(places, height[places], width, foot[places], color=light(colour))
        for i, bar in zip(places.tolist(), drawn, strict=True):
            bar.set_gid(f"{name}-{part}-{i}")
            of_them = f", {marks[i]:,} of them {mark}" if mark else ""
            titles[f"{name}-{part}-{i}"] = f"{names[i]}: {bins[i].count:,}{of_them}"
    svg = drawing.as_svg(figure, name, f"{sum(b.count for b in bins):,} {unit}", titles=titles)
    keys = [(mark, 1)] if mark else []
    return Chart(id=name, title=title, svg=svg, numbers=numbers, keys=keys)


@own_settings
def pass_curve(name: str, points: Sequence[PassAtK], *, nothing: str) -> Chart:
    """pass@k over k, k on a logarithmic axis."""
    if not points:
        return Chart(id=name, title="pass@k", nothing=nothing)
    numbers = [["k", "pass@k", "prompts"]]
    numbers += [[str(p.k), f"{p.value:.4f}", f"{p.groups:,}"] for p in points]
    last = points[-1].k
    figure = drawing.new_figure()
    axes = drawing.plot_axes(figure, "k (completions drawn)", "share of prompts")
    axes.set_xlim(*((0, math.log2(last)) if last > 1 else (-0.5, 0.5)))
    ks = sorted({1, last, *(2**i for i in range(last.bit_length()))})
    if len(ks) > 2 and last / ks[-2] < 1.3:
        ks.pop(-2)  # its label would run into the last one's
    axes.set_xticks([math.log2(k) for k in ks], [str(k) for k in ks])
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5", "0.75", "1"])
    places, heights = [math.log2(p.k) for p in points], [p.value for p in points]
    axes.plot(places, heights, "o-", color=light("c0"), lw=2, gid=f"{name}-0")
    titles = [f"pass@{p.k} = {p.value:.4f} over {p.groups:,} prompts" for p in points]
    ends = f"pass@1 {heights[0]:.3f}, pass@{last} {heights[-1]:.3f}"
    svg = drawing.as_svg(figure, name, ends, dots=titles, radius=3.5 if len(points) <= 32 else 2)
    return Chart(id=name, title="pass@k", svg=svg, numbers=numbers)


@own_settings
def curves(
    name: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    span: tuple[int, int],
    *,
    log: bool = False,
    bars: Sequence[tuple[float, str]] = (),
    window: int = 0,
    note: str = "",
    nothing: str,
) -> Chart:
    """Lines over the steps of a run.

    Args:
        span: first and last step of the axis.
        log: whether the vertical axis is logarithmic; values up to `LOG_FOOT` lie at its foot.
        bars: values not to go over, with their names; drawn as horizontal lines.
        window: draw means over so many steps, and what they are of behind them; 0: no means.
        nothing: why there is nothing to draw where no series has a value.
    """
    series = [one for one in series if one.drawable]
    if not series:
        return Chart(id=name, title=title, nothing=nothing)
    if window and not all(one.evaluated for one in series):
        note = f"Strong: means over {window} steps. {note}".strip()
    figure = drawing.new_figure()
    axes = drawing.plot_axes(figure, "step", unit)
    drawing.steps_axis(axes, span)
    known = np.concatenate([*(one.values for one in series), np.array([bar for bar, _ in bars])])
    known = np.clip(known[~np.isnan(known)], -LARGEST, LARGEST)
    foot = drawing.log_axis(axes, known) if log else -LARGEST
    if not log:
        drawing.linear_axis(axes, float(known.min()), float(known.max()))
    for i, one in enumerate(series):
        values, gid, many = one.values, f"{name}-{i}", bool(window) and not one.evaluated
        if many:
            _line(axes, one, values, foot=foot, gid=f"{gid}-each", lw=1, alpha=0.35)
            values = smoothed(values, window)
        _line(axes, one, values, foot=foot, gid=gid, lw=1.8)
    _draw_bars(axes, bars, f"{name}-bar")
    return _of_steps(figure, name, title, series, note)


@own_settings
def layers(
    name: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    span: tuple[int, int],
    *,
    shares: bool,
    note: str = "",
    nothing: str,
) -> Chart:
    """Areas on each other over the steps of a run, the first one lowest.

    Args:
        series: of the same steps; a step where one is missing is left empty.
        shares: of their sum, so that all steps are equally high.
        nothing: why there is nothing to draw where there are no series.
    """
    if not series or not len(series[0].steps):
        return Chart(id=name, title=title, nothing=nothing)
    steps = series[0].steps
    size = math.ceil(len(steps) / _MOST_COLUMNS)
    if size > 1:
        note = f"Drawn as means over {size} steps. {note}".strip()
    heights = np.array([binned(np.clip(one.values, 0, LARGEST), size) for one in series])
    total = heights.sum(axis=0)
    if shares:
        heights = np.divide(heights, total, out=np.full_like(heights, np.nan), where=total > 0)
    starts = np.array(steps[::size], np.float64)
    # A lost step is a gap, not a wider neighbour.
    ends = np.minimum(np.append(starts[1:], steps[-1] + 1.0), starts + size)
    gaps = np.flatnonzero(ends[:-1] < starts[1:])
    edges = np.insert(np.append(starts, ends[-1]), gaps + 1, ends[gaps]) - 0.5
    heights = np.insert(heights, gaps + 1, np.nan, axis=1)
    figure = drawing.new_figure()
    axes = drawing.plot_axes(figure, "step", unit)
    drawing.steps_axis(axes, span)
    tops = np.cumsum(heights, axis=0)
    drawing.linear_axis(axes, 0, 1 if shares or np.all(np.isnan(tops)) else float(np.nanmax(tops)))
    for i, one in enumerate(series):
        axes.stairs(
            tops[i],
            np.clip(edges, *span),
            baseline=tops[i] - heights[i],
            fill=True,
            color=light(f"c{one.colour % SERIES_COLOURS}"),
            alpha=0.85,
            gid=f"{name}-{i}",
        )
    return _of_steps(figure, name, title, series, note)


def _of_steps(figure: Figure, name: str, title: str, series: Sequence[Series], note: str) -> Chart:
    ends = [_ends(one) for one in series]
    description = "; ".join(
        f"{visible(label)} from {first} to {last}" for label, first, last, *_ in ends
    )
    return Chart(
        id=name,
        title=title,
        svg=drawing.as_svg(figure, name, description, pointed=True),
        numbers=[["", "first", "last", "lowest (step)", "highest (step)"], *ends],
        keys=[(one.name, one.colour % SERIES_COLOURS) for one in series],
        series=series,
        note=note,
    )


@own_settings
def picture(title: str, series: Sequence[Series]) -> str:
    """Scores of evaluations as one small picture for a README. It brings its own background, light
    or dark as the reader's screen is. At its end each line has its name and its last value.

    Args:
        title: of the picture; any text.
        series: at most two, each with a value.
    """
    steps = [step for one in series for step in one.steps]
    figure = drawing.new_figure(720, 360)
    axes = drawing.plot_axes(figure, "training step", "", (64, 624, 64, 300))
    axes.tick_params(labelsize=15)
    axes.xaxis.label.set_fontsize(15)
    drawing.steps_axis(axes, (min(steps), max(*steps, min(steps) + 1)))
    known = np.concatenate([one.values[~np.isnan(one.values)] for one in series])
    drawing.linear_axis(axes, float(known.min()), float(known.max()))
    ends = [int(np.flatnonzero(~np.isnan(one.values))[-1]) for one in series]
    low, high = axes.get_ylim()
    places = [
        (float(one.values[i]) - low) / (high - low) for one, i in zip(series, ends, strict=True)
    ]
    for k, (one, i, y) in enumerate(zip(series, ends, _apart(places, 40 / 236), strict=True)):
        _line(axes, one, one.values, gid=f"curve-{k}", lw=3)
        axes.annotate(
            f"{one.name}\n{one.values[i]:.3f}",
            (one.steps[i], y),
            (10, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="center",
            size=15,
            weight="bold",
            color=light(f"c{one.colour}"),
            gid=f"curve-end-{k}",
            annotation_clip=False,
        )
    heading = f"{title}: held-out score"
    return drawing.as_file(
        drawing.as_svg(figure, "curve", "", radius=4), heading, f"{heading} against training step"
    )


def smoothed(values: Array, window: int) -> Array:
    """[N] means over `window` values (an odd number) around each one, fewer at the ends.

    A value that is missing is in no mean, and stays missing.
    """
    known = ~np.isnan(values)
    kernel = np.ones(window)
    half = window // 2
    sums = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(known.astype(np.float64), kernel)[half : half + len(values)]
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan)


def binned(values: Array, size: int) -> Array:
    """[ceil(N / size)] means of `size` neighbours each, over those that are not missing."""
    padded = np.full(math.ceil(len(values) / size) * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, size)
    counts = np.sum(~np.isnan(rows), axis=1)
    means = np.full(len(rows), np.nan)
    np.divide(np.nansum(rows, axis=1), counts, out=means, where=counts > 0)
    return means


def _line(
    axes: Axes, series: Series, values: Array, *, foot: float = -LARGEST, **style: Any
) -> None:
    """One series, broken where a value is missing, or in training a whole step."""
    steps, values = np.asarray(series.steps, np.float64), np.clip(values, foot, LARGEST)
    if not series.evaluated:
        gaps = np.flatnonzero(np.diff(steps) > 1) + 1
        steps, values = np.insert(steps, gaps, steps[gaps]), np.insert(values, gaps, np.nan)
    known = ~np.isnan(values)
    around = np.pad(known, 1)
    every = series.evaluated and len(series.steps) <= _MOST_DOTS
    dots = known if every else known & ~around[:-2] & ~around[2:]
    axes.plot(
        steps,
        values,
        color=light(f"c{series.colour % SERIES_COLOURS}"),
        marker="o" if dots.any() else None,
        markevery=np.flatnonzero(dots).tolist(),
        **style,
    )


def _draw_bars(axes: Axes, bars: Sequence[tuple[float, str]], gid: str) -> None:
    """Values not to go over, as lines across the plot; each has its name where the least of what is
    drawn lies below it, and no other bar's name."""
    into_plot, place = axes.transData - axes.transAxes, axes.transAxes
    lines = [_points_along(into_plot.transform(line.get_xydata())) for line in axes.lines]
    points = np.concatenate([*lines, np.empty((0, 2))])
    taken: list[tuple[float, float, float, float]] = []
    for value, name in bars:
        axes.axhline(value, ls=(0, (4, 3)), lw=1, color=light("bad"))
        _, y = into_plot.transform((axes.get_xlim()[0], value))
        width = _LETTER * len(name) / (PLOT["right"] - PLOT["left"])
        height = _LINE / (PLOT["bottom"] - PLOT["top"])
        boxes = [
            (x, x + width, foot, foot + height)
            for foot in (y, y - height)
            for x in np.linspace(0.01, 1 - width, _PLACES)
            if foot >= 0 and foot + height <= 1.02
        ]
        boxes = [box for box in boxes if not any(_overlap(box, other) for other in taken)] or boxes
        if boxes:
            left, _, foot, _ = box = min(boxes, key=lambda box: _count_inside(points, box))
            taken.append(box)
            side = "bottom" if foot == y else "top"
            axes.text(left, y, name, transform=place, va=side, color=light("bad"), gid=gid)


def _points_along(line: Array) -> Array:
    """[N, 2] points of a line, close enough to be seen wherever it passes."""
    places = np.linspace(0, len(line) - 1, max(10 * len(line), 1_000))
    return np.stack([np.interp(places, np.arange(len(line)), column) for column in line.T], axis=1)


def _count_inside(points: Array, box: tuple[float, float, float, float]) -> int:
    low, high = np.array([box[0], box[2]]), np.array([box[1], box[3]])
    return int(np.sum(np.all((points >= low) & (points <= high), axis=1)))


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


def _bin_ticks(bins: Sequence[Bar], *, whole_numbers: bool) -> tuple[list[float], list[str]]:
    """Places and labels below bars: of single values in the middle, as many as have room; of ranges
    at their edges, the round ones."""
    plot_width = PLOT["right"] - PLOT["left"]
    room = max(2, int(plot_width / (max(len(f"{b.low:g}") for b in bins) * 8 + 14)))
    if all(b.low == b.high or (whole_numbers and b.high - b.low == 1) for b in bins):
        shown = range(0, len(bins), math.ceil(len(bins) / room))
        return [*shown], [f"{bins[i].low:g}" for i in shown]
    edges = [*(b.low for b in bins), bins[-1].high]
    step = drawing.nice_step(edges[-1] - edges[0], room)
    ticks = [
        (i - 0.5, f"{edge:g}")
        for i, edge in enumerate(edges)
        if abs(math.remainder(edge, step)) < step / 1e4
    ]
    return [place for place, _ in ticks], [name for _, name in ticks]


def _bin_name(b: Bar, *, whole_numbers: bool) -> str:
    if b.low == b.high:
        return f"{b.low:g}"
    if whole_numbers:
        return f"{b.low:g}" if b.high - b.low == 1 else f"{b.low:g} to {b.high - 1:g}"
    return f"{b.low:g} to below {b.high:g}"


def _ends(series: Series) -> list[str]:
    """A series in a line: its name, first and last value, and its extremes with their steps."""
    known = np.flatnonzero(~np.isnan(series.values))
    if not len(known):
        return [series.name, "", "", "", ""]
    values = series.values[known]
    low, high = known[values.argmin()], known[values.argmax()]
    return [
        series.name,
        *(f"{series.values[i]:.4g}" for i in (known[0], known[-1])),
        *(f"{series.values[i]:.4g} ({series.steps[i]:,})" for i in (low, high)),
    ]


def _apart(places: Sequence[float], room: float) -> list[float]:
    """Heights of one or two labels, in shares of the plot, moved so that neither covers the other,
    the axis below or the title above."""
    if len(places) == 1:
        return [max(places[0], room / 2)]
    lower, upper = sorted(places)
    lack = max(0.0, room - (upper - lower))
    upper = min(upper + lack / 2, 1.0)
    lower = max(min(lower - lack / 2, upper - room), room / 2)
    upper = max(upper, lower + room)
    return [lower, upper] if places[0] <= places[1] else [upper, lower]
