"""What a loss reports beside its value.

Keys are `name:reduction`, the training wire's own form: none hides a metric of the server's, and
each says how to fold the values of several batches. Every mean is over sampled tokens. A metric
that cannot be had (nothing clips, no reference, no sampled token) is absent, never 0 or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval_protocol_rft.training.losses.corrections import CorrectionWeights
from eval_protocol_rft.training.losses.kl import k3, reference_kl
from eval_protocol_rft.training.losses.policy import TokenLoss
from eval_protocol_rft.training.losses.tensors import PolicyTensors


def policy_metrics(
    tensors: PolicyTensors, token_loss: TokenLoss, correction: CorrectionWeights | None
) -> dict[str, Tensor]:
    """Metrics of one batch as float64 scalars, left on the device.

    tokens:sum: sampled tokens.
    ratio:mean, ratio:max: the ratio that the loss used (GSPO: per sequence).
    clip_fraction:mean: share of tokens on which a clip threshold took effect.
    sampler_kl_k1:mean, sampler_kl_k3:mean: KL(sampler || current policy), two estimates.
    effective_sample_fraction:mean: Kish's effective sample size of the weights r = current /
        sampler, per token: (sum r)^2 / (n sum r^2).
    sampler_entropy:mean: mean of -log q: an estimate of the sampler's entropy, too high where
        groups without a gradient were dropped, as their tokens are the less surprising ones.
    entropy:mean: of the policy in training, exact, where the batch brings it.
    reference_kl_k3:mean: KL(current || reference), where the batch brings a reference.
    correction:mean, correction_bounded:mean: correction weights, and the share that was bounded.
    """
    sampled = tensors.sampled
    metrics = {"tokens:sum": sampled.sum().double()}
    if not sampled.any():
        return metrics

    def mean(values: Tensor) -> Tensor:
        return values.detach()[sampled].double().mean()

    metrics["ratio:mean"] = mean(token_loss.ratio)
    metrics["ratio:max"] = token_loss.ratio[sampled].max().double()
    if token_loss.clipped is not None:
        metrics["clip_fraction:mean"] = mean(token_loss.clipped)
    metrics |= _sampler_metrics(
        tensors.logprobs.detach()[sampled].double(), tensors.sampling_logprobs[sampled].double()
    )
    if tensors.entropies is not None:
        metrics["entropy:mean"] = mean(tensors.entropies)
    if tensors.reference_logprobs is not None:
        metrics["reference_kl_k3:mean"] = mean(reference_kl(tensors))
    if correction is not None:
        metrics["correction:mean"] = mean(correction.weights)
        metrics["correction_bounded:mean"] = mean(correction.bounded)
    return metrics


def _sampler_metrics(logprobs: Tensor, sampling_logprobs: Tensor) -> dict[str, Tensor]:
    """[n] float64 each: the k3 of nearly equal policies is below single-precision rounding."""
    log_ratio = logprobs - sampling_logprobs
    # Relative to the largest: the fraction is the same, and no square can overflow.
    ratio = torch.exp(log_ratio - log_ratio.max())
    return {
        "sampler_kl_k1:mean": -log_ratio.mean(),
        "sampler_kl_k3:mean": k3(log_ratio).mean(),
        "effective_sample_fraction:mean": ratio.mean().square() / ratio.square().mean(),
        "sampler_entropy:mean": -sampling_logprobs.mean(),
    }
