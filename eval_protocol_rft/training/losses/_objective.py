"""From per-token losses to the one number that is differentiated.

Invariant: the loss is a sum, sum_t weight_t (correction_t policy_loss_t + kl_beta kl_t), and
nothing here divides. Normalisation is in the weights, or is the optimiser step's; never both.

Between datums and tensors: one flat batch out of many datums, and the SDK's calling form.

Invariant: arrays meet by position only after their lengths, and where possible their target
tokens, were compared; an error names the datum.

What a loss reports beside its value.

Keys are `name:reduction`, the training wire's own form: none hides a metric of the server's, and
each says how to reduce the values of several batches. Every mean is over sampled tokens. A metric
that cannot be had (nothing clips, no reference, no sampled token) is absent, never 0 or NaN.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training.losses import _policy as policy
from eval_protocol_rft.training.losses._corrections import Correction, CorrectionWeights
from eval_protocol_rft.training.losses._tensors import LossError, PolicyTensors, k3, reference_kl

TokenValues: TypeAlias = Tensor | npt.NDArray[np.floating[Any]] | Sequence[float]
"""[T] values of one datum, one per target token."""
CustomLoss: TypeAlias = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]


def tensors_from_datums(
    data: Sequence[TrainingDatum],
    logprobs: Sequence[Tensor],
    *,
    old_logprobs: Sequence[TokenValues] | Literal["current"] | None = None,
    reference_logprobs: Sequence[TokenValues] | None = None,
    entropies: Sequence[TokenValues] | None = None,
) -> PolicyTensors:
    """Lay datums end to end as one flat batch, on the device of `logprobs`; a datum is a sequence.

    Raises:
        LossError: no datums, or one list is not one [T_i] entry per datum.
    """
    if not data:
        raise LossError("no datums: there is nothing to compute a loss from")
    lengths = [len(datum) for datum in data]
    _check_lengths("logprobs", lengths, logprobs)
    current = torch.cat(list(logprobs))
    current = current.to(torch.promote_types(current.dtype, torch.float32))

    def flat(name: str, values: Sequence[TokenValues] | None) -> Tensor | None:
        if values is None:
            return None
        _check_lengths(name, lengths, values)
        return torch.cat([torch.as_tensor(value) for value in values]).to(current)

    return PolicyTensors(
        logprobs=current,
        sampling_logprobs=_concatenated([datum.logprobs for datum in data], current),
        advantages=_concatenated([datum.advantages for datum in data], current),
        weights=_concatenated([datum.weights for datum in data], current),
        sequence_ids=torch.repeat_interleave(torch.tensor(lengths)).to(current.device),
        old_logprobs=(
            current.detach() if old_logprobs == "current" else flat("old_logprobs", old_logprobs)
        ),
        reference_logprobs=flat("reference_logprobs", reference_logprobs),
        entropies=flat("entropies", entropies),
    )


def check_same_targets(datums: Sequence[TrainingDatum], data: Sequence[Any]) -> None:
    """Compare the target tokens of a trainer's datums with ours, one by one.

    Raises:
        LossError: other number, order or tokens; the message names the first datum that differs.
    """
    if len(datums) != len(data):
        raise LossError(f"the loss was made for {len(datums)} datums, the trainer has {len(data)}")
    for i, (ours, theirs) in enumerate(zip(datums, data, strict=True)):
        if not np.array_equal(
            ours.target_tokens, theirs.loss_fn_inputs["target_tokens"].to_numpy()
        ):
            raise LossError(
                f"datum {i}: the trainer's target tokens are not those that the loss was made for; "
                "pass the same datums in the same order to both"
            )


def _concatenated(arrays: Sequence[npt.NDArray[np.float32]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(like)


def _check_lengths(name: str, lengths: Sequence[int], values: Sequence[TokenValues]) -> None:
    if len(values) != len(lengths):
        raise LossError(f"{name} has {len(values)} entries for {len(lengths)} datums")
    for i, (length, value) in enumerate(zip(lengths, values, strict=True)):
        shape = tuple(np.shape(value))
        if shape != (length,):
            raise LossError(f"{name}[{i}] has shape {shape}, the datum {length} target tokens")


def policy_metrics(
    tensors: PolicyTensors,
    token_loss: policy.TokenLoss,
    correction: CorrectionWeights | None,
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
        metrics["correction:mean"], metrics["correction_bounded:mean"] = map(mean, correction)
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


POLICY_LOSSES: Mapping[str, type[Any]] = {
    "ppo": policy.PPO,
    "grpo": policy.PPO,
    "cispo": policy.CISPO,
    "dapo": policy.DAPO,
    "gspo": policy.GSPO,
    "dro": policy.DRO,
    "importance_sampling": policy.ImportanceSampling,
    "reinforce": policy.Reinforce,
    "geo_mean": policy.GMPO,
    "sapo": policy.SAPO,
    "dppo_tv": policy.DPPOTV,
    "dppo_kl": policy.DPPOKL,
    "clip_cov": policy.ClipCov,
    "kl_cov": policy.KLCov,
}
"""By the name that `TrainingBatch.loss_fn` uses: the wire's where it has the loss, else verl's.
GRPO's loss is PPO's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A policy loss with its optional correction and KL penalty. Made by `make_loss`."""

    policy_loss: policy.PolicyLoss
    correction: Correction | None = None
    kl_beta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.kl_beta < math.inf:
            raise LossError(f"kl_beta is finite and not negative, got {self.kl_beta}")

    @property
    def whole_batch(self) -> bool:
        """Whether a token's loss depends on the others of its batch, so that the losses of two
        halves are not that of the whole."""
        parts = (self.policy_loss, self.correction)
        return any(getattr(part, "whole_batch", False) for part in parts)

    def __call__(
        self,
        data: Sequence[TrainingDatum],
        logprobs: Sequence[Tensor],
        *,
        old_logprobs: Sequence[TokenValues] | Literal["current"] | None = None,
        reference_logprobs: Sequence[TokenValues] | None = None,
        entropies: Sequence[TokenValues] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of `data`, ready for `backward()`, and its metrics.

        Args:
            data: datums of one batch, or micro-batch: losses are sums, so their gradients add up.
            logprobs: per datum [T_i], of its target tokens under the policy in training
                (`token_logprobs`, or what a trainer's forward pass returned).
            old_logprobs: per datum [T_i], of the policy that sampled, as the trainer computes
                them; "current": `logprobs` without gradient, right for the first update after
                sampling. None: ratios are taken against the sampling logprobs.
            reference_logprobs: per datum [T_i], for the KL penalty.
            entropies: per datum [T_i], to be reported.

        Raises:
            LossError: lengths differ, something that the loss needs is missing, or the loss is
                not finite; the message names the datum, field or token.
        """
        return self.on_tensors(
            tensors_from_datums(
                data,
                logprobs,
                old_logprobs=old_logprobs,
                reference_logprobs=reference_logprobs,
                entropies=entropies,
            )
        )

    def on_tensors(self, tensors: PolicyTensors) -> tuple[Tensor, dict[str, float]]:
        """The same for tensors that are already batched, padded or flat."""
        token_loss = self.policy_loss(tensors)
        correction = self.correction(tensors) if self.correction is not None else None
        per_token = token_loss.loss if correction is None else token_loss.loss * correction[0]
        parts = {"policy_loss:sum": _weighted_sum(tensors, per_token)}
        if self.kl_beta:
            penalty = reference_kl(tensors)
            parts["kl_loss:sum"] = self.kl_beta * _weighted_sum(tensors, penalty)
        loss = torch.stack(list(parts.values())).sum()
        metrics = parts | policy_metrics(tensors, token_loss, correction)
        # One transfer for all: each .item() of its own would wait for the device.
        values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()
        if not math.isfinite(sum(values)):
            culprit = tensors.first_non_finite() or "its inputs are, but too large"
            raise LossError(f"the loss or a metric is not finite: {culprit}")
        return loss, dict(zip(metrics, values, strict=True))

    def for_sdk(
        self,
        datums: Sequence[TrainingDatum],
        *,
        old_logprobs: Sequence[TokenValues] | Literal["current"] | None = None,
        reference_logprobs: Sequence[TokenValues] | None = None,
    ) -> CustomLoss:
        """This loss as the training SDK's `forward_backward_custom(data, loss_fn)` wants it.

        The SDK lets only target tokens and weights into `data`, so advantages and logprobs come
        from `datums`, in the order of `data`; target tokens are compared, and a mix-up raises.
        The trainer's forward pass knows no temperature: with other than 1, its logprobs are not
        those of the policy that sampled. Metrics are merged into the result as they are.
        """

        def loss_fn(
            data: Sequence[Any], logprobs_list: Sequence[Tensor]
        ) -> tuple[Tensor, dict[str, float]]:
            check_same_targets(datums, data)
            return self(
                datums,
                logprobs_list,
                old_logprobs=old_logprobs,
                reference_logprobs=reference_logprobs,
            )

        return loss_fn


