"""Plots by matplotlib as SVG that a page can hold.

Invariant: a page that allows no style in attributes shows the drawing whole: colours, sizes and
fonts are attributes, and a style sheet (`theme`) turns them to a dark screen. Equal numbers give
equal bytes, whatever the user's own settings of matplotlib are. Matplotlib is imported by the first
drawing and not before.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from eval_protocol_rft._statistics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

COLOURS = {
    "paper": ("#fdfdfc", "#16191d"),
    "ink": ("#1f2328", "#e4e6e8"),
    "soft": ("#5c646d", "#9aa3ad"),
    "line": ("#dcdcd6", "#343b43"),
    "bad": ("#a23a2c", "#ec9485"),
    "c0": ("#3b74a8", "#78b0e0"),
    "c1": ("#c8762b", "#e0a060"),
    "c2": ("#2f855a", "#6cc295"),
    "c3": ("#7a5cb8", "#b79cf0"),
    "c4": ("#b0413e", "#ee8f85"),
    "c5": ("#6b7280", "#8b95a1"),
}
"""Colours on a light screen and on a dark one; `c0` to `c5` tell series apart."""


WIDTH, HEIGHT = 400, 230
PLOT = {"left": 62, "right": 388, "top": 12, "bottom": 184}
"""The drawing, and the plot in it; around the plot there is room for labels."""
LOG_FOOT = 1e-8
"""The lowest value that a logarithmic axis tells from others: below is rounding."""
LARGEST = 1e300
"""What is larger is drawn as this: axes end above it, within floats."""
_HALO = {"stroke": COLOURS["paper"][0], "stroke-width": "3", "paint-order": "stroke"}
"""Of a text that lines may pass below: it stays readable."""
_ROUND = (1, 2, 5, 10)
"""Ticks stand at multiples of these, times a power of ten."""


def light(colour: str) -> str:
    return COLOURS[colour][0]


_SETTINGS: dict[str, Any] = {
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), light("soft")),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size"), 0),
    **dict.fromkeys(("ytick.minor.size", "axes.xmargin", "axes.ymargin"), 0),
    "axes.axisbelow": True,
    "axes.edgecolor": light("soft"),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": light("line"),
    "grid.linewidth": 1,
    "font.size": 13,
    "lines.solid_capstyle": "butt",
    "text.color": light("soft"),
    "xtick.major.pad": 5,
    "ytick.major.pad": 6,
    "svg.fonttype": "none",
}


def own_settings(draw: Callable[P, T]) -> Callable[P, T]:
    """Whatever the user's own settings of matplotlib are, the drawing is the same."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        with _silent_matplotlib():
            import matplotlib.figure
            import matplotlib.style
        with matplotlib.style.context(["default", _SETTINGS]):
            return draw(*args, **kwargs)

    return drawn


@contextlib.contextmanager
def _silent_matplotlib() -> Iterator[None]:
    """Importing it may take long once, or find no folder to write to: it warns of its caches, which
    change nothing in a drawing."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def theme() -> str:
    """Style sheet of all drawings: the colours as variables, and the attributes that name them.
    Who cannot read it sees the drawing in the colours of a light screen."""
    light = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    rules = "\n".join(
        f'.chart [{part}="{pair[0]}"]{{{part}:var(--{name})}}'
        for name, pair in COLOURS.items()
        for part in ("fill", "stroke")
    )
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f'{rules}\n.chart text{{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}'
    )


def new_figure(width: int = WIDTH, height: int = HEIGHT) -> Figure:
    """An empty drawing, in which points are units of the SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    return figure


def plot_axes(
    figure: Figure, label: str, unit: str, plot: Sequence[int] = tuple(PLOT.values())
) -> Axes:
    """An empty plot, with what its axes show. `plot`: its left, right, top and bottom."""
    left, right, top, bottom = plot
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    )
    axes.patch.set_visible(False)
    axes.spines["bottom"].set_zorder(3)
    axes.set_xlabel(label, va="bottom")
    axes.set_ylabel(unit, va="center")
    axes.xaxis.set_label_coords((left + right) / 2 / width, 5 / height, figure.transFigure)
    axes.yaxis.set_label_coords(6 / width, 1 - (top + bottom) / 2 / height, figure.transFigure)
    return axes


def steps_axis(axes: Axes, span: tuple[int, int]) -> None:
    """Steps from first to last on the horizontal axis, with round labels."""
    from matplotlib.ticker import MaxNLocator

    low, high = span
    ticks = np.asarray(MaxNLocator(5, steps=_ROUND, integer=True).tick_values(low, high))
    ticks = ticks[(low <= ticks) & (ticks <= high)]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])


