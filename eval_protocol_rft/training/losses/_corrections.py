"""Corrections for a trainer and a sampler that disagree.

Invariant: the weights of a correction are constants: no gradient flows through them. They multiply
the policy losses of a batch, and never its KL penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from eval_protocol_rft.training.losses._tensors import LossError, PolicyTensors

CorrectionWeights: TypeAlias = tuple[Tensor, Tensor]
"""Weights, and Bool where their bound took effect; both shaped like the batch."""


class Correction(Protocol):
    """From a batch to the weights of its policy losses: what makes up for a trainer and a sampler
    that disagree.

    The same weights give other logprobs in the trainer (`old_logprobs`) than in the sampler
    (`sampling_logprobs`): other kernels, precision, parallelism, expert routing. A correction
    multiplies each token's policy loss by a bounded form of their ratio c = exp(old - sampling).
    """

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTIS:
    """min(c, cap) for each token (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; caps of 2 to 10 are in use)."""

    cap: float

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        return _truncated(_log_mismatch(tensors), self.cap)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTIS:
    """min(product of c over the sequence, cap) for all its tokens (Liu et al. 2025, "When Speed
    Kills Stability"); with `geometric`, their geometric mean instead of the product, which does
    not grow with length and is biased."""

    cap: float
    geometric: bool = False

    def __post_init__(self) -> None:
        _check_cap(self.cap)

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        log_mismatch = _log_mismatch(tensors)
        over_sequence = tensors.sequence_mean if self.geometric else tensors.sequence_sum
        return _truncated(over_sequence(log_mismatch), self.cap)


@dataclass(frozen=True, slots=True, kw_only=True)
class IcePop:
    """c where low <= c <= high, else 0: a token on which the two engines differ by more takes no
    part (arXiv:2510.18855; Ant Group 2025 uses 0.5 and 5)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= 1.0 <= self.high < math.inf:
            raise LossError(
                f"IcePop keeps ratios between 0 < low <= 1 <= high, got {self.low} and {self.high}"
            )

    def __call__(self, tensors: PolicyTensors) -> CorrectionWeights:
        # The cap only keeps exp finite: what lies above `high` is dropped just below.
        ratio = torch.exp(_log_mismatch(tensors).clamp(max=math.log(self.high) + 1.0))
        outside = (ratio < self.low) | (ratio > self.high)
        return ratio.masked_fill(outside, 0.0), outside


def _log_mismatch(tensors: PolicyTensors) -> Tensor:
    if tensors.old_logprobs is None:
        raise LossError(
            "a correction needs old_logprobs: the trainer's own logprobs of the policy that sampled"
        )
    return tensors.masked(tensors.old_logprobs - tensors.sampling_logprobs).detach()


def _truncated(log_ratio: Tensor, cap: float) -> CorrectionWeights:
    log_cap = math.log(cap)
    return torch.exp(log_ratio.clamp(max=log_cap)), log_ratio > log_cap


def _check_cap(cap: float) -> None:
    if not 1.0 <= cap < math.inf:
        raise LossError(
            f"cap is {cap}: below 1 it would scale down tokens on which the engines agree; "
            "2 is a common choice"
        )
