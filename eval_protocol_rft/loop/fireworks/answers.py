"""What the training server answers, checked before anything is made of it.

Invariant: logprobs meet datums by position only after their numbers and lengths were compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval_protocol_rft.loop.trainer import TrainerError
from eval_protocol_rft.training.arrays import FloatArray
from eval_protocol_rft.training.datums import TrainingDatum


def read_logprobs(result: Any, datums: Sequence[TrainingDatum]) -> list[FloatArray]:
    """[T_i] per datum from an answer of the training server, 0.0 where nothing was sampled.

    Raises:
        TrainerError: not one finite value per sampled target.
    """
    outputs = result.loss_fn_outputs
    if len(outputs) != len(datums):
        raise TrainerError(f"the server answered {len(outputs)} datums of {len(datums)}")
    found: list[FloatArray] = []
    for i, (output, datum) in enumerate(zip(outputs, datums, strict=True)):
        values = output["logprobs"].to_numpy().reshape(-1)
        if len(values) != len(datum):
            raise TrainerError(
                f"datum {i}: the server answered {len(values)} logprobs for {len(datum)} targets"
            )
        kept = np.where(datum.mask, values, np.float32(0.0)).astype(np.float32)
        if not np.isfinite(kept).all():
            place = int(np.flatnonzero(~np.isfinite(kept))[0])
            raise TrainerError(f"datum {i}, target {place}: the server's logprob is {kept[place]}")
        found.append(kept)
    return found


def check_shapes(
    name: str, values: Sequence[FloatArray] | None, datums: Sequence[TrainingDatum]
) -> None:
    """Raise a TrainerError unless `values` is None or one [T_i] array per datum."""
    if values is None:
        return
    shapes = [np.shape(value) for value in values]
    wanted = [(len(datum),) for datum in datums]
    if shapes != wanted:
        raise TrainerError(f"{name} has shapes {shapes}, the datums have targets {wanted}")
