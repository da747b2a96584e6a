"""The two charts of docs/performance.md, drawn from what the benchmarks wrote.

python benchmarks/charts.py CLIENTS_JSON MAKESPAN_JSON [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import clients
import makespan
import msgspec
from matplotlib.figure import Figure

from eval_protocol_rft.report._svg import (
    as_file,
    as_svg,
    light,
    new_figure,
    own_settings,
    plot_axes,
)

FOLDER = Path(__file__).parent.parent / "docs"
COLOURS = {
    "bare": "ink",
    "sampler": "c0",
    "processor": "c2",
    "deployment_sampler": "c1",
    "openai": "c3",
    "ep_client": "c5",
    "litellm": "c4",
}
"""The peers that are drawn, in the order of the legend."""
OURS = ("sampler", "processor")
POLICIES = {"completions": ("a slot per completion (ours)", "c0"), "rows": ("a slot per row", "c1")}
SPREADS = {"lognormal": "lognormal, \u03c3 = 1", "bimodal": "90% 1x, 10% 10x"}


def panel(figure: Figure, left: int, title: str, points: Sequence[clients.Point], of: str) -> None:
    """Lines over the number in flight; both axes are logarithmic."""
    axes = plot_axes(figure, "requests in flight", "", (left, left + 300, 76, 316))
    levels = sorted({point.in_flight for point in points})
    ticks = _decades([getattr(point, of) for point in points])
    axes.set_title(title, loc="left", size=15, color=light("ink"))
    axes.set(xscale="log", yscale="log", ylim=(ticks[0], ticks[-1]))
    axes.set_xticks(levels, [f"{level:,}" for level in levels])
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.xaxis.set_label_coords((left + 150) / 780, 78 / 436, figure.transFigure)
    for peer, colour in COLOURS.items():
        own = sorted((p.in_flight, getattr(p, of)) for p in points if p.peer == peer)
        axes.plot(
            *zip(*own, strict=True),
            "o-" if peer in OURS else "o--",
            color=light(colour),
            lw=2.2,
            label=clients.LABELS[peer],
        )


@own_settings
def clients_chart(result: clients.Result) -> str:
    """CPU per completion and throughput over the number in flight."""
    points = [point for point in result.points if point.peer in COLOURS]
    figure = new_figure(780, 436)
    panel(figure, 56, "CPU per completion, ms", points, "cpu_ms")
    panel(figure, 440, "Completions per second", points, "per_second")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="lower left",
        ncols=4,
        fontsize=12,
        frameon=False,
    )
    described = "CPU per completion and throughput of each client over the requests in flight"
    return as_file(as_svg(figure, "clients", ""), "Clients over HTTP", described)


@own_settings
def makespan_chart(result: makespan.Result) -> str:
    """Bars: how many times the lower bound each policy takes."""
    bars: list[tuple[str, str, float]] = []
    for name in dict.fromkeys(m.latencies for m in result.makespans):
        own = [m for m in result.makespans if m.latencies == name]
        simulated = own[0].simulated / own[0].bound
        bars += [(f"list schedule, simulated ({SPREADS[name]})", "soft", simulated)]
        bars += [(*POLICIES[m.policy], m.seconds / m.bound) for m in own]
    height = 110 + 34 * len(bars)
    figure = new_figure(760, height)
    axes = plot_axes(figure, "", "", (330, 690, 56, height - 44))
    drawn = axes.barh(
        range(len(bars)), [bar[2] for bar in bars], 0.6, color=[light(bar[1]) for bar in bars]
    )
    axes.bar_label(drawn, fmt="%.2fx", padding=8, color=light("soft"))
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    described = "Makespan over the list-scheduling bound for slots per completion and per row"
    return as_file(
        as_svg(figure, "makespan", ""), "Time of a job over the least it could take", described
    )


def _decades(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every decade around the values."""
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
