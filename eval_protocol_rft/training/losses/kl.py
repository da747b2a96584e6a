"""Distance between two policies, estimated from sampled tokens.

Schulman's estimators ("Approximating KL Divergence", 2020) of KL(q || p) from tokens drawn from q,
with r = p / q: k1 = -log r, and k3 = r - 1 - log r. Both are unbiased; k3 is never negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval_protocol_rft.training.losses.tensors import LOG_RATIO_LIMIT, LossError, PolicyTensors


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
