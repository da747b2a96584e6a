"""From the runs of all peers to one table, or to JSON.

Invariant: a ratio compares two peers within one repeat, run minutes apart at most, and is the
median of those; numbers of different runs of the benchmark never meet.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from workload import Measurement

LABELS = {
    "ours": "our processor",
    "client": "Eval Protocol's client",
    "bare": "bare loop",
    "canned": "Eval Protocol alone",
}
OURS_ALONE = "ours_less_canned"
"""Without what Eval Protocol costs with canned data, which the bare loop does not pay either."""
WIDTH = 92
"""Columns; a narrower terminal wraps rather than cuts headings."""
LIBRARIES = ("eval-protocol", "fireworks-ai", "aiohttp", "msgspec", "orjson", "transformers")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    rows: int
    completions: int
    tokens: int
    prompt_characters: int
    concurrency: int
    repeats: int
    tokenizer: str


class Imports(msgspec.Struct, frozen=True, kw_only=True):
    """CPU seconds that imports take in a fresh process."""

    eval_protocol_s: float
    """What every evaluator imports."""
    on_top_s: float
    """Our processor, after that."""
    alone_s: float
    """`import eval_protocol_rft` with nothing before it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one benchmark, and what is concluded from them."""

    settings: Settings
    runs: Mapping[str, Sequence[Measurement]]
    """Peer -> one measurement per repeat."""
    imports: Sequence[Imports]

    def throughput(self, peer: str) -> float:
        """Completions per second of wall time."""
        return median(run.completions / run.wall_s for run in self.runs[peer])

    def cpu_ms(self, peer: str) -> float:
        """CPU milliseconds of the client process per completion."""
        return median(1e3 * run.cpu_s / run.completions for run in self.runs[peer])

    def own_cpu_ms(self, peer: str) -> float:
        """The same without what Eval Protocol costs with canned data."""
        pairs = zip(self.runs[peer], self.runs["canned"], strict=True)
        return median(1e3 * (run.cpu_s - alone.cpu_s) / run.completions for run, alone in pairs)

    def ratio(self, of: Callable[[Measurement, Measurement], float], peer: str, to: str) -> float:
        """Median over the repeats of `of(peer's run, other peer's run)`."""
        return median(of(a, b) for a, b in zip(self.runs[peer], self.runs[to], strict=True))

    def cpu_ratios(self) -> dict[str, float]:
        """CPU per completion over the bare loop's."""
        ratios = {peer: self.ratio(_cpu, peer, "bare") for peer in self.runs}
        triples = zip(self.runs["ours"], self.runs["canned"], self.runs["bare"], strict=True)
        ratios[OURS_ALONE] = median(
            (ours.cpu_s - alone.cpu_s) / bare.cpu_s for ours, alone, bare in triples
        )
        return ratios

    def speed_ratios(self) -> dict[str, float]:
        """Throughput over that of Eval Protocol's client."""
        return {peer: self.ratio(_speed, peer, "client") for peer in self.runs}

    def import_seconds(self) -> Imports:
        return Imports(
            **{
                name: median(getattr(times, name) for times in self.imports)
                for name in Imports.__struct_fields__
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Settings, machine, medians, ratios and every single run."""
        medians = {
            peer: {
                "completions_per_s": self.throughput(peer),
                "cpu_ms": self.cpu_ms(peer),
                "peak_mb": median(run.peak_mb for run in runs),
                "grown_mb": median(run.peak_mb - run.start_mb for run in runs),
            }
            for peer, runs in self.runs.items()
        }
        return {
            "settings": msgspec.to_builtins(self.settings),
            "machine": machine(),
            "medians": medians,
            "cpu_over_bare": self.cpu_ratios(),
            "throughput_over_client": self.speed_ratios(),
            "imports": msgspec.to_builtins(self.import_seconds()),
            "runs": msgspec.to_builtins(self.runs),
        }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def print_table(report: Report) -> None:
    """One line per peer, then the imports."""
    settings = report.settings
    table = Table(
        title=f"{settings.rows} rows x {settings.completions} completions x {settings.tokens} "
        f"tokens, {settings.concurrency} in flight, medians of {settings.repeats}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("peer", no_wrap=True)
    for heading in ("compl./s", "x client", "CPU ms", "x bare", "peak MB", "data MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    cpu, speed = report.cpu_ratios(), report.speed_ratios()
    for peer, runs in report.runs.items():
        table.add_row(
            LABELS[peer],
            f"{report.throughput(peer):,.0f}",
            f"{speed[peer]:.1f}",
            f"{report.cpu_ms(peer):.2f}",
            f"{cpu[peer]:.2f}",
            f"{median(run.peak_mb for run in runs):.0f}",
            f"{median(run.peak_mb - run.start_mb for run in runs):.0f}",
        )
    table.add_row(
        "  ours less that", "", "", f"{report.own_cpu_ms('ours'):.2f}", f"{cpu[OURS_ALONE]:.2f}"
    )
    imports = report.import_seconds()
    console = Console(width=WIDTH)
    console.print(table)
    console.print(
        f"Imports, seconds of CPU: evaluation_test {imports.eval_protocol_s:.2f}, "
        f"our processor after it {imports.on_top_s:.3f}, "
        f"eval_protocol_rft alone {imports.alone_s:.3f}"
    )


def _cpu(a: Measurement, b: Measurement) -> float:
    return a.cpu_s / a.completions / (b.cpu_s / b.completions)


def _speed(a: Measurement, b: Measurement) -> float:
    return a.completions / a.wall_s / (b.completions / b.wall_s)
