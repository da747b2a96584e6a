"""A training run as one static HTML file that needs no server and asks no network for anything.

Invariant: the page follows from the lines of `metrics.jsonl` and the settings alone. What was not
measured is a gap, never 0.

Pages from a template, with a policy that lets nothing but their own script run. Pure.

Invariant: text from settings and errors is escaped by the template, and the page asks no network
for anything: its head allows one script and one style sheet by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.report._charts import FRAME
from eval_protocol_rft.report._page import visible
from eval_protocol_rft.report._page_detail import embedded_json
from eval_protocol_rft.report._page_stats import ReportError
from eval_protocol_rft.report._training_charts import Series, Span
from eval_protocol_rft.report._training_curve import curve_svg
from eval_protocol_rft.report._training_facts import (
    all_settings,
    outcome,
    planned_steps,
    setting_facts,
)
from eval_protocol_rft.report._training_figures import Section, sections
from eval_protocol_rft.report._training_series import FloatArray, Measured


def render(
    template: str,
    values: Mapping[str, Any],
    *,
    scripts: Sequence[str],
    styles: Sequence[str],
    data: str,
) -> str:
    """The text of a page.

    Args:
        template: its name among the assets.
        values: for the template.
        scripts, styles: names of assets, joined to one script and one style sheet.
        data: JSON for the script, escaped as `embedded_json` does.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("eval_protocol_rft.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    script, style = _assets(scripts), _assets(styles)
    return environment.get_template(template).render(
        **values,
        script=Markup(script),  # noqa: S704
        script_hash=_policy_hash(script),
        style=Markup(style),  # noqa: S704
        style_hash=_policy_hash(style),
        data=Markup(data),  # noqa: S704
    )


def _assets(names: Sequence[str]) -> str:
    folder = resources.files("eval_protocol_rft.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _policy_hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
        ReportError: the folder holds no training run, or one whose files cannot be read.
        OSError: the page cannot be written.
    """
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
    span = Span.over([*steps.steps, *evaluations.steps])
    wanted = planned_steps(settings)
    done = steps.steps[-1] if steps.steps else 0
    return render(
        "training.html",
        {
            "name": str(settings.get("evaluator") or "training run"),
            "stopped": stopped,
            "unfinished": bool(settings.get("steps")) and wanted is not None and done < wanted,
            "facts": setting_facts(settings),
            "settings": all_settings(settings),
            "figures": outcome(steps, evaluations, settings),
            "sections": parts,
            "summaries": {
                figure.id: [_summary(one) for one in figure.series]
                for part in parts
                for figure in part.figures
            },
            "evaluations": _table(evaluations),
            "frame": FRAME,
            "version": metadata.version("eval-protocol-rft"),
        },
        scripts=("text.js", "training.js"),
        styles=("page.css", "details.css", "training.css"),
        data=embedded_json(_pointed(parts, steps, evaluations, span)),
    )


def _pointed(
    parts: Sequence[Section], steps: Measured, evaluations: Measured, span: Span
) -> dict[str, Any]:
    """What the script tells of the step under the pointer."""
    return {
        "low": span.low,
        "high": span.high,
        "left": FRAME.left,
        "right": FRAME.right,
        "top": FRAME.top,
        "bottom": FRAME.bottom,
        "steps": steps.steps,
        "evaluations": evaluations.steps,
        "charts": {
            figure.id: [
                {
                    "name": visible(one.name),
                    "evaluated": one.evaluated,
                    "values": _short(one.values),
                }
                for one in figure.series
            ]
            for part in parts
            for figure in part.figures
            if figure.series
        },
    }


def _short(values: FloatArray) -> list[float | None]:
    return [None if math.isnan(v) else float(f"{v:.{_DIGITS}g}") for v in values.tolist()]


def _summary(series: Series) -> list[str]:
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


def _table(evaluations: Measured) -> dict[str, list[list[str]]]:
    """All evaluations in numbers: a head and a row each; columns that have values."""
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
    return {"head": [["step", *columns]], "rows": rows}


def _read_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where}: no JSON object")
    return value
