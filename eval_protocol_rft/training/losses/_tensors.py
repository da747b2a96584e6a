"""The batch of tensors that losses are computed from, and what all of them share.

Invariant: only sampled tokens count: whatever stands at the other positions, NaN included, moves
neither a loss, nor its gradient, nor a metric; so padding a batch changes nothing.

Distances between policies are Schulman's estimators ("Approximating KL Divergence", 2020) of
KL(q || p) from tokens drawn from q, with r = p / q: k1 = -log r, and k3 = r - 1 - log r. Both are
unbiased; k3 is never negative.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        ids, zeros = self._sequences(values)
        return zeros.index_add(0, ids, values)[ids]

    def sequence_max(self, values: Tensor) -> Tensor:
        """The largest of `values`, none of them negative, over each token's sequence."""
        if values.ndim == 2:
            return values.amax(dim=-1, keepdim=True).expand_as(values)
        ids, zeros = self._sequences(values)
        return zeros.scatter_reduce(0, ids, values, "amax")[ids]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the sampled tokens of each token's sequence."""
        count = self.sequence_sum(self.sampled.to(values.dtype))
        return self.sequence_sum(self.masked(values)) / count.clamp(min=1.0)

    def _sequences(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[N] which sequence each token of a flat batch belongs to, and a zero for each [S]."""
        if self.sequence_ids is None:
            raise LossError(
                "a sequence-level quantity over a flat batch needs sequence_ids "
                "(or pass padded [B, T] tensors)"
            )
        size = int(self.sequence_ids.max()) + 1 if values.numel() else 0
        return self.sequence_ids, values.new_zeros(size)

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
