"""Between datums and tensors: one flat batch out of many datums, and the SDK's calling form.

Invariant: arrays meet by position only after their lengths, and where possible their target
tokens, were compared; an error names the datum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eval_protocol_rft.training.datums import TrainingDatum
from eval_protocol_rft.training.losses.tensors import LossError, PolicyTensors

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
