"""The policy losses, each straight from its paper: what one token adds to the loss; the batch of
tensors that they are computed from; and the corrections for a trainer and a sampler that disagree.

Invariant: a loss here is per token, unweighted and undivided. Mask and normalisation live in
`PolicyTensors.weights`, which is applied once, by the objective. Only sampled tokens count:
whatever stands at the other positions, NaN included, moves neither the loss, nor its gradient, nor
a metric; so padding a batch changes nothing. Clip thresholds are absolute bounds on the ratio, as
on the wire: an epsilon of 0.2 is written 0.8 and 1.2. Weights of a correction are constants.

Below, lp is the current logprob, q the anchor's (`PolicyTensors.anchor_logprobs`), A the
advantage, r = exp(lp - q), and sg() lets no gradient through.

Distances between policies are Schulman's estimators ("Approximating KL Divergence", 2020) of
KL(q || p) from tokens drawn from q, with r = p / q: k1 = -log r, and k3 = r - 1 - log r. Both are
unbiased; k3 is never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from eval_protocol_rft._errors import EvalProtocolRftError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are capped here before `exp`, so that one absurd token cannot turn the gradient of a
batch into inf or NaN. e^20 is 4.9e8: no honest ratio comes near it, and `ratio:max` shows it."""


class LossError(EvalProtocolRftError, ValueError):
    """A loss that cannot be built or computed; the message says what is missing or wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTensors:
    """One batch. Every tensor is padded [B, T], one sequence a row, or flat [N]; all alike."""

    logprobs: Tensor
    """Of the policy in training, nats; the gradient flows into these and into nothing else."""
    sampling_logprobs: Tensor
    """Of the policy that sampled, as it drew (after temperature, top-p, top-k)."""
    advantages: Tensor
    weights: Tensor
    """Loss mask times normalisation: what each token's loss is multiplied by before the sum."""
    mask: Tensor | None = None
    """True on sampled tokens; None: wherever `weights` is not zero."""
    sequence_ids: Tensor | None = None
    """[N] int64 in 0..S-1, for a flat batch: which sequence a token belongs to."""
    old_logprobs: Tensor | None = None
    """Of the policy that sampled, as the trainer computes them. Where given, ratios are taken
    against these, and a correction may account for their distance to `sampling_logprobs`."""
    reference_logprobs: Tensor | None = None
    """Of the policy to stay close to."""
    entropies: Tensor | None = None
    """Of the policy in training, per position; only reported."""

    def __post_init__(self) -> None:
        shape = self.logprobs.shape
        if len(shape) not in (1, 2):
            raise LossError(f"logprobs has shape {tuple(shape)}: a batch is [B, T] or [N]")
        for name in _LIKE_LOGPROBS:
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise LossError(
                    f"{name} has shape {tuple(values.shape)} but logprobs {tuple(shape)}"
                )
        if self.sequence_ids is not None and len(shape) == 2:
            raise LossError(
                "sequence_ids are for a flat batch; in a padded one a row is a sequence"
            )

    @property
    def sampled(self) -> Tensor:
        """Bool: where a token counts."""
        return self.weights != 0 if self.mask is None else self.mask.bool()

    @property
    def anchor_logprobs(self) -> Tensor:
        """What ratios are taken against: the trainer's old logprobs, else the sampler's."""
        old = self.old_logprobs
        return (self.sampling_logprobs if old is None else old).detach()

    def masked(self, values: Tensor) -> Tensor:
        """`values` on sampled tokens, zero (value and gradient) elsewhere."""
        return torch.where(self.sampled, values, 0.0)

    def log_ratio(self) -> Tensor:
        """Log of current over anchor probability, per token."""
        return self.masked(self.logprobs - self.anchor_logprobs)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over each token's sequence, at every token of it."""
        if values.ndim == 2:
            return values.sum(dim=-1, keepdim=True).expand_as(values)
        if self.sequence_ids is None:
            raise LossError(
                "a sequence-level quantity over a flat batch needs sequence_ids "
                "(or pass padded [B, T] tensors)"
            )
        size = int(self.sequence_ids.max()) + 1 if values.numel() else 0
        return values.new_zeros(size).index_add(0, self.sequence_ids, values)[self.sequence_ids]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the sampled tokens of each token's sequence."""
        count = self.sequence_sum(self.sampled.to(values.dtype))
        return self.sequence_sum(self.masked(values)) / count.clamp(min=1.0)

    def first_non_finite(self) -> str | None:
        """Name the first sampled token at which an input is NaN or infinite, or None."""
        for name in ("logprobs", *_LIKE_LOGPROBS):
            values = getattr(self, name)
            if values is None:
                continue
            bad = (self.sampled & ~torch.isfinite(values)).nonzero()
            if len(bad):
                index = bad[0].tolist()
                return f"{name}{index} is {values[tuple(index)].item()}"
        return None


_LIKE_LOGPROBS = (
    "sampling_logprobs",
    "advantages",
    "weights",
    "mask",
    "sequence_ids",
    "old_logprobs",
    "reference_logprobs",
    "entropies",
)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp`, capped at e^`LOG_RATIO_LIMIT`; no gradient flows beyond the cap."""
    return torch.exp(log_ratio.clamp(max=LOG_RATIO_LIMIT))


def k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r, per token; by `expm1`, since near r = 1 the plain form is noise."""
    bounded = log_ratio.clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(bounded) - bounded


def reference_kl(tensors: PolicyTensors) -> Tensor:
    """k3 of KL(current || reference) per token, as GRPO adds it to the loss (arXiv:2402.03300,
    eq. 4): r = reference / current. Zero where nothing was sampled.

    Raises:
        LossError: the batch has no reference logprobs.
    """
    if tensors.reference_logprobs is None:
        raise LossError("a KL penalty (kl_beta > 0) needs reference_logprobs")
    return k3(tensors.masked(tensors.reference_logprobs.detach() - tensors.logprobs))


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
