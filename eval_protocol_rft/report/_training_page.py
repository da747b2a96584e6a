"""A training run as one static HTML file that needs no server and asks no network for anything.

Invariant: the page follows from the lines of `metrics.jsonl` and the settings alone. What was not
measured is a gap or left out, never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.report._charts import Chart
from eval_protocol_rft.report._html import (
    Facts,
    ReportError,
    check_installed,
    embedded_json,
    render,
    visible,
)
from eval_protocol_rft.report._svg import PLOT, FloatArray
from eval_protocol_rft.report._training_figures import Measured, curve_svg, sections, span_of

_DIGITS = 5
"""Significant ones, of values that the pointer is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTrainingReport:
    """What was written."""

    page: Path
    curve: Path | None
    """None where nothing was held out, or the page is not the folder's own."""
    steps: int
    evaluations: int
    size: int
    """Bytes of the page."""


def write_training_report(
    folder: Path, output: Path | None = None, *, stopped: str | None = None
) -> WrittenTrainingReport:
    """Write the page of a run: as `report.html` in its folder with the picture `curve.svg`, or
    elsewhere by itself.

    Args:
        folder: the run's, with `metrics.jsonl` and `settings.json`.
        output: the page; default `report.html` in the folder.
        stopped: why the run ended before its last step, where it did.

    Raises:
        ReportError: the folder holds no training run, or one whose files cannot be read; or
            matplotlib is not installed.
        OSError: the page cannot be written.
    """
    check_installed()
    lines, settings = read_run(folder)
    page = output or folder / "report.html"
    text = training_page(lines, settings, stopped=stopped).encode()
    write_whole(page, text)
    curve = None
    if output is None and (svg := curve_svg(lines, settings)) is not None:
        curve = folder / "curve.svg"
        write_whole(curve, svg.encode())
    return WrittenTrainingReport(
        page=page,
        curve=curve,
        steps=len(Measured.of(lines, "step").lines),
        evaluations=len(Measured.of(lines, "eval").lines),
        size=len(text),
    )


