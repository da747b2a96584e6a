"""`Datum`s of the Fireworks training SDK (extra `fireworks`).

    data = fireworks.to_datums(batch)
    client.forward_backward(data, batch.loss_fn, dict(batch.loss_fn_config)).result()
    client.optim_step(adam, grad_accumulation_normalization="num_loss_tokens").result()

The server adds up raw sums and divides in `optim_step`. With `batch.normalization == "none"` say
there how; with anything else the division is in the data, and the argument must be None.

Routing matrices (router replay, R3) travel in the `ModelInput`, one text for each input position:
that of the token which is predicted there, "" where nothing is known.
"""

from __future__ import annotations

from typing import Any

from eval_protocol_rft.training._batch import TrainingBatch
from eval_protocol_rft.training._datums import TrainingDatum, build_datum, loss_fn_inputs
from eval_protocol_rft.training._types import require


def to_datums(batch: TrainingBatch, *, loss_fn: str | None = None) -> list[Any]:
    """`fireworks.training.sdk.types.Datum`s for `forward_backward`, in the order of the batch.

    They hold views of the batch's arrays where nothing had to be computed.

    Args:
        batch: what to train on.
        loss_fn: the loss that they are for; default the batch's. "cross_entropy" gives target
            tokens and weights, which is what `forward_backward_custom` takes:
            `client.forward_backward_custom(to_datums(batch, loss_fn="cross_entropy"),
            make_loss(batch.loss_fn, batch.loss_fn_config).for_sdk(batch.datums))`.

    Raises:
        MissingPackageError: the SDK is not installed.
        ExportError: `loss_fn_inputs` has nothing for these datums.
    """
    return [to_datum(datum, loss_fn=loss_fn or batch.loss_fn) for datum in batch.datums]


def to_datum(datum: TrainingDatum, *, loss_fn: str) -> Any:
    """One `fireworks.training.sdk.types.Datum`; see `to_datums`."""
    types = require("fireworks.training.sdk.types", install="eval-protocol-rft[fireworks]")
    return build_datum(datum, loss_fn_inputs(datum, loss_fn), types)
