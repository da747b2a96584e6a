"""How a run trains: every choice, checked before anything is sampled.

Invariant: options that contradict each other are an error here. What changes the curve is in
`settings`, so that a run is only ever continued with the same ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.training import BatchOptions, ConfigValue, Filters, require

if TYPE_CHECKING:
    from eval_protocol_rft.training.losses import Objective

RUN = functools.partial(Flag, panel="What to run")
HOW = functools.partial(Flag, panel="How to train")
MODEL = functools.partial(Flag, panel="The model")
EVALUATION = functools.partial(Flag, panel="Evaluation and files")
FIREWORKS = functools.partial(Flag, panel="On Fireworks")


class SetupError(EvalProtocolRftError, ValueError):
    """A run cannot be begun as it was asked for: its options, its data, or parts that do not
    fit; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), wherever it runs; and what a step in
    this process may take."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1), HOW()] = 0.99
    """Of AdamW."""
    eps: Annotated[float, Ge(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0), HOW()] = 0.0
    """Of AdamW, on matrices."""
    max_grad_norm: Annotated[float | None, Ge(0), HOW()] = 1.0
    """Longer gradients are cut; 0: never."""
    microbatch_tokens: Annotated[int, Ge(1), HOW()] = 16384
    """Most tokens, padding included, of one forward pass in this process."""
    gradient_checkpointing: Annotated[bool, HOW()] = False
    """Keep less of the forward pass in this process, and compute layers again: a third slower."""
    variant: Annotated[Literal["adamw", "adamw_8bit"], HOW("--optimizer", only=True)] = "adamw"
    """In this process; adamw_8bit keeps its state in a quarter of the memory (extra `8bit`)."""

    def __post_init__(self) -> None:
        check_options(self)

    def settings(self) -> dict[str, Any]:
        """As a run's settings have them."""
        values = asdict(self)
        betas = (values.pop("beta1"), values.pop("beta2"))
        del values["gradient_checkpointing"]
        return {"betas": betas, **values, "max_grad_norm": self.max_grad_norm or None}

    @property
    def is_for_this_process(self) -> bool:
        """Whether it says anything that a trainer elsewhere decides by itself."""
        usual = Optimizer()
        here = ("microbatch_tokens", "gradient_checkpointing", "variant")
        return any(getattr(self, name) != getattr(usual, name) for name in here)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Hu et al. 2021 (arXiv:2106.09685): W + alpha / rank * B A."""

    rank: int = 16
    alpha: int = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers, or peft's word for all of them but the output layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """What `train` does. Steps are optimiser steps on one batch each, times `passes`."""

    steps: Annotated[int | None, Ge(1), RUN()] = None
    """Train for so many steps."""
    epochs: Annotated[float | None, Gt(0), RUN(unset="1 without --steps")] = None
    """Or go through the data so often."""
    groups_per_step: Annotated[int, Ge(1), HOW()] = 32
    """Prompts with a gradient per step."""
    completions_per_prompt: Annotated[int | None, Ge(1), HOW("-n", unset="the test's n")] = None
    """Completions per prompt."""
    max_staleness: Annotated[int, Ge(0), HOW()] = 0
    """Sample ahead by so many versions of the weights; 0: take turns.

    Most policy versions between sampling and training a group."""
    passes: Annotated[int, Ge(1), HOW()] = 1
    """Optimiser steps on each batch.

    After the first, ratios are against the sampler's logprobs."""
    algorithm: Annotated[str, HOW()] = "grpo"
    """grpo, cispo, dapo, gspo, dr_grpo, rloo, ... (docs/training.md)

    A name in `training.ALGORITHMS`."""
    loss_fn_config: dict[str, ConfigValue] = field(default_factory=dict)
    """Thresholds that replace the algorithm's; absolute."""
    normalization: Annotated[Literal["token", "sequence", "constant"], HOW()] = "token"
    """How the sum over tokens is divided.

    See `training.Normalization`. Never "none": nothing divides later."""
    constant_length: Annotated[int | None, Ge(1), HOW()] = None
    """L of --normalization constant."""
    filters: Filters = field(default_factory=Filters)
    kl_beta: Annotated[float, Ge(0), HOW()] = 0.0
    """Penalty on the distance (k3) to the first weights."""
    correction: Annotated[str | None, HOW()] = None
    """Where trainer and sampler differ: token:2, sequence:2, icepop:0.5:5, seq_mean_k3:0.01, ...

    Importance weights, rejection, or both, joined by commas (docs/training.md). Costs one forward
    pass more: ratios are then against the trainer's own logprobs."""
    learning_rate: Annotated[float, Gt(0), HOW("--lr")] = 1e-5
    """Of AdamW, at its peak."""
    schedule: Annotated[Literal["constant", "linear", "cosine"], HOW()] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: Annotated[int, Ge(0), HOW()] = 0
    """Steps over which it rises."""
    min_learning_rate: Annotated[float, Ge(0), HOW()] = 0.0
    """Where linear and cosine would be one step after the last."""
    eval_every: Annotated[int, Ge(0), EVALUATION()] = 25
    """Steps between evaluations; 0: before and after."""
    eval_completions: Annotated[int, Ge(0), EVALUATION()] = 8
    """Sampled completions per held-out row.

    For the sampled score and pass@k; 0: greedy only."""
    checkpoint_every: Annotated[int, Ge(1), EVALUATION()] = 25
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Ge(1), EVALUATION()] = 2
    """So many of the newest stay."""
    pass_threshold: Annotated[float, EVALUATION()] = 1.0
    """Reward from which on a completion counts as passed."""
    seed: Annotated[int, RUN()] = 0
    """Of the order of rows and of every completion."""
    on_mismatch: Annotated[Literal["stop", "warn"], EVALUATION()] = "stop"
    """When sampler and trainer disagree about on-policy tokens."""
    on_unscored: Annotated[Literal["stop", "warn"], EVALUATION()] = "stop"
    """When nothing of an evaluation could be scored."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise SetupError("give steps or epochs, one of them")
        if self.normalization == "none":  # type: ignore[comparison-overlap]
            raise SetupError(
                'normalization="none" leaves the division to the trainer, and this loop\'s does '
                "not divide: choose token, sequence or constant"
            )
        check_options(self, SetupError)
        # Checks algorithm, thresholds and normalisation.
        if self.batch.relative and self.completions_per_prompt == 1:
            raise SetupError(
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

    def objective(self) -> Objective:
        """The loss that a step differentiates, wherever it is computed.

        Raises:
            SetupError: an option of the loss is unknown, missing or out of range, or `correction`
                names none.
            MissingPackageError: torch is not installed.
        """
        losses = require("eval_protocol_rft.training.losses", install="eval-protocol-rft[local]")
        try:
            objective: Objective = losses.make_loss(
                self.batch.loss_fn,
                self.batch.thresholds,
                correction=self.correction and losses.parse_correction(self.correction),
                kl_beta=self.kl_beta,
            )
        except losses.LossError as error:
            raise SetupError(str(error)) from error
        return objective

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
        if self.correction is None:
            del values["correction"]  # runs from before there was one go on
        return {**values, "filters": asdict(self.filters)}
