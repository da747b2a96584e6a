"""The two charts of docs/performance.md, drawn from what the benchmarks wrote.

    python benchmarks/charts.py CLIENTS_JSON MAKESPAN_JSON [FOLDER]

Plain SVG, no library: colours come from a style that follows the reader's light or dark scheme.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import clients
import makespan
import msgspec

FOLDER = Path(__file__).parent.parent / "docs"
STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.small { font-size: 12px; fill: #57606a }
.grid { stroke: #d0d7de; stroke-width: 1 }
.line { fill: none; stroke-width: 2.2 }
.c0 { stroke: #6e7781 } .f0 { fill: #6e7781 }
.c1 { stroke: #0969da } .f1 { fill: #0969da }
.c2 { stroke: #1a9c8b } .f2 { fill: #1a9c8b }
.c3 { stroke: #bc4c00 } .f3 { fill: #bc4c00 }
.c4 { stroke: #8250df } .f4 { fill: #8250df }
.c5 { stroke: #bf3989 } .f5 { fill: #bf3989 }
.c6 { stroke: #cf222e } .f6 { fill: #cf222e }
.peer { stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d }
.c0 { stroke: #9198a1 } .f0 { fill: #9198a1 }
.c1 { stroke: #4c9dff } .f1 { fill: #4c9dff }
.c2 { stroke: #3fd0bd } .f2 { fill: #3fd0bd }
.c3 { stroke: #f0883e } .f3 { fill: #f0883e }
.c4 { stroke: #b083f0 } .f4 { fill: #b083f0 }
.c5 { stroke: #f778ba } .f5 { fill: #f778ba }
.c6 { stroke: #ff7b72 } .f6 { fill: #ff7b72 }
}
"""
COLOURS = {
    "bare": 0,
    "sampler": 1,
    "processor": 2,
    "deployment_sampler": 3,
    "openai": 4,
    "ep_client": 5,
    "litellm": 6,
}
"""The peers that are drawn, in the order of the legend."""
POLICIES = {"completions": ("a slot per completion (ours)", 1), "rows": ("a slot per row", 3)}
LEFT, PLOT_WIDTH, PLOT_HEIGHT, TOP = 56, 300, 260, 46


def text(
    x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turn: bool = False
) -> str:
    turned = f' transform="rotate(-90 {x:g} {y:g})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{turned}>'
        f"{escape(words)}</text>"
    )


def document(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label)}">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def panel(
    title: str,
    left: float,
    points: Sequence[clients.Point],
    *,
    of: str,
    ticks: Sequence[float],
) -> list[str]:
    """Lines over the number in flight; both axes are logarithmic."""
    levels = sorted({point.in_flight for point in points})
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    bottom = TOP + PLOT_HEIGHT

    def x(level: int) -> float:
        share = math.log(level / levels[0]) / math.log(levels[-1] / levels[0])
        return left + share * PLOT_WIDTH

    def y(value: float) -> float:
        return bottom - (math.log(value) - low) / (high - low) * PLOT_HEIGHT

    parts = [text(left, 22, title, kind="title")]
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{left:g}" x2="{left + PLOT_WIDTH:g}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/>'
        )
        parts.append(text(left - 8, y(tick) + 4, f"{tick:,g}", anchor="end", kind="small"))
    parts += [
        text(x(level), bottom + 20, f"{level:,}", anchor="middle", kind="small") for level in levels
    ]
    parts.append(text(left + PLOT_WIDTH / 2, bottom + 40, "requests in flight", anchor="middle"))
    for peer, colour in COLOURS.items():
        marks = [
            (x(p.in_flight), y(getattr(p, of)), p)
            for p in sorted(points, key=lambda p: p.in_flight)
            if p.peer == peer
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in marks)
        dashes = "" if colour in (1, 2) else " peer"
        parts.append(f'<polyline class="line c{colour}{dashes}" points="{path}"/>')
        parts += [
            f'<circle class="f{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"><title>'
            f"{escape(clients.LABELS[peer])}, {p.in_flight} in flight: {getattr(p, of):.3g}"
            "</title></circle>"
            for a, b, p in marks
        ]
    return parts


