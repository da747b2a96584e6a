"""From per-token losses to the one number that is differentiated.

Invariant: the loss is a sum, sum_t weight_t (correction_t policy_loss_t + kl_beta kl_t), and
nothing here divides. Normalisation is in the weights, or is the optimiser step's; never both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from eval_protocol_rft.training.datums import TrainingDatum
from eval_protocol_rft.training.losses.adapters import (
    CustomLoss,
    TokenValues,
    check_same_targets,
    tensors_from_datums,
)
from eval_protocol_rft.training.losses.corrections import Correction, CorrectionWeights
from eval_protocol_rft.training.losses.kl import reference_kl
from eval_protocol_rft.training.losses.metrics import policy_metrics
from eval_protocol_rft.training.losses.policy import (
    CISPO,
    DAPO,
    DRO,
    GSPO,
    PPO,
    ImportanceSampling,
    PolicyLoss,
    Reinforce,
    TokenLoss,
)
from eval_protocol_rft.training.losses.tensors import LossError, PolicyTensors

POLICY_LOSSES: Mapping[str, type[Any]] = {
    "ppo": PPO,
    "grpo": PPO,
    "cispo": CISPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "dro": DRO,
    "importance_sampling": ImportanceSampling,
    "reinforce": Reinforce,
}
"""By the name that `TrainingBatch.loss_fn` and the wire use. GRPO's loss is PPO's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A policy loss with its optional correction and KL penalty. Made by `make_loss`."""

    policy_loss: PolicyLoss
    correction: Correction | None = None
    kl_beta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.kl_beta < math.inf:
            raise LossError(f"kl_beta is finite and not negative, got {self.kl_beta}")

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
        parts = {"policy_loss:sum": self._policy_sum(tensors, token_loss, correction)}
        if self.kl_beta:
            parts["kl_loss:sum"] = self.kl_beta * _weighted_sum(tensors, reference_kl(tensors))
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

    def _policy_sum(
        self, tensors: PolicyTensors, token_loss: TokenLoss, correction: CorrectionWeights | None
    ) -> Tensor:
        if correction is None:
            return _weighted_sum(tensors, token_loss.loss)
        return _weighted_sum(tensors, token_loss.loss * correction.weights)


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
        correction: `TokenTIS`, `SequenceTIS`, `IcePop`, or any function of their shape; needs
            old logprobs with every batch.
        kl_beta: weight of the k3 penalty to a reference policy, per token, under `weights`.

    Raises:
        LossError: unknown name, unknown or missing option, or a value out of range.
    """
    if loss_fn not in POLICY_LOSSES:
        raise LossError(f"unknown loss_fn {loss_fn!r}: one of {', '.join(sorted(POLICY_LOSSES))}")
    policy_loss = POLICY_LOSSES[loss_fn]
    _check_options(loss_fn, fields(policy_loss), config)
    return Objective(policy_loss=policy_loss(**config), correction=correction, kl_beta=kl_beta)


def _check_options(
    loss_fn: str, options: Sequence[Field[Any]], config: Mapping[str, float | str | bool | None]
) -> None:
    names = [option.name for option in options]
    required = [option.name for option in options if option.default is MISSING]
    problems = {
        "unknown": sorted(set(config) - set(names)),
        "missing": [name for name in required if config.get(name) is None],
        "not a number": [
            name
            for name, value in config.items()
            if isinstance(value, (str, bool)) and name in names
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {', '.join(which)}" for what, which in problems.items() if which)
        raise LossError(
            f"loss_fn_config of {loss_fn!r}: {said} (it takes {', '.join(names) or 'nothing'})"
        )


def _weighted_sum(tensors: PolicyTensors, values: Tensor) -> Tensor:
    return (tensors.masked(tensors.weights) * values).sum()
