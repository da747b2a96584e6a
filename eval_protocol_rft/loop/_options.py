"""How a run trains: every choice, checked before anything is sampled.

Invariant: options that contradict each other are an error here. What changes the curve is in
`settings`, so that a run is only ever continued with the same ones.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from eval_protocol_rft.training import BatchOptions, ConfigValue, Filters, Normalization

Schedule = Literal["constant", "linear", "cosine"]
OnMismatch = Literal["stop", "warn"]
OnUnscored = Literal["stop", "warn"]


class OptionsError(ValueError):
    """An option that is wrong or contradicts another; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """What `train` does. Steps are optimiser steps on one batch each, times `passes`."""

    steps: int | None = None
    """Train for so many steps."""
    epochs: float | None = None
    """Or until the data set has been gone through so often."""
    groups_per_step: int = 32
    """Prompt groups with a gradient that make a batch."""
    completions_per_prompt: int | None = None
    """n; None: what the evaluator's completion_params say."""
    max_staleness: int = 0
    """Most policy versions between sampling and training a group. 0: strictly on-policy, sampling
    and training take turns."""
    passes: int = 1
    """Optimiser steps on each batch: after the first, ratios are against the sampler's logprobs."""
    algorithm: str = "grpo"
    """A name in `training.ALGORITHMS`."""
    loss_fn_config: dict[str, ConfigValue] = field(default_factory=dict)
    """Thresholds that replace the algorithm's; absolute."""
    normalization: Normalization = "token"
    """How the sum over tokens is divided; see `training.datums`. Never "none": nothing divides
    later."""
    constant_length: int | None = None
    """L of `normalization="constant"`."""
    filters: Filters = field(default_factory=Filters)
    kl_beta: float = 0.0
    """Weight of the penalty on the distance (k3) to the weights that training began with."""
    learning_rate: float = 1e-5
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    """Steps over which the learning rate rises in a line."""
    min_learning_rate: float = 0.0
    """Where `linear` and `cosine` would be one step after the last."""
    eval_every: int = 10
    """Steps between evaluations on held-out rows; 0: only before and after."""
    eval_completions: int = 8
    """Completions per held-out row, for the sampled score and pass@k; 0: greedy only."""
    checkpoint_every: int = 25
    keep_checkpoints: int = 2
    pass_threshold: float = 1.0
    """The score from which a completion counts as correct."""
    seed: int = 0
    on_mismatch: OnMismatch = "stop"
    """What happens when sampler and trainer disagree about on-policy tokens."""

    on_unscored: OnUnscored = "stop"
    """What happens when nothing at all of an evaluation on held-out rows could be scored."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise OptionsError("give steps or epochs, one of them")
        for name in ("steps", "groups_per_step", "completions_per_prompt", "passes"):
            _at_least(self, name, 1)
        for name in ("checkpoint_every", "keep_checkpoints"):
            _at_least(self, name, 1)
        for name in ("max_staleness", "warmup_steps", "eval_every", "eval_completions"):
            _at_least(self, name, 0)
        for name in ("kl_beta", "min_learning_rate"):
            _at_least(self, name, 0.0)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionsError(f"{name} must be above 0, got {value}")
        for name, allowed in (
            ("schedule", Schedule),
            ("on_mismatch", OnMismatch),
            ("on_unscored", OnUnscored),
        ):
            if getattr(self, name) not in get_args(allowed):
                words = ", ".join(get_args(allowed))
                raise OptionsError(f"{name} must be one of {words}, got {getattr(self, name)!r}")
        if self.normalization == "none":
            raise OptionsError(
                'normalization="none" leaves the division to the trainer, and this loop\'s does '
                "not divide: choose token, sequence or constant"
            )
        if not -math.inf < self.pass_threshold < math.inf:
            raise OptionsError(f"pass_threshold must be a number, got {self.pass_threshold}")
        # Checks algorithm, thresholds and normalisation.
        if self.batch.relative and self.completions_per_prompt == 1:
            raise OptionsError(
                f"{self.algorithm} compares the completions of a prompt: ask for at least 2"
            )

    @property
    def batch(self) -> BatchOptions:
        """Those for `build_batch`."""
        return BatchOptions(
            algorithm=self.algorithm,
            loss_fn_config=self.loss_fn_config or None,
            normalization=self.normalization,
            constant_length=self.constant_length,
            filters=self.filters,
            pass_threshold=self.pass_threshold,
        )

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 1) of `steps`."""
        peak, low = self.learning_rate, self.min_learning_rate
        if step <= self.warmup_steps:
            return peak * step / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return peak
        done = (step - self.warmup_steps - 1) / max(steps - self.warmup_steps, 1)
        done = min(done, 1.0)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return low + (peak - low) * left

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common to be one; plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("checkpoint_every", "keep_checkpoints", "on_mismatch", "on_unscored"):
            del values[name]
        return {**values, "filters": asdict(self.filters)}


def _at_least(options: LoopOptions, name: str, low: float) -> None:
    value = getattr(options, name)
    if value is not None and not low <= value < math.inf:
        raise OptionsError(f"{name} must be at least {low}, got {value}")
