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
from typing import ClassVar, NamedTuple

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


class GMPO(PPO):
    """-g A with the sequence ratio g = exp(mean(log r clipped)), the geometric mean of the clipped
    ratios of the sampled tokens (Geometric-Mean Policy Optimization, arXiv:2507.20673; `geo_mean`
    in verl). Each log r is clipped from the one side that the sign of A makes pessimistic. Every
    token of a sequence has the sequence's loss, so with weights of 1/length their sum is the
    paper's. The paper's bounds are e^-0.4 and e^0.4; verl and TRL write them as 0.4."""

    def __post_init__(self) -> None:
        PPO.__post_init__(self)
        if self.clip_low_threshold == 0.0:
            raise LossError("clip_low_threshold is 0: GMPO clips the log of the ratio")

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        low, high = math.log(self.clip_low_threshold), math.log(self.clip_high_threshold)
        log_ratio, advantages = tensors.log_ratio(), tensors.masked(tensors.advantages)
        bounded = torch.where(advantages < 0, log_ratio.clamp(min=low), log_ratio.clamp(max=high))
        ratio = bounded_exp(tensors.sequence_mean(bounded))
        clipped = (bounded != log_ratio) & (advantages != 0)
        return TokenLoss(-ratio * advantages, ratio.detach(), clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class SAPO:
    """-f(r) A with the gate f(r) = sigmoid(tau (r - 1)) 4 / tau in place of a clip, tau = `tau_pos`
    for A > 0 and `tau_neg` else (Soft Adaptive Policy Optimization, arXiv:2511.20347). Its slope is
    1 at r = 1 and falls smoothly on both sides; towards tau = 0 it is `ImportanceSampling`. The
    paper uses 1 and 1.05: what a bad token changes is damped sooner."""

    tau_pos: float
    tau_neg: float

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise LossError(
                    f"{name} is a temperature, finite and above 0, got {getattr(self, name)}"
                )

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        ratio = bounded_exp(tensors.log_ratio())
        advantages = tensors.masked(tensors.advantages)
        tau = torch.full_like(ratio, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        gate = torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau)
        return TokenLoss(-gate * advantages, ratio.detach(), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPOTV:
    """-sg(min(r, cap)) lp A, and 0 where the token's probability left the trust region in the
    direction that A pushes: p - p_q > high for A > 0, p - p_q < -low else, with p = exp(lp) and
    p_q = exp(q). DPPO with the binary total variation (arXiv:2602.04879; `dppo_tv` in verl, whose
    example uses 0.15 for both). Thresholds bound a distance, not a ratio.

    This is the paper's DPPO; what Fireworks computes under the name `dppo` is not published."""

    divergence_low_threshold: float
    divergence_high_threshold: float
    ratio_cap: float

    def __post_init__(self) -> None:
        for name in ("divergence_low_threshold", "divergence_high_threshold"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise LossError(
                    f"{name} bounds a divergence, finite and not negative, got "
                    f"{getattr(self, name)}"
                )
        if not 1.0 <= self.ratio_cap < math.inf:
            raise LossError(f"ratio_cap bounds the ratio from above, at least 1: {self.ratio_cap}")

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        advantages, logprobs = tensors.masked(tensors.advantages), tensors.masked(tensors.logprobs)
        ratio = bounded_exp(tensors.log_ratio().detach())
        above, below = self._outside(logprobs.detach(), tensors.masked(tensors.anchor_logprobs))
        outside = torch.where(advantages > 0, above, below)
        weight = ratio.clamp(max=self.ratio_cap).masked_fill(outside, 0.0)
        return TokenLoss(-weight * logprobs * advantages, ratio, outside & (advantages != 0))

    def _outside(self, logprobs: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Where p is too far above p_q, and where too far below."""
        change = torch.exp(logprobs) - torch.exp(anchor)
        return change > self.divergence_high_threshold, change < -self.divergence_low_threshold


class DPPOKL(DPPOTV):
    """The same with the binary KL divergence, p_q log(p_q / p) + (1 - p_q) log((1 - p_q)/(1 - p)),
    as the distance (arXiv:2602.04879; `dppo_kl` in verl, whose example uses 0.05)."""

    def _outside(self, logprobs: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        # Rounding may put a logprob above 0.
        logprobs, anchor = logprobs.clamp(max=0.0), anchor.clamp(max=0.0)
        rest, anchor_rest = (1e-8 - torch.expm1(x) for x in (logprobs, anchor))
        p_q = torch.exp(anchor)
        divergence = p_q * (anchor - logprobs) + (1.0 - p_q) * torch.log(anchor_rest / rest)
        above = (divergence > self.divergence_high_threshold) & (logprobs > anchor)
        return above, (divergence > self.divergence_low_threshold) & (logprobs < anchor)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCov(PPO):
    """PPO's surrogate, and 0 for a few tokens drawn at random from those whose covariance (lp -
    mean lp)(A - mean A) lies between `clip_cov_lb` and `clip_cov_ub`, as tokens of high covariance
    are those that cost the policy its entropy (Clip-Cov, arXiv:2505.22617). Means are over all
    sampled tokens of the batch, of which floor(`clip_cov_ratio` n), at least 1, are drawn, none of
    them clipped already. `seed` decides the draw, so equal batches have equal losses. The paper's
    code and verl use 2e-4, 1 and 5."""

    clip_cov_ratio: float
    clip_cov_lb: float
    clip_cov_ub: float
    seed: int = 0
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        PPO.__post_init__(self)
        _check_share("clip_cov_ratio", self.clip_cov_ratio)
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise LossError(
                f"clip_cov_lb must be below clip_cov_ub, got {self.clip_cov_lb} and "
                f"{self.clip_cov_ub}"
            )

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        loss, ratio, clipped = PPO.__call__(self, tensors)
        covariance = _covariance(tensors)
        eligible = (covariance > self.clip_cov_lb) & (covariance < self.clip_cov_ub)
        if clipped is not None:
            eligible = eligible & ~clipped
        places = (eligible & tensors.sampled).flatten().nonzero().squeeze(-1)
        count = max(int(self.clip_cov_ratio * int(tensors.sampled.sum())), 1)
        # On the CPU, so that a device's own generator does not decide.
        generator = torch.Generator().manual_seed(int(self.seed))
        drawn = places[torch.randperm(len(places), generator=generator)[:count].to(places.device)]
        chosen = _at(drawn, tensors.sampled)
        loss = loss.masked_fill(chosen, 0.0)
        return TokenLoss(loss, ratio, chosen if clipped is None else clipped | chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLCov:
    """-r A, and for the tokens of the highest covariance `ppo_kl_coef` |lp - q| besides (KL-Cov,
    arXiv:2505.22617, with the distance of the paper's code and of verl). They are
    floor(`kl_cov_ratio` n) of the n sampled tokens of the batch, at least 1. Nothing is clipped:
    the penalty alone keeps those tokens near. verl uses 2e-4 and 0.1, the paper a coefficient of
    1."""

    kl_cov_ratio: float
    ppo_kl_coef: float
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("kl_cov_ratio", self.kl_cov_ratio)
        if not 0.0 <= self.ppo_kl_coef < math.inf:
            raise LossError(f"ppo_kl_coef is finite and not negative, got {self.ppo_kl_coef}")

    def __call__(self, tensors: PolicyTensors) -> TokenLoss:
        log_ratio, sampled = tensors.log_ratio(), tensors.sampled
        ratio = bounded_exp(log_ratio)
        places = sampled.flatten().nonzero().squeeze(-1)
        count = min(max(int(self.kl_cov_ratio * len(places)), 1), len(places))
        highest = torch.topk(_covariance(tensors).flatten()[places], count).indices
        chosen = _at(places[highest], sampled)
        penalty = self.ppo_kl_coef * log_ratio.abs().masked_fill(~chosen, 0.0)
        return TokenLoss(
            penalty - ratio * tensors.masked(tensors.advantages), ratio.detach(), chosen
        )


def _covariance(tensors: PolicyTensors) -> Tensor:
    """(lp - mean lp)(A - mean A), means over all sampled tokens; without gradient."""
    count = tensors.sampled.sum().clamp(min=1)
    logprobs = tensors.masked(tensors.logprobs).detach()
    advantages = tensors.masked(tensors.advantages)
    return (logprobs - logprobs.sum() / count) * (advantages - advantages.sum() / count)


def _at(places: Tensor, like: Tensor) -> Tensor:
    """Bool, shaped like `like`: True at the flat `places`."""
    flat = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    flat[places] = True
    return flat.view(like.shape)


def _check_share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise LossError(f"{name} is a share of the batch's tokens, above 0 and at most 1: {value}")
