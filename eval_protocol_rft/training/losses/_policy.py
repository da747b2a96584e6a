"""The policy losses, each straight from its paper: what one token adds to the loss.

Invariant: a loss here is per token, unweighted and undivided. Mask and normalisation live in
`PolicyTensors.weights`, which is applied once, by the objective. Clip thresholds are absolute
bounds on the ratio, as on the wire: an epsilon of 0.2 is written 0.8 and 1.2.

Below, lp is the current logprob, q the anchor's (`PolicyTensors.anchor_logprobs`), A the
advantage, r = exp(lp - q), and sg() lets no gradient through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eval_protocol_rft.training.losses._tensors import LossError, PolicyTensors, bounded_exp


class TokenLoss(NamedTuple):
    """All shaped like the batch."""

    loss: Tensor
    """Loss per token, zero where nothing was sampled."""
    ratio: Tensor
    """The importance ratio that the loss used (per sequence for GSPO), without gradient."""
    clipped: Tensor | None
    """Bool: where a threshold took effect; None for a loss that has none."""


PolicyLoss = Callable[[PolicyTensors], TokenLoss]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceSampling:
    """-r A: unbiased off-policy policy gradient, unclipped."""

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        ratio = bounded_exp(tensors.log_ratio())
        return TokenLoss(-ratio * tensors.masked(tensors.advantages), ratio.detach(), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """-lp A: the score function estimator (Williams 1992), which takes the data as on-policy.

    The form -r A, which some recipes also call REINFORCE, is `ImportanceSampling`.
    """

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        loss = -tensors.masked(tensors.logprobs) * tensors.masked(tensors.advantages)
        return TokenLoss(loss, bounded_exp(tensors.log_ratio().detach()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO:
    """-min(r A, clamp(r, low, high) A): the clipped surrogate of PPO (arXiv:1707.06347, eq. 7),
    which GRPO keeps (arXiv:2402.03300, eq. 3). The losses that are made from it have its
    thresholds."""

    clip_low_threshold: float
    clip_high_threshold: float

    def __post_init__(self) -> None:
        low, high = self.clip_low_threshold, self.clip_high_threshold
        if not 0.0 <= low <= 1.0 <= high < math.inf:
            raise LossError(
                "clip thresholds are absolute bounds on the ratio, 0 <= clip_low_threshold <= 1 <= "
                f"clip_high_threshold, got {low} and {high}; an epsilon of 0.2 is written 0.8 and "
                "1.2"
            )

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        return self._surrogate(tensors, bounded_exp(tensors.log_ratio()))

    def _surrogate(
        self, tensors: PolicyTensors, ratio: Tensor, dual: float | None = None
    ) -> TokenLoss:
        """-min(r A, clamp(r, low, high) A), written as a clamp of r from the one side that the sign
        of A makes pessimistic; the dual clip is the other side for A < 0."""
        low, high = self.clip_low_threshold, self.clip_high_threshold
        advantages = tensors.masked(tensors.advantages)
        bounded = torch.where(advantages < 0, ratio.clamp(low, dual), ratio.clamp(max=high))
        clipped = (bounded != ratio) & (advantages != 0)
        return TokenLoss(-bounded * advantages, ratio.detach(), clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class DAPO(PPO):
    """PPO's surrogate with bounds chosen apart ("clip higher", arXiv:2503.14476, eq. 8) and, where
    `dual_clip_threshold` c is given, max(that, c A) for A < 0 (dual clip, arXiv:1912.09729),
    so that a bad token grown more than c times as likely stops pushing. DAPO's token-level mean and
    overlong shaping are the batch's part: weights and rewards."""

    dual_clip_threshold: float | None = None

    def __post_init__(self) -> None:
        PPO.__post_init__(self)
        dual = self.dual_clip_threshold
        if dual is not None and not 1.0 < dual < math.inf:
            raise LossError(f"dual_clip_threshold bounds the ratio from above 1, got {dual}")

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        ratio = bounded_exp(tensors.log_ratio())
        return self._surrogate(tensors, ratio, self.dual_clip_threshold)


class GSPO(PPO):
    """-min(s A, clamp(s, low, high) A) with the sequence ratio s = exp(mean(lp - q)), the mean over
    sampled tokens only (arXiv:2507.18071, eq. 5). Each token has its own gradient, through
    sg(s) exp(lp - sg(lp)) (the paper's GSPO-token); with equal advantages in a sequence and
    weights of 1/length, that is the gradient of the sequence-level loss."""

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        sequence_ratio = bounded_exp(tensors.sequence_mean(tensors.log_ratio().detach()))
        logprobs = tensors.masked(tensors.logprobs)
        return self._surrogate(tensors, sequence_ratio * torch.exp(logprobs - logprobs.detach()))


class CISPO(PPO):
    """-sg(clamp(r, low, high)) lp A (MiniMax-M1, arXiv:2506.13585, eq. 4): the weight is
    clipped, so no token loses its gradient. The paper leaves the lower bound off: 0."""

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        ratio = bounded_exp(tensors.log_ratio().detach())
        weight = ratio.clamp(self.clip_low_threshold, self.clip_high_threshold)
        loss = -weight * tensors.masked(tensors.logprobs) * tensors.masked(tensors.advantages)
        return TokenLoss(loss, ratio, weight != ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class DRO:
    """-(lp A - beta/2 (lp - q)^2): direct reward optimisation (arXiv:2405.19107), taken per
    token. The square acts on sampled tokens only, those of advantage zero included."""

    beta: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < math.inf:
            raise LossError(
                f"beta scales a penalty and is finite and not negative, got {self.beta}"
            )

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        log_ratio = tensors.log_ratio()
        reward = tensors.masked(tensors.logprobs) * tensors.masked(tensors.advantages)
        loss = 0.5 * self.beta * log_ratio.square() - reward
        return TokenLoss(loss, bounded_exp(log_ratio.detach()), None)
