"""Which charts a run's page has, and of what. Pure.

Invariant: a chart shows what was measured and nothing else: where nothing was, it says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eval_protocol_rft.report._charts import Bin, bar_chart
from eval_protocol_rft.report._training_charts import (
    LOG_FOOT,
    UNMEASURED,
    Drawing,
    Figure,
    Mark,
    Span,
)
from eval_protocol_rft.report._training_series import Measured
from eval_protocol_rft.training import FAIL_K3, WARN_K3

_WIDE = 20.0
"""From this ratio of the largest gradient to the usual one on, the axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Section:
    """Charts that belong together."""

    title: str
    figures: list[Figure]


def sections(steps: Measured, evaluations: Measured) -> list[Section]:
    """All charts of a run."""
    of = _Figures(steps, evaluations, Span.over([*steps.steps, *evaluations.steps]))
    return [
        Section("What it learns", [of.reward(), of.held_out(), of.pass_at_k(), *of.scores()]),
        Section("What it samples", [of.length(), of.truncated(), of.entropy()]),
        Section("Sampler and trainer", [of.mismatch(), of.staleness(), of.stalest()]),
        Section("The optimiser", [of.clipped(), of.gradient(), of.learning_rate()]),
        Section("What samples and time are used for", [of.uniform(), of.dropped(), of.time()]),
    ]


class _Figures(Drawing):
    """The figures of a run."""

    def reward(self) -> Figure:
        return self.curves(
            "reward",
            "Reward in training",
            "mean reward",
            [self.of_steps("all scored completions", self.steps.values("reward_mean"))],
            smooth_from=0,
        )

    def held_out(self) -> Figure:
        return self.curves(
            "held-out",
            "Held-out score",
            "score",
            [
                self.of_evaluations("sampled", self.evaluations.values("sampled_score")),
                self.of_evaluations("greedy", self.evaluations.values("greedy_score"), 1),
            ],
        )

    def pass_at_k(self) -> Figure:
        ks = self.evaluations.keys("pass_at_k")
        shown = [
            self.of_evaluations(f"pass@{k}", self.evaluations.values("pass_at_k", k), i)
            for i, k in enumerate(ks)
        ]
        return self.curves("pass", "Held-out pass@k", "share of prompts", shown)

    def scores(self) -> list[Figure]:
        """Metrics of the evaluator's; no figure where it gives none."""
        trained, held = self.steps, self.evaluations
        in_training = [
            self.of_steps(name, trained.values("scores", name), colour=i)
            for i, name in enumerate(trained.keys("scores"))
        ]
        held_out = [
            self.of_evaluations(name, held.values("scores", name), i)
            for i, name in enumerate(held.keys("scores"))
        ]
        title = "The evaluator's metrics"
        return [
            self.curves(f"scores-{place}", f"{title}, {where}", "mean", shown)
            for place, where, shown in (
                ("training", "in training", in_training),
                ("held-out", "held out", held_out),
            )
            if shown
        ]

    def length(self) -> Figure:
        key = "completion_tokens_mean"
        return self.curves(
            "length",
            "Completion length",
            "mean tokens",
            [
                self.of_steps("training", self.steps.values(key)),
                self.of_evaluations("held out", self.evaluations.values(key), 1),
            ],
        )

    def truncated(self) -> Figure:
        values = self.steps.share("truncated", "completions")
        return self.curves(
            "truncated",
            "Truncated",
            "share of completions",
            [self.of_steps("cut off at max_tokens", values)],
        )

    def uniform(self) -> Figure:
        return self.curves(
            "uniform",
            "Groups without a contrast",
            "share of groups",
            [
                self.of_steps("all right", self.steps.share("all_correct", "groups"), colour=2),
                self.of_steps("all wrong", self.steps.share("none_correct", "groups"), colour=4),
            ],
        )

    def dropped(self) -> Figure:
        measured = any("dropped" in line for line in self.steps.lines)
        parts = {_words(name): values for name, values in self.steps.counts("dropped").items()}
        return self.layers(
            "dropped",
            "Dropped before training",
            "completions",
            parts,
            shares=False,
            nothing="nothing was dropped" if measured else UNMEASURED,
        )

    def mismatch(self) -> Figure:
        shown = [
            self.of_steps("mismatch_k3", self.steps.values("mismatch_k3")),
            self.of_steps("sampler_kl_k3", self.steps.values("sampler_kl_k3"), colour=1),
        ]
        return self.curves(
            "kl",
            "Sampler against trainer: KL (k3)",
            "nats per token, log",
            shown,
            log=True,
            marks=[Mark(WARN_K3, f"warn {WARN_K3:g}"), Mark(FAIL_K3, f"stop {FAIL_K3:g}")],
            note="mismatch_k3: tokens sampled from the very weights in training, which the two "
            "bars are for. sampler_kl_k3: all tokens, also of older weights. Values up to "
            f"{LOG_FOOT:.0e}, rounding alone, lie on the axis.".replace("e-0", "e-"),
        )

    def clipped(self) -> Figure:
        values = self.steps.values("clip_fraction")
        return self.curves(
            "clip", "Clipped", "share of tokens", [self.of_steps("clip fraction", values)]
        )

    def staleness(self) -> Figure:
        totals = {
            int(key): float(np.nansum(values))
            for key, values in self.steps.counts("staleness").items()
        }
        bins = [Bin(k, k, int(totals.get(k, 0))) for k in range(max(totals, default=-1) + 1)]
        return Figure(
            id="staleness",
            title="Staleness over the run",
            unit="groups",
            label="versions behind",
            chart=bar_chart(bins),
            nothing="" if bins else UNMEASURED,
        )

    def stalest(self) -> Figure:
        values = self.steps.values("staleness_max")
        return self.curves(
            "stalest",
            "Most staleness in a step",
            "versions behind",
            [self.of_steps("most", values)],
        )

    def entropy(self) -> Figure:
        return self.curves(
            "entropy",
            "Entropy",
            "nats per token",
            [
                self.of_steps("policy", self.steps.values("entropy")),
                self.of_steps("sampler, estimated", self.steps.values("sampler_entropy"), colour=1),
            ],
        )

    def gradient(self) -> Figure:
        values = self.steps.values("grad_norm")
        known = values[values > 0]
        log = bool(len(known) and known.max() > _WIDE * np.median(known))
        return self.curves(
            "gradient",
            "Gradient norm",
            "norm before clipping" + (", log" if log else ""),
            [self.of_steps("gradient norm", values)],
            log=log,
        )

    def learning_rate(self) -> Figure:
        values = self.steps.values("learning_rate")
        return self.curves(
            "rate",
            "Learning rate",
            "learning rate",
            [self.of_steps("learning rate", values)],
            smooth_from=math.inf,
        )

    def time(self) -> Figure:
        order = ("sampling", "batch", "train", "publish")
        found = self.steps.counts("seconds")
        names = [*(n for n in order if n in found), *(n for n in found if n not in order)]
        return self.layers(
            "time",
            "Time",
            "share of the time",
            {name: found[name] for name in names},
            shares=True,
            nothing=UNMEASURED,
            note="sampling: waiting for completions while no step was under way. The pointer is "
            "told seconds. Evaluations are not counted.",
        )


def _words(name: str) -> str:
    return name.replace("_", " ")