def is_run_folder(path: Path) -> bool:
    """Whether a training run keeps its files here."""
    return (path / "settings.json").is_file()


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and settings of the run in `folder`, without a last line that a crash cut off.

    Raises:
        ReportError: there are none, or they are damaged.
    """
    if not is_run_folder(folder):
        raise ReportError(f"{folder} holds no training run: it has no settings.json")
    settings = _read_json((folder / "settings.json").read_bytes(), f"{folder}/settings.json")
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    lines = [
        _read_json(line, f"{path}, line {number}")
        for number, line in enumerate(whole.splitlines(), start=1)
    ]
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int) or "kind" not in line:
            raise ReportError(f"{path}, line {number}: no line of a training run (kind, step)")
    return lines, settings


def training_page(
    lines: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    stopped: str | None = None,
) -> str:
    """The page's HTML.

    Args:
        lines: of `metrics.jsonl`.
        settings: of `settings.json`.
        stopped: why the run ended before its last step, where it did.
    """
    steps, evaluations = Measured.of(lines, "step"), Measured.of(lines, "eval")
    parts = sections(steps, evaluations)
    wanted = planned_steps(settings)
    done = steps.steps[-1] if steps.steps else 0
    low, high = span_of(steps, evaluations)
    # What the script tells of the step under the pointer.
    data = {
        "low": low,
        "high": high,
        **PLOT,
        "steps": steps.steps,
        "evaluations": evaluations.steps,
        "charts": {chart.id: _pointed(chart) for _, charts in parts for chart in charts},
    }
    values = {
        "name": str(settings.get("evaluator") or "training run"),
        "stopped": stopped,
        "unfinished": bool(settings.get("steps")) and wanted is not None and done < wanted,
        "setting_facts": setting_facts(settings),
        "settings": all_settings(settings),
        "outcome": outcome(steps, evaluations, settings),
        "sections": parts,
        "evaluations": _table(evaluations),
        "data": embedded_json(data),
    }
    scripts, styles = ("text.js", "training.js"), ("page.css",)
    return "".join(render("training.html", values, scripts=scripts, styles=styles))


def _pointed(chart: Chart) -> list[dict[str, Any]]:
    return [
        {"name": visible(one.name), "evaluated": one.evaluated, "values": _short(one.values)}
        for one in chart.series
    ]


def _short(values: FloatArray) -> list[float | None]:
    return [None if math.isnan(v) else float(f"{v:.{_DIGITS}g}") for v in values.tolist()]


def _table(evaluations: Measured) -> list[list[str]]:
    """All evaluations in numbers: a head, and a row each; columns that have values."""
    columns = {
        "rows": evaluations.values("rows"),
        "sampled": evaluations.values("sampled_score"),
        "greedy": evaluations.values("greedy_score"),
        **{f"pass@{k}": evaluations.values("pass_at_k", k) for k in evaluations.keys("pass_at_k")},
        "unscored": evaluations.values("unscored"),
        "mean tokens": evaluations.values("completion_tokens_mean"),
    }
    columns = {name: values for name, values in columns.items() if np.any(~np.isnan(values))}
    whole = ("rows", "unscored")
    rows = [
        [
            f"{step:,}",
            *(
                "–" if math.isnan(v[i]) else f"{v[i]:,.0f}" if name in whole else f"{v[i]:.4f}"
                for name, v in columns.items()
            ),
        ]
        for i, step in enumerate(evaluations.steps)
    ]
    return [["step", *columns], *rows]


def _read_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where}: no JSON object")
    return value


def setting_facts(settings: Mapping[str, Any]) -> Facts:
    """The settings that a reader asks for first; those that a run did not record are left out."""
    sampling = settings.get("completion_params") or {}
    n = settings.get("completions_per_prompt") or sampling.get("n")
    facts = [
        ("Model", sampling.get("model")),
        ("Algorithm", _joined(settings.get("algorithm"), _named(settings, "normalization"))),
        (
            "Batch",
            _joined(
                _counted(settings.get("groups_per_step"), "prompts"),
                _counted(n, "completions each"),
                _counted(settings.get("passes"), "passes") if settings.get("passes") != 1 else None,
            ),
        ),
        (
            "Learning rate",
            _joined(
                _value(settings.get("learning_rate")),
                settings.get("schedule"),
                _named(settings, "warmup_steps", zero=False),
                _named(settings, "kl_beta", zero=False),
            ),
        ),
        ("Most staleness", _counted(settings.get("max_staleness"), "versions")),
        ("Sampling", _joined(*(_named(sampling, k) for k in sampling if k not in ("model", "n")))),
        (
            "Rows",
            _joined(
                _counted(settings.get("train_rows"), "to train on"),
                _counted(settings.get("eval_rows"), "held out"),
            ),
        ),
        ("Seed", _value(settings.get("seed"))),
    ]
    return [(name, value) for name, value in facts if value]


def all_settings(settings: Mapping[str, Any]) -> Facts:
    """Every setting as it was recorded."""
    return [(name, json.dumps(settings[name], sort_keys=True)) for name in sorted(settings)]


def outcome(steps: Measured, evaluations: Measured, settings: Mapping[str, Any]) -> Facts:
    """What came of it: held-out scores before and after, and how much was sampled."""
    figures = [
        ("held out, sampled", before_after(evaluations.values("sampled_score"))),
        ("held out, greedy", before_after(evaluations.values("greedy_score"))),
    ]
    ks = [k for k in evaluations.keys("pass_at_k") if k != "1"]
    if ks:
        change = before_after(evaluations.values("pass_at_k", ks[-1]))
        figures.append((f"held out, pass@{ks[-1]}", change))
    wanted = planned_steps(settings)
    done = steps.steps[-1] if steps.steps else 0
    figures.append(("steps", f"{done:,}" if wanted is None else f"{done:,} of {wanted:,}"))
    for name, key in (("completions", "completions"), ("sampled tokens", "sampled_tokens")):
        figures.append((name, _total(steps.values(key))))
    figures.append(("without evaluations", _duration(steps)))
    return [(name, value) for name, value in figures if value]


def planned_steps(settings: Mapping[str, Any]) -> int | None:
    """Steps that were asked for; with epochs, the most that these can come to."""
    if settings.get("steps"):
        return int(settings["steps"])
    epochs, rows = settings.get("epochs"), settings.get("train_rows")
    groups = settings.get("groups_per_step")
    if not epochs or not rows or not groups:
        return None
    return math.ceil(float(epochs) * int(rows) / int(groups))


def before_after(values: FloatArray) -> str:
    """The first and the last value of those there are."""
    known = values[~np.isnan(values)].tolist()
    if len(known) < 2:
        return "".join(f"{value:.3f}" for value in known)
    return f"{known[0]:.3f} → {known[-1]:.3f}"


def _total(values: FloatArray) -> str:
    return f"{np.nansum(values):,.0f}" if np.any(~np.isnan(values)) else ""


def _duration(steps: Measured) -> str:
    counts = steps.counts("seconds").values()
    seconds = sum(float(np.nansum(values)) for values in counts)
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _named(settings: Mapping[str, Any], name: str, *, zero: bool = True) -> str | None:
    value = settings.get(name)
    if value is None or (not zero and not value):
        return None
    return f"{name} {_value(value)}"


def _counted(value: Any, what: str) -> str | None:
    if value is None:
        return None
    return f"{value:,} {what.removesuffix('s') if value == 1 else what}"


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
