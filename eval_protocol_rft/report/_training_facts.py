"""What the head of a run's page says: what was trained how, and what came of it. Pure.

Invariant: a figure that was not measured is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval_protocol_rft.report._page_header import Facts
from eval_protocol_rft.report._training_series import FloatArray, Measured


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
