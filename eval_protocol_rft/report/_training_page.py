"""A training run as one static HTML file that needs no server and asks no network for anything.

Invariant: the page follows from the lines of `metrics.jsonl` and the settings alone. What was not
measured is a gap or left out, never 0. A chart shows what was measured and nothing else: where
nothing was, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft._statistics import Array, Bar
from eval_protocol_rft.report import _charts as draw
from eval_protocol_rft.report import _html as html
from eval_protocol_rft.report._charts import Chart, Series
from eval_protocol_rft.report._html import Facts, visible
from eval_protocol_rft.report._reading import Measured, read_run
from eval_protocol_rft.report._svg import LOG_FOOT, PLOT
from eval_protocol_rft.training import FAIL_K3, WARN_K3

_UNMEASURED = "not measured in this run"
_WIDE = 20.0
"""From this ratio of the largest gradient to the usual one on, the axis is logarithmic."""
_MANY_STEPS = 150
"""Of more steps than this the eye sees a band: means are drawn over it."""
_LONGEST_TITLE = 60
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
    html.check_installed()
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
        steps=len(Measured(lines, "step").lines),
        evaluations=len(Measured(lines, "eval").lines),
        size=len(text),
    )


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
    steps, evaluations = Measured(lines, "step"), Measured(lines, "eval")
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
        "setting_facts": html.setting_facts(settings),
        "settings": html.all_settings(settings),
        "outcome": outcome(steps, evaluations, settings),
        "sections": parts,
        "evaluations": _table(evaluations),
        "data": html.embedded_json(data),
    }
    scripts, styles = ("text.js", "training.js"), ("page.css",)
    return "".join(html.render("training.html", values, scripts=scripts, styles=styles))


def _pointed(chart: Chart) -> list[dict[str, Any]]:
    return [
        {"name": visible(one.name), "evaluated": one.evaluated, "values": _short(one.values)}
        for one in chart.series
    ]


def _short(values: Array) -> list[float | None]:
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


def before_after(values: Array) -> str:
    """The first and the last value of those there are."""
    known = values[~np.isnan(values)].tolist()
    if len(known) < 2:
        return "".join(f"{value:.3f}" for value in known)
    return f"{known[0]:.3f} → {known[-1]:.3f}"


def _total(values: Array) -> str:
    return f"{np.nansum(values):,.0f}" if np.any(~np.isnan(values)) else ""


def _duration(steps: Measured) -> str:
    counts = steps.counts("seconds").values()
    seconds = sum(float(np.nansum(values)) for values in counts)
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def sections(steps: Measured, evaluations: Measured) -> list[tuple[str, list[Chart]]]:
    """All charts of a run, under their titles."""
    of = _Charts(steps, evaluations)
    return [
        ("What it learns", _learning(of)),
        ("What it samples", _sampling(of)),
        ("Sampler and trainer", _agreement(of)),
        ("The optimiser", _optimising(of)),
        ("What samples and time are used for", _using(of)),
    ]


def span_of(steps: Measured, evaluations: Measured) -> tuple[int, int]:
    """First and last step of all charts; at least one apart."""
    known = [*steps.steps, *evaluations.steps] or [0]
    return min(known), max(*known, min(known) + 1)


def curve_svg(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str | None:
    """Held-out scores, sampled and greedy, against the step, as a picture for a README; None where
    there are none.

    Args:
        lines: of `metrics.jsonl`.
        settings: of `settings.json`; `evaluator` names the picture.
    """
    evaluations = Measured(lines, "eval")
    scores = [
        Series(name, evaluations.steps, values, evaluated=True, colour=i)
        for i, (name, values) in enumerate(_held_out(evaluations).items())
    ]
    scores = [one for one in scores if one.drawable]
    title = visible(str(settings.get("evaluator") or "training run"))
    if len(title) > _LONGEST_TITLE:
        title = title[: _LONGEST_TITLE - 1] + "…"
    return draw.picture(title, scores) if scores else None


def _held_out(evaluations: Measured) -> dict[str, Array]:
    return {name: evaluations.values(f"{name}_score") for name in ("sampled", "greedy")}


def smoothing_window(steps: int) -> int:
    """An odd number near a twentieth of the run, at least 5."""
    return max(5, round(steps / 20) // 2 * 2 + 1)


class _Charts:
    """Draws what was measured in one run; all charts have the same horizontal axis."""

    def __init__(self, steps: Measured, evaluations: Measured) -> None:
        self.steps, self.evaluations = steps, evaluations
        self._span = span_of(steps, evaluations)

    def curves(
        self,
        name: str,
        title: str,
        unit: str,
        trained: Mapping[str, Array] = MappingProxyType({}),
        held_out: Mapping[str, Array] = MappingProxyType({}),
        *,
        colours: Sequence[int] = range(1_000),
        many: float = _MANY_STEPS,
        **options: Any,
    ) -> Chart:
        """Lines of values in training, then of those in evaluations. `many`: of more steps than
        this, means are drawn over the values."""
        parts = [(self.steps, False, trained), (self.evaluations, True, held_out)]
        values = [
            (label, lines.steps, values, evaluated)
            for lines, evaluated, named in parts
            for label, values in named.items()
        ]
        series = [Series(*one, colour) for one, colour in zip(values, colours, strict=False)]
        window = smoothing_window(len(self.steps.lines))
        window = window if len(self.steps.lines) > max(window, many) else 0
        options = {"window": window, "nothing": _UNMEASURED, **options}
        return draw.curves(name, title, unit, series, self._span, **options)

    def layers(
        self, name: str, title: str, unit: str, parts: Mapping[str, Array], **options: Any
    ) -> Chart:
        series = [
            Series(label, self.steps.steps, values, colour=i)
            for i, (label, values) in enumerate(parts.items())
        ]
        return draw.layers(name, title, unit, series, self._span, **options)


def _learning(of: _Charts) -> list[Chart]:
    trained, held = of.steps, of.evaluations
    reward = {"all scored completions": trained.values("reward_mean")}
    passed = {f"pass@{k}": held.values("pass_at_k", k) for k in held.keys("pass_at_k")}
    in_training, held_out = (
        {name: lines.values("scores", name) for name in lines.keys("scores")}
        for lines in (trained, held)
    )
    charts = [
        of.curves("reward", "Reward in training", "mean reward", reward, many=0),
        of.curves("held-out", "Held-out score", "score", held_out=_held_out(held)),
        of.curves("pass", "Held-out pass@k", "share of prompts", held_out=passed),
    ]
    # No chart of the evaluator's metrics where it gives none.
    title = "The evaluator's metrics"
    if in_training:
        charts += [of.curves("scores-training", f"{title}, in training", "mean", in_training)]
    if held_out:
        charts += [of.curves("scores-held-out", f"{title}, held out", "mean", held_out=held_out)]
    return charts


def _sampling(of: _Charts) -> list[Chart]:
    steps, key = of.steps, "completion_tokens_mean"
    trained, held_out = {"training": steps.values(key)}, {"held out": of.evaluations.values(key)}
    cut = {"cut off at max_tokens": steps.share("truncated", "completions")}
    entropy = {
        "policy": steps.values("entropy"),
        "sampler, estimated": steps.values("sampler_entropy"),
    }
    return [
        of.curves("length", "Completion length", "mean tokens", trained, held_out),
        of.curves("truncated", "Truncated", "share of completions", cut),
        of.curves("entropy", "Entropy", "nats per token", entropy),
    ]


def _agreement(of: _Charts) -> list[Chart]:
    steps = of.steps
    totals = {
        int(versions): int(np.nansum(values))
        for versions, values in steps.counts("staleness").items()
        if versions.isdecimal()
    }
    return [
        of.curves(
            "kl",
            "Sampler against trainer: KL (k3)",
            "nats per token, log",
            {name: steps.values(name) for name in ("mismatch_k3", "sampler_kl_k3")},
            log=True,
            bars=[(WARN_K3, f"warn {WARN_K3:g}"), (FAIL_K3, f"stop {FAIL_K3:g}")],
            note="mismatch_k3: tokens sampled from the very weights in training, which the two "
            "bars are for. sampler_kl_k3: all tokens, also of older weights. Values up to "
            f"{LOG_FOOT:.0e}, rounding alone, lie on the axis.".replace("e-0", "e-"),
        ),
        draw.histogram(
            "staleness",
            "Staleness over the run",
            [Bar(k, k, totals.get(k, 0)) for k in range(max(totals, default=-1) + 1)],
            label="versions behind",
            unit="groups",
            nothing=_UNMEASURED,
        ),
        of.curves(
            "stalest",
            "Most staleness in a step",
            "versions behind",
            {"most": steps.values("staleness_max")},
        ),
    ]


def _optimising(of: _Charts) -> list[Chart]:
    steps = of.steps
    clipped = {"clip fraction": steps.values("clip_fraction")}
    gradient = {"gradient norm": steps.values("grad_norm")}
    rate = {"learning rate": steps.values("learning_rate")}
    known = gradient["gradient norm"][gradient["gradient norm"] > 0]
    log = bool(len(known) and known.max() > _WIDE * np.median(known))
    norm = "norm before clipping" + (", log" if log else "")
    return [
        of.curves("clip", "Clipped", "share of tokens", clipped),
        of.curves("gradient", "Gradient norm", norm, gradient, log=log),
        of.curves("rate", "Learning rate", "learning rate", rate, many=math.inf),
    ]


def _using(of: _Charts) -> list[Chart]:
    steps = of.steps
    uniform = {
        "all right": steps.share("all_correct", "groups"),
        "all wrong": steps.share("none_correct", "groups"),
    }
    dropped = {name.replace("_", " "): n for name, n in steps.counts("dropped").items()}
    measured = any("dropped" in line for line in steps.lines)
    order = ("sampling", "batch", "train", "publish")
    seconds = steps.counts("seconds")
    seconds = {name: seconds[name] for name in dict.fromkeys([*order, *seconds]) if name in seconds}
    return [
        of.curves(
            "uniform", "Groups without a contrast", "share of groups", uniform, colours=(2, 4)
        ),
        of.layers(
            "dropped",
            "Dropped before training",
            "completions",
            dropped,
            shares=False,
            nothing="nothing was dropped" if measured else _UNMEASURED,
        ),
        of.layers(
            "time",
            "Time",
            "share of the time",
            seconds,
            shares=True,
            nothing=_UNMEASURED,
            note="sampling: waiting for completions while no step was under way. The pointer is "
            "told seconds. Evaluations are not counted.",
        ),
    ]
