"""What a drawing shows, read from its SVG: lines, bars and dots in the units of its labels."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 62, 388, 12, 184
"""The plot in drawings of a page, which its script counts on."""


class Drawing:
    def __init__(self, svg: str) -> None:
        self.root = ElementTree.fromstring(svg)  # noqa: S314

    def group(self, name: str) -> ElementTree.Element | None:
        return self.root.find(f".//g[@id='{name}']")

    def pieces(self, name: str) -> list[list[Point]]:
        """Corners of each unbroken piece, at least two, of the path of that name."""
        group = self.group(name)
        path = "" if group is None else "".join(p.attrib["d"] for p in group.iter("path"))
        found = [
            [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", piece)]
            for piece in path.split("M")[1:]
        ]
        return [piece for piece in found if len(piece) > 1]

    def dots(self, name: str) -> list[Point]:
        group = self.group(name)
        circles = [] if group is None else group.iter("circle")
        return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]

    def height(self, name: str) -> tuple[float, float]:
        """Foot and top of a bar, as values; both 0 where there is none."""
        ys = [self.value(y) for piece in self.pieces(name) for _, y in piece]
        return (min(ys), max(ys)) if ys else (0.0, 0.0)

    @property
    def x_labels(self) -> list[str]:
        """Labels of the horizontal axis; its name is the last text of its kind."""
        flat = [t for t in self.root.iter("text") if "transform" not in t.attrib]
        return [t.text or "" for t in flat if t.get("text-anchor") == "middle"][:-1]

    @property
    def y_labels(self) -> dict[str, float]:
        """Labels of the vertical axis, and where their lines lie."""
        lines = [p for p in self.root.iter("path") if p.get("stroke") == "#dcdcd6"]
        labels = [t for t in self.root.iter("text") if t.get("text-anchor") == "end"]
        ys = [float(line.attrib["d"].split()[-1]) for line in lines]
        return {t.text or "": y for t, y in zip(labels, ys, strict=False)}

    @property
    def value(self) -> Callable[[float], float]:
        """From a height in the drawing to a value, by the labels of a linear axis."""
        (_, foot), *_, (top, end) = self.y_labels.items()
        bottom, high = float(next(iter(self.y_labels)).replace(",", "")), _number(top)
        return lambda y: bottom + (y - foot) / (end - foot) * (high - bottom)

    @property
    def titles(self) -> list[str]:
        return [title.text or "" for title in self.root.iter("title")]


def _number(label: str) -> float:
    factor = {"k": 1e3, "M": 1e6}.get(label[-1], 1.0)
    return float(label.rstrip("kM").replace(",", "")) * factor