def linear_axis(axes: Axes, low: float, high: float, *, whole_numbers: bool = False) -> None:
    """A vertical axis from 0, or below where values are, to a round number above all."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(0.0, low), max(0.0, high)
    # Of a span that floats cannot divide, the axis is that of nothing.
    high = high if high - low > sys.float_info.min else low + 1
    locator = MaxNLocator(4, steps=_ROUND, integer=whole_numbers, min_n_ticks=1)
    ticks = np.asarray(locator.tick_values(low, high))
    ticks = ticks if low < 0 else ticks[ticks >= 0]
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks, [_plain(tick) for tick in ticks])


def log_axis(axes: Axes, values: Array) -> float:
    """A vertical axis over the decades of the values; the lowest value that lies on it."""
    above = values[values > LOG_FOOT]
    high = math.ceil(math.log10(above.max()) - 1e-9) if len(above) else -6
    low = math.floor(math.log10(above.min()) + 1e-9) if len(above) else -8
    under = len(above) < len(values)
    if under:
        low = round(math.log10(LOG_FOOT))
    high = max(high, low + 1)
    decades = range(low, high + 1, math.ceil((high - low) / 5))
    names = [f"1e{i}" if abs(i) > 3 else f"{10.0**i:g}" for i in decades]
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    axes.set_yticks([10.0**i for i in decades], ["≤" * under + names[0], *names[1:]])
    axes.set_yticks([], minor=True)
    return 10.0**low


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten of which `parts` span at least `span`;
    1 where there is nothing to span, or too little for a float to be divided exactly."""
    least = span / parts
    if least < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10, 20) if m * power >= least * (1 - 1e-9))


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def as_svg(
    figure: Figure,
    id: str,  # noqa: A002
    description: str,
    *,
    titles: Mapping[str, str] | None = None,
    dots: Sequence[str] = (),
    pointed: bool = False,
    radius: float = 2.5,
) -> str:
    """The figure as an element of a page that allows no style in attributes.

    Args:
        id: `<id>-title` is the element that names it.
        description: what it shows, for who cannot see it.
        titles: ids in the drawing -> what is told of them under the pointer.
        dots: what is told of each dot, in order.
        pointed: whether the page's script tells values of the step under the pointer.
        radius: of dots.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    root = ElementTree.fromstring(text.getvalue())  # noqa: S314
    root.attrib = {
        "class": "chart",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{id}-title",
        "aria-describedby": f"{id}-description",
        **({"data-chart": id, "tabindex": "0"} if pointed else {}),
    }
    for element in reversed(list(root.iter())):
        element.tag = element.tag.rpartition("}")[2]
        element.text = (element.text or "").strip() or None
        element.tail = None
        for child in list(element):
            if child.tag in ("defs", "metadata") or (child.tag == "g" and not len(child)):
                element.remove(child)
        # Names that matplotlib counts up are not the page's.
        if element.tag == "g" and not element.get("id", "").startswith(f"{id}-"):
            element.attrib.pop("id", None)
        _plain_attributes(element, radius)
        _entitle(element, (titles or {}).get(element.get("id", "")))
    for name in root.findall(f".//g[@id='{id}-bar']/text"):
        name.attrib.update(_HALO)
    for circle, title in zip(root.iter("circle"), dots, strict=False):
        _entitle(circle, title)
    about = ElementTree.Element("desc", {"id": f"{id}-description"})
    about.text = description
    root.insert(0, about)
    return ElementTree.tostring(root, encoding="unicode")


def as_file(svg: str, heading: str, description: str) -> str:
    """A drawing as a file of its own, on paper of its own. `description`: what it shows, for who
    cannot see it."""
    root = ElementTree.fromstring(svg)  # noqa: S314
    width, height = root.attrib["viewBox"].split()[2:]
    del root.attrib["aria-describedby"]
    root.attrib.update(xmlns="http://www.w3.org/2000/svg", width=width, height=height)
    name = ElementTree.Element("title", {"id": root.attrib["aria-labelledby"]})
    name.text = description
    style = ElementTree.Element("style")
    style.text = theme()
    paper = ElementTree.Element("rect", {"width": width, "height": height, "rx": "6"})
    paper.attrib.update(fill=light("paper"), stroke=light("line"))
    title = ElementTree.Element("text", {"x": "20", "y": "34", "fill": light("ink")})
    title.attrib.update({"font-size": "18px", "font-weight": "700"})
    title.text = heading
    root[:1] = [name, style, paper, title]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _entitle(element: ElementTree.Element, text: str | None) -> None:
    if text is not None:
        title = ElementTree.Element("title")
        title.text = text
        element.insert(0, title)


def _plain_attributes(element: ElementTree.Element, radius: float) -> None:
    """Style as attributes, short numbers, dots as circles."""
    style = dict(
        part.split(": ", 1) for part in element.attrib.pop("style", "").split("; ") if part
    )
    style.pop("font-family", None)
    element.attrib.pop("clip-path", None)
    if element.tag == "use":
        element.tag = "circle"
        place = {"cx": _short(element.attrib["x"]), "cy": _short(element.attrib["y"])}
        element.attrib = {**place, "r": f"{radius:g}", "fill": style["fill"]}
        return
    element.attrib.update(style)
    for name in ("d", "x", "y", "transform"):
        if name in element.attrib:
            element.attrib[name] = _short(element.attrib[name])
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]


def _short(numbers: str) -> str:
    """To hundredths of a unit."""
    numbers = re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers)
    path = " ".join(numbers.split()).replace(" L ", "L").replace("M ", "M").replace(" M", "M")
    return re.sub(r"(L[-\d. ]+)(?=\1(?![-\d. ]))", "", path)
