"""A run's metrics as series over its steps, and the charts that its page has of them. Pure.

Invariant: what was not measured is NaN, here and in everything made from it, never 0. A chart shows
what was measured and nothing else: where nothing was, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from eval_protocol_rft.report._charts import Chart, Series, curves, histogram, layers, picture
from eval_protocol_rft.report._html import visible
from eval_protocol_rft.report._page_stats import Bin
from eval_protocol_rft.report._svg import LOG_FOOT, FloatArray
from eval_protocol_rft.training import FAIL_K3, WARN_K3

_UNMEASURED = "not measured in this run"
_WIDE = 20.0
"""From this ratio of the largest gradient to the usual one on, the axis is logarithmic."""
_MANY_STEPS = 150
"""Of more steps than this the eye sees a band: means are drawn over it."""
_LONGEST_TITLE = 60


@dataclass(frozen=True, slots=True)
class Measured:
    """Lines of one kind (`step` or `eval`), one per step, in order."""

    lines: list[Mapping[str, Any]]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], kind: str) -> Measured:
        """Those of `kind`; where a step is told of twice, the later line counts."""
        by_step = {line["step"]: line for line in lines if line.get("kind") == kind}
        return cls([by_step[step] for step in sorted(by_step)])

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    def values(self, *path: str) -> FloatArray:
        """[len(steps)] of what lies at `path` in each line."""
        return np.array([_number(line, path) for line in self.lines], np.float64)

    def share(self, part: str, whole: str) -> FloatArray:
        """[len(steps)] of `part` in `whole`; NaN where there is nothing to have a share of."""
        above, below = self.values(part), self.values(whole)
        shares = np.full(above.shape, np.nan)
        np.divide(above, below, out=shares, where=below > 0)
        return shares

    def counts(self, name: str) -> dict[str, FloatArray]:
        """Counts by key, for lines that hold them in a mapping; largest total first.

        A mapping without a key counted none of it: that is a 0. A line without the mapping is NaN.
        """
        counts = {
            key: np.array([_count(line, name, key) for line in self.lines], np.float64)
            for key in self.keys(name)
        }
        return dict(sorted(counts.items(), key=lambda item: (-np.nansum(item[1]), item[0])))

    def keys(self, name: str) -> list[str]:
        """Keys of a mapping in the lines; numbers in their order."""
        keys = {key for line in self.lines for key in _mapping(line, name) or {}}
        return sorted(
            keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
        )


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
    evaluations = Measured.of(lines, "eval")
    scores = [
        Series(name, evaluations.steps, values, evaluated=True, colour=i)
        for i, (name, values) in enumerate(_held_out(evaluations).items())
    ]
    scores = [one for one in scores if one.drawable]
    title = visible(str(settings.get("evaluator") or "training run"))
    if len(title) > _LONGEST_TITLE:
        title = title[: _LONGEST_TITLE - 1] + "…"
    return picture(title, scores) if scores else None


def _held_out(evaluations: Measured) -> dict[str, FloatArray]:
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
        trained: Mapping[str, FloatArray] = MappingProxyType({}),
        held_out: Mapping[str, FloatArray] = MappingProxyType({}),
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
        return curves(name, title, unit, series, self._span, **options)

    def layers(
        self, name: str, title: str, unit: str, parts: Mapping[str, FloatArray], **options: Any
    ) -> Chart:
        series = [
            Series(label, self.steps.steps, values, colour=i)
            for i, (label, values) in enumerate(parts.items())
        ]
        return layers(name, title, unit, series, self._span, **options)


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
        histogram(
            "staleness",
            "Staleness over the run",
            [Bin(k, k, totals.get(k, 0)) for k in range(max(totals, default=-1) + 1)],
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


def _mapping(line: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = line.get(name)
    return value if isinstance(value, Mapping) else None


def _count(line: Mapping[str, Any], name: str, key: str) -> float:
    counts = _mapping(line, name)
    if counts is None:
        return math.nan
    return _number(counts, (key,)) if key in counts else 0.0


def _number(line: Mapping[str, Any], path: tuple[str, ...]) -> float:
    value: Any = line
    for key in path:
        if not isinstance(value, Mapping):
            return math.nan
        value = value.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)
