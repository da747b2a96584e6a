"""Corrections for a trainer and a sampler that disagree: importance weights, truncated, and
rejection of what is too far off.

Invariant: the weights of a correction are constants: no gradient flows through them. They multiply
the policy losses of a batch, and never its KL penalty; what is rejected still counts in the
division, which is in the batch's weights.

Below, c = exp(old - sampling) for each sampled token: the probability in the trainer over that in
the sampler. The same weights give other logprobs in the two (other kernels, precision, parallelism,
expert routing), and so do weights of another version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from eval_protocol_rft.training.losses._tensors import (
    LOG_RATIO_LIMIT,
    LossError,
    PolicyTensors,
    k3,
)

CorrectionWeights: TypeAlias = tuple[Tensor, Tensor]
"""Weights, and Bool where their bound took effect; both shaped like the batch."""


class Correction(Protocol):
    """From a batch to the weights of its policy losses. Needs `old_logprobs`; for the first update
    after sampling those of the current policy will do (`old_logprobs="current"`)."""

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTIS:
    """min(c, cap) for each token (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; caps of 2 to 10 are in use). verl: `rollout_is: token`; TRL:
    `token_truncate`. `normalized` divides by the mean over the batch's tokens, so that a cap does
    not shrink the step (verl's `rollout_is_batch_normalize`)."""

    cap: float
    normalized: bool = False

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    @property
    def whole_batch(self) -> bool:
        """See `Objective.whole_batch`."""
        return self.normalized

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        weights, bounded = _truncated(_log_mismatch(tensors), self.cap)
        if self.normalized:
            sampled = tensors.sampled
            weights = weights / tensors.masked(weights).sum().div(sampled.sum().clamp(min=1))
        return weights, bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTIS:
    """min(product of c over the sequence, cap) for all its tokens (Liu et al. 2025, "When Speed
    Kills Stability"); with `geometric`, their geometric mean instead of the product, which does
    not grow with length and is biased. verl: `rollout_is: sequence`; TRL: `sequence_truncate`.
    `normalized` divides by the mean over the batch's sequences."""

    cap: float
    geometric: bool = False
    normalized: bool = False

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    @property
    def whole_batch(self) -> bool:
        """See `Objective.whole_batch`."""
        return self.normalized

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        log_mismatch = _log_mismatch(tensors)
        over_sequence = tensors.sequence_mean if self.geometric else tensors.sequence_sum
        weights, bounded = _truncated(over_sequence(log_mismatch), self.cap)
        if self.normalized:
            sampled = tensors.sampled.to(weights.dtype)
            share = sampled / tensors.sequence_sum(sampled).clamp(min=1.0)
            weights = weights / ((weights * share).sum() / share.sum().clamp(min=1.0))
        return weights, bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class IcePop:
    """c where low <= c <= high, else 0: a token on which the two engines differ by more takes no
    part (arXiv:2510.18855; Ant Group 2025 uses 0.5 and 5). With `sequence`, c is the product over
    the sequence. verl: a threshold of two numbers; TRL: `token_mask`, `sequence_mask`."""

    low: float
    high: float
    sequence: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= 1.0 <= self.high < math.inf:
            raise LossError(
                f"IcePop keeps ratios between 0 < low <= 1 <= high, got {self.low} and {self.high}"
            )

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        log_ratio = _log_mismatch(tensors)
        if self.sequence:
            log_ratio = tensors.sequence_sum(log_ratio)
        # The cap only keeps exp finite: what lies above `high` is dropped just below.
        ratio = torch.exp(log_ratio.clamp(max=math.log(self.high) + 1.0))
        outside = (ratio < self.low) | (ratio > self.high)
        return ratio.masked_fill(outside, 0.0), outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Weight 0 for what is too far off, 1 for the rest; no importance weights.

    Every token has the estimates k1 = -log c, k2 = (log c)^2 / 2 and k3 = c - 1 - log c of the
    divergence between sampler and trainer. `kind` says which, and over what, in the names of verl's
    rollout correction (`rollout_rs`): `token_k1` to `token_k3` reject a token; `seq_sum_`,
    `seq_mean_` and `seq_max_` a sequence, by the sum, mean or maximum over its sampled tokens.

    For k1 the bounds are `low` and `high` on c, its product (`seq_sum`) or its geometric mean
    (`seq_mean`); `low` is 1 / high where it is None. verl bounds 1 / c there, so its `l_u` is
    low=1/u, high=1/l. For k2 and k3 `high` alone bounds the estimate.

    With `current`, c is that of the policy in training: what verl's bypass mode rejects by, where
    ratios are taken against the sampler and there are no old logprobs.
    """

    kind: str
    high: float
    low: float | None = None
    current: bool = False

    KINDS: ClassVar[tuple[str, ...]] = (
        *(f"{over}_k{k}" for over in ("token", "seq_sum", "seq_mean") for k in (1, 2, 3)),
        "seq_max_k2",
        "seq_max_k3",
    )

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise LossError(f"Rejection has no kind {self.kind!r}: one of {', '.join(self.KINDS)}")
        if not self.kind.endswith("k1"):
            if self.low is not None or not 0.0 < self.high < math.inf:
                raise LossError(
                    f"{self.kind} is bounded by high alone, finite and above 0; got "
                    f"low={self.low}, high={self.high}"
                )
        elif not (1.0 <= self.high < math.inf and (self.low is None or 0.0 < self.low <= 1.0)):
            raise LossError(
                f"{self.kind} keeps ratios between 0 < low <= 1 <= high, got {self.low} and "
                f"{self.high}"
            )

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        log_ratio = _log_mismatch(tensors, current=self.current)
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        over, _, estimate = self.kind.rpartition("_")
        values = {"k1": log_ratio, "k2": 0.5 * log_ratio.square(), "k3": k3(log_ratio)}[estimate]
        if over != "token":
            values = {
                "seq_sum": tensors.sequence_sum,
                "seq_mean": tensors.sequence_mean,
                "seq_max": tensors.sequence_max,
            }[over](values)
        if estimate == "k1":
            low = -math.log(self.high) if self.low is None else math.log(self.low)
            outside = (values < low) | (values > math.log(self.high))
        else:
            outside = values > self.high
        return (~outside).to(values.dtype), outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Several corrections at once: the product of their weights. Importance weights with rejection,
    or several rejections, all of which a token must pass."""

    parts: tuple[Correction, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise LossError("Combined needs at least one correction")

    @property
    def whole_batch(self) -> bool:
        """See `Objective.whole_batch`."""
        return any(getattr(part, "whole_batch", False) for part in self.parts)

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        (weights, bounded), *others = [part(tensors) for part in self.parts]
        for other_weights, other_bounded in others:
            weights, bounded = weights * other_weights, bounded | other_bounded
        return weights, bounded


def parse_correction(text: str) -> Correction:
    """A correction from its short form, several joined by commas: `token:2` (`TokenTIS`),
    `sequence:2` (`SequenceTIS`), `geometric:2`, `icepop:0.5:5`, `icepop_sequence:0.5:5`, and any
    kind of `Rejection` with its bounds, as `seq_mean_k3:0.01` or `token_k1:0.5:2` (low, high).

    Raises:
        LossError: it is none of these, or a bound is out of range.
    """
    parts = tuple(map(_parsed, text.split(",")))
    return parts[0] if len(parts) == 1 else Combined(parts=parts)


def _parsed(text: str) -> Correction:
    name, *bounds = text.strip().split(":")
    try:
        low, high = (None, *map(float, bounds))[-2:]
    except ValueError:
        low = high = None
    if high is None or len(bounds) > 2:
        raise LossError(f"correction {text!r}: give a name and one or two numbers, as token:2")
    if name in Rejection.KINDS:
        return Rejection(kind=name, high=high, low=low)
    if name in ("icepop", "icepop_sequence") and low is not None:
        return IcePop(low=low, high=high, sequence=name != "icepop")
    if name == "token" and low is None:
        return TokenTIS(cap=high)
    if name in ("sequence", "geometric") and low is None:
        return SequenceTIS(cap=high, geometric=name == "geometric")
    raise LossError(
        f"correction {text!r} is none of token:CAP, sequence:CAP, geometric:CAP, icepop:LOW:HIGH, "
        f"icepop_sequence:LOW:HIGH, and KIND:HIGH with {', '.join(Rejection.KINDS)}"
    )


def _log_mismatch(tensors: PolicyTensors, *, current: bool = False) -> Tensor:
    trainer = tensors.logprobs if current else tensors.old_logprobs
    if trainer is None:
        raise LossError(
            "a correction needs old_logprobs: the trainer's own logprobs of the policy that sampled"
        )
    return tensors.masked(trainer - tensors.sampling_logprobs).detach()


def _truncated(log_ratio: Tensor, cap: float) -> CorrectionWeights:
    log_cap = math.log(cap)
    return torch.exp(log_ratio.clamp(max=log_cap)), log_ratio > log_cap


def _check_cap(cap: float) -> None:
    if not 1.0 <= cap < math.inf:
        raise LossError(
            f"cap is {cap}: below 1 it would scale down tokens on which the engines agree; "
            "2 is a common choice"
        )
