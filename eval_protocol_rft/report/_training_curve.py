"""A run's held-out scores as one small picture for a README. Pure.

Invariant: the picture brings its own background, light or dark as the reader's screen is, so that
it can be read on either, whatever page it stands on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from eval_protocol_rft.report._charts import Frame
from eval_protocol_rft.report._page import visible
from eval_protocol_rft.report._training_charts import Scale, Series, Span, curve, linear_scale
from eval_protocol_rft.report._training_series import Measured

_FRAME = Frame(width=720, height=360, left=64, right=624, top=64, bottom=300)
_LONGEST_TITLE = 60
_LABEL_HEIGHT = 40.0
_STYLE = """
.paper{fill:#fdfdfc;stroke:#dcdcd6}.grid{stroke:#dcdcd6}.axis{stroke:#5c646d}
text{fill:#5c646d;font:15px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.title{fill:#1f2328;font-size:18px;font-weight:600}
.line{fill:none;stroke-width:3;stroke-linejoin:round}.end{font-weight:600}
.a .line{stroke:#2f6fa8}.a circle,.a text{fill:#2f6fa8}
.b .line{stroke:#b5651d}.b circle,.b text{fill:#b5651d}
@media (prefers-color-scheme:dark){
.paper{fill:#16191d;stroke:#343b43}.grid{stroke:#343b43}.axis{stroke:#9aa3ad}
text{fill:#9aa3ad}.title{fill:#e4e6e8}
.a .line{stroke:#7db1e0}.a circle,.a text{fill:#7db1e0}
.b .line{stroke:#e0a060}.b circle,.b text{fill:#e0a060}}
""".replace("\n", "")


def curve_svg(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str | None:
    """Held-out scores, sampled and greedy, against the step; None where there are none.

    Args:
        lines: of `metrics.jsonl`.
        settings: of `settings.json`; `evaluator` names the picture.
    """
    evaluations = Measured.of(lines, "eval")
    kinds = (("sampled", "a"), ("greedy", "b"))
    found = [
        (Series(name, evaluations.steps, evaluations.values(f"{name}_score"), True), colour)
        for name, colour in kinds
    ]
    found = [(series, colour) for series, colour in found if series.drawable]
    if not found:
        return None
    span = Span.over(evaluations.steps, _FRAME)
    scale = linear_scale(np.concatenate([series.values for series, _ in found]), frame=_FRAME)
    title = _title(str(settings.get("evaluator") or "training run"))
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FRAME.width} {_FRAME.height}" '
        f'width="{_FRAME.width}" height="{_FRAME.height}" role="img" aria-labelledby="t">',
        f'<title id="t">{title}: held-out score against training step</title>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{_FRAME.width - 1}" '
        f'height="{_FRAME.height - 1}" rx="6"/>',
        f'<text class="title" x="20" y="34">{title}: held-out score</text>',
        *_axes(span, scale),
        *_curves(found, span, scale),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _axes(span: Span, scale: Scale) -> list[str]:
    f = _FRAME
    parts = [
        f'<line class="grid" x1="{f.left}" x2="{f.right}" y1="{tick.at:.1f}" '
        f'y2="{tick.at:.1f}"/><text text-anchor="end" x="{f.left - 8}" '
        f'y="{tick.at + 5:.1f}">{tick.label}</text>'
        for tick in scale.labels()
    ]
    parts += [
        f'<text text-anchor="middle" x="{tick.at:.1f}" y="{f.bottom + 22}">{tick.label}</text>'
        for tick in span.ticks()
    ]
    middle = (f.left + f.right) / 2
    parts.append(
        f'<line class="axis" x1="{f.left}" x2="{f.right}" y1="{f.bottom}" y2="{f.bottom}"/>'
        f'<text text-anchor="middle" x="{middle}" y="{f.height - 14}">training step</text>'
    )
    return parts


def _curves(found: Sequence[tuple[Series, str]], span: Span, scale: Scale) -> list[str]:
    """Curves, each with its name and last value at its end."""
    ends = [_last(series) for series, _ in found]
    heights = _apart([scale.y(value) for _, value in ends])
    parts = []
    for (series, colour), (step, value), height in zip(found, ends, heights, strict=True):
        drawn = curve(series, span, scale)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in drawn.dots)
        x = span.x(step) + 10
        parts.append(
            f'<g class="{colour}"><path class="line" d="{drawn.path}"/>{dots}'
            f'<text class="end" x="{x:.1f}" y="{height + 5:.1f}">{series.name}'
            f'<tspan x="{x:.1f}" dy="18">{value:.3f}</tspan></text></g>'
        )
    return parts


def _last(series: Series) -> tuple[int, float]:
    place = int(np.flatnonzero(~np.isnan(series.values))[-1])
    return series.steps[place], float(series.values[place])


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved so that none covers another; in the order given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for above, below in pairwise(order):
        if (lack := _LABEL_HEIGHT - (placed[below] - placed[above])) > 0:
            placed[above] -= lack / 2
            placed[below] += lack / 2
    lowest = max(placed) - (_FRAME.bottom - 18)
    return [height - max(0.0, lowest) for height in placed]


def _title(evaluator: str) -> str:
    shown = visible(evaluator)
    if len(shown) > _LONGEST_TITLE:
        shown = shown[: _LONGEST_TITLE - 1] + "…"
    return escape(shown)
