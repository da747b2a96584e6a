"""`Datum`s of the `tinker` package (extra `tinker`).

    data = tinker.to_datums(batch)
    await client.forward_backward_async(data, batch.loss_fn, dict(batch.loss_fn_config))

Tinker adds up raw sums and never divides: build the batch with the `normalization` you want.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval_protocol_rft.training._batch import TrainingBatch
from eval_protocol_rft.training._datums import TrainingDatum, build_datum, loss_fn_inputs
from eval_protocol_rft.training._types import ExportError, require

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
"""Of the losses that this package knows, those that Tinker has."""


def to_datums(batch: TrainingBatch, *, loss_fn: str | None = None) -> list[Any]:
    """`tinker.types.Datum`s for `forward_backward`, in the order of the batch.

    They hold views of the batch's arrays where nothing had to be computed.

    Args:
        batch: what to train on.
        loss_fn: the loss that they are for; default the batch's. "cross_entropy" is also for
            `forward_backward_custom`, as with `fireworks.to_datums`.

    Raises:
        MissingPackageError: `tinker` is not installed.
        ExportError: Tinker has no such loss, or `loss_fn_inputs` has nothing for these datums.
    """
    return [to_datum(datum, loss_fn=loss_fn or batch.loss_fn) for datum in batch.datums]


def to_datum(datum: TrainingDatum, *, loss_fn: str) -> Any:
    """One `tinker.types.Datum`; see `to_datums`."""
    if loss_fn not in LOSSES:
        raise ExportError(
            f"Tinker has no loss {loss_fn!r}: use one of {', '.join(LOSSES)}, or "
            "forward_backward_custom with make_loss(...).for_sdk(batch.datums)"
        )
    types = require("tinker.types", install="eval-protocol-rft[tinker]")
    inputs = loss_fn_inputs(datum, loss_fn)
    if loss_fn == "gspo":
        # The tokens over which Tinker takes the mean log-ratio of the sequence.
        inputs["sequence_ratio_mask"] = datum.mask.astype(np.float32)
    return build_datum(datum, inputs, types)
