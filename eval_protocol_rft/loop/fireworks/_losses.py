"""Which loss the server computes by itself, and how any other is computed on this side.

Invariant: the server is given a loss by name only where its documented formula on the tensors that
it gets is ours, to the last weight. Everything else is differentiated here, with respect to the
logprobs, and reaches the server as weights of a cross entropy, which is exact for any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval_protocol_rft.loop._trainer import LossFunction, NamedLoss
from eval_protocol_rft.training import (
    FloatArray,
    TrainingDatum,
    build_datum,
    loss_fn_inputs,
    require,
)

if TYPE_CHECKING:
    from torch import Tensor

    from eval_protocol_rft.training.losses import Objective

BUILT_IN = {
    "ppo": "ppo",
    "grpo": "ppo",
    "importance_sampling": "importance_sampling",
    "cispo": "cispo",
}
"""Name of ours -> name on the wire. Not here although the server has the name: dro acts on the
prompt too; over which tokens gspo takes its mean, what reinforce multiplies, and what dapo adds to
ppo is not documented."""

SERVER_LOSS = "loss:sum"

SdkLoss = Callable[[Sequence[Any], Sequence["Tensor"]], "tuple[Tensor, dict[str, float]]"]


def built_in_name(loss: NamedLoss | LossFunction) -> str | None:
    """The server's name for exactly this loss, or None."""
    if not isinstance(loss, NamedLoss) or loss.kl_beta or loss.correction is not None:
        return None
    return BUILT_IN.get(loss.loss_fn)


def built_in_data(
    datums: Sequence[TrainingDatum],
    loss_fn: str,
    *,
    old_logprobs: Sequence[FloatArray] | None,
    types: Any,
) -> list[Any]:
    """SDK datums for a loss that the server computes. Ratios are taken against `old_logprobs`,
    which must be one [T_i] array per datum; None: against the sampler's own."""
    data = []
    for i, datum in enumerate(datums):
        inputs = loss_fn_inputs(datum, loss_fn)
        if old_logprobs is not None:
            # The server takes exp(current - this) at every position, the prompt's too.
            old = np.where(datum.mask, old_logprobs[i], np.float32(0.0))
            inputs = {**inputs, "logprobs": old.astype(np.float32)}
        data.append(build_datum(datum, inputs, types))
    return data


def objective_of(loss: NamedLoss) -> Objective:
    """The loss in torch; checks its name, thresholds and options.

    Raises:
        LossError: unknown name, unknown or missing option, or a value out of range.
        MissingPackageError: torch is not installed.
    """
    losses = require("eval_protocol_rft.training.losses", install="eval-protocol-rft[local]")
    objective: Objective = losses.make_loss(
        loss.loss_fn, loss.config, correction=loss.correction, kl_beta=loss.kl_beta
    )
    return objective


def value_of(
    objective: Objective,
    datums: Sequence[TrainingDatum],
    logprobs: Sequence[FloatArray],
    *,
    old_logprobs: Sequence[FloatArray] | None,
) -> tuple[float, dict[str, float]]:
    """The loss and its metrics at [T_i] logprobs per datum, without gradient."""
    torch = require("torch", install="eval-protocol-rft[local]")
    tensors = [torch.from_numpy(values) for values in logprobs]
    loss, metrics = objective(datums, tensors, old_logprobs=old_logprobs)
    return float(loss), metrics


def with_difference(
    server: Mapping[str, float], ours: tuple[float, dict[str, float]]
) -> dict[str, float]:
    """The server's metrics and ours, and how far its loss is from ours, where it tells."""
    loss, metrics = ours
    if SERVER_LOSS in server:
        metrics = {**metrics, "server_loss_difference:max": abs(server[SERVER_LOSS] - loss)}
    return {**server, **metrics}


def custom_loss(
    loss: NamedLoss | LossFunction,
    datums: Sequence[TrainingDatum],
    *,
    old_logprobs: Sequence[FloatArray] | None,
    reference_logprobs: Sequence[FloatArray] | None,
) -> SdkLoss:
    """`loss` as `forward_backward_custom` calls it, for `datums` in the order of its data."""
    if isinstance(loss, NamedLoss):
        return objective_of(loss).for_sdk(
            datums, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs
        )
    adapters = require(
        "eval_protocol_rft.training.losses._objective", install="eval-protocol-rft[local]"
    )
    torch = require("torch", install="eval-protocol-rft[local]")
    closure = loss

    def loss_fn(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        adapters.check_same_targets(datums, data)
        # As every trainer gives them: 0 where nothing was sampled, and no gradient through it.
        masked = [
            torch.where(torch.from_numpy(datum.mask), values, 0.0)
            for datum, values in zip(datums, logprobs, strict=True)
        ]
        return closure(datums, masked)

    return loss_fn