def clients_chart(result: clients.Result) -> str:
    """CPU per completion and throughput over the number in flight."""
    points = [point for point in result.points if point.peer in COLOURS]
    second = LEFT + PLOT_WIDTH + 84
    parts = panel(
        "CPU per completion, ms", LEFT, points, of="cpu_ms", ticks=_decades(points, "cpu_ms")
    )
    parts += panel(
        "Completions per second", second, points, of="per_second",
        ticks=_decades(points, "per_second"),
    )  # fmt: skip
    columns = (0, 170, 330, 480)
    for place, (peer, colour) in enumerate(COLOURS.items()):
        x = LEFT - 10 + columns[place % 4]
        y = TOP + PLOT_HEIGHT + 70 + 24 * (place // 4)
        dashes = "" if colour in (1, 2) else " peer"
        parts.append(
            f'<line class="line c{colour}{dashes}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y - 4}" '
            f'y2="{y - 4}"/>'
        )
        parts.append(text(x + 28, y, clients.LABELS[peer], kind="small"))
    label = "CPU per completion and throughput of each client over the requests in flight"
    return document(second + PLOT_WIDTH + 40, TOP + PLOT_HEIGHT + 110, label, parts)


def makespan_chart(result: makespan.Result) -> str:
    """Bars: how many times the lower bound each policy takes."""
    left, width, row = 232, 420, 30
    high = math.ceil(max(m.seconds / m.bound for m in result.makespans) + 0.2)
    names = list(dict.fromkeys(m.latencies for m in result.makespans))
    group = (len(POLICIES) + 2) * row + 14
    bottom = TOP + len(names) * group

    def x(value: float) -> float:
        return left + value / high * width

    parts = [text(14, 24, "Time of a job over the least it could take", kind="title")]
    for tick in range(high + 1):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        parts.append(text(x(tick), bottom + 18, f"{tick}x", anchor="middle", kind="small"))
    for place, name in enumerate(names):
        y = TOP + place * group + 20
        spread = {"lognormal": "lognormal, \u03c3 = 1", "bimodal": "90% 1x, 10% 10x"}[name]
        parts.append(text(14, y, f"latencies {spread}", kind="small"))
        of_name = [m for m in result.makespans if m.latencies == name]
        bars = [("list schedule, simulated", 0, of_name[0].simulated / of_name[0].bound)]
        bars += [(*POLICIES[m.policy], m.seconds / m.bound) for m in of_name]
        for words, colour, ratio in bars:
            y += row
            parts.append(text(left - 10, y, words, anchor="end"))
            parts.append(
                f'<rect class="f{colour}" x="{left}" y="{y - 14}" width="{x(ratio) - left:.1f}" '
                f'height="18" rx="2"/>'
            )
            parts.append(text(x(ratio) + 8, y, f"{ratio:.2f}x", kind="small"))
    label = "Makespan over the list-scheduling bound for slots per completion and slots per row"
    return document(left + width + 60, bottom + 34, label, parts)


def _decades(points: Sequence[clients.Point], of: str) -> list[float]:
    """1, 2 and 5 of every decade around the values."""
    values = [getattr(point, of) for point in points]
    steps = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5)]
    low = max(step for step in steps if step <= min(values))
    high = min(step for step in steps if step >= max(values))
    return [step for step in steps if low <= step <= high]


def main() -> None:
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else FOLDER
    measured = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=clients.Result)
    scheduled = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=makespan.Result)
    (folder / "clients.svg").write_text(clients_chart(measured), encoding="utf-8")
    (folder / "makespan.svg").write_text(makespan_chart(scheduled), encoding="utf-8")


if __name__ == "__main__":
    main()