def make_loss(
    loss_fn: str,
    config: Mapping[str, float | str | bool | None],
    *,
    correction: Correction | None = None,
    kl_beta: float = 0.0,
) -> Objective:
    """The loss that `TrainingBatch.loss_fn` and `loss_fn_config` name.

    Args:
        loss_fn: a key of `POLICY_LOSSES`.
        config: that loss's own options, no more and no less; thresholds have no defaults.
        correction: `TokenTIS`, `SequenceTIS`, `IcePop`, `Rejection`, several in `Combined`, or any
            function of their shape; needs old logprobs with every batch.
        kl_beta: weight of the k3 penalty to a reference policy, per token, under `weights`.

    Raises:
        LossError: unknown name, unknown or missing option, or a value out of range.
    """
    if loss_fn not in POLICY_LOSSES:
        raise LossError(f"unknown loss_fn {loss_fn!r}: one of {', '.join(sorted(POLICY_LOSSES))}")
    policy_loss = POLICY_LOSSES[loss_fn]
    _check_options(loss_fn, policy_loss, config)
    return Objective(policy_loss=policy_loss(**config), correction=correction, kl_beta=kl_beta)


def _check_options(
    loss_fn: str, policy_loss: type[Any], config: Mapping[str, float | str | bool | None]
) -> None:
    options = inspect.signature(policy_loss).parameters
    names = list(options)
    problems = {
        "unknown": sorted(set(config) - set(names)),
        "missing": [
            name
            for name, option in options.items()
            if option.default is option.empty and config.get(name) is None
        ],
        "not a number": [
            name
            for name, value in config.items()
            if isinstance(value, (str, bool)) and name in names
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{what}: {', '.join(which)}" for what, which in problems.items() if which
        )
        raise LossError(
            f"loss_fn_config of {loss_fn!r}: {listed} (it takes {', '.join(names) or 'nothing'})"
        )


def _weighted_sum(tensors: PolicyTensors, values: Tensor) -> Tensor:
    return (tensors.masked(tensors.weights) * values).sum()
