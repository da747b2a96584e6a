"""Logprobs of datums under a torch model: the forward pass of a training step.

Invariant: single precision or better from the logits on, whatever the model computes in; and
only sampled positions, one chunk at a time, are ever held in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from eval_protocol_rft.training.datums import TrainingDatum
from eval_protocol_rft.training.losses.tensors import LossError

CHUNK_LOGITS = 2**25
"""Logits held in single precision at one time: 128 MiB."""


class TokenLogprobs(NamedTuple):
    """One [T_i] tensor per datum, in its target coordinates; 0 where nothing was sampled."""

    logprobs: list[Tensor]
    """Nats, with gradient where it is enabled."""
    entropies: list[Tensor] | None
    """Nats, of the whole next-token distribution; without gradient."""


class _Padded(NamedTuple):
    """Datums padded on the right to [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    sampled: Tensor


def token_logprobs(
    model: torch.nn.Module,
    datums: Sequence[TrainingDatum],
    *,
    temperature: float = 1.0,
    entropies: bool = False,
) -> TokenLogprobs:
    """Run `datums` through `model` as one right-padded batch.

    Args:
        model: a causal language model that takes `input_ids` and `attention_mask` and returns an
            object with `logits`, as transformers models do. In `eval()` mode, or free of dropout:
            otherwise its logprobs are of another policy than the one that sampled.
        datums: as many as fit in memory at once.
        temperature: the one sampled with: the policy that sampled was softmax(logits / T).
            A vocabulary cut by top-p or top-k is not rebuilt here.
        entropies: compute them too.

    Raises:
        LossError: no datums, or a temperature that is not above 0 (greedy has no policy ratio).
    """
    if not datums:
        raise LossError("no datums: there is nothing to run the model on")
    if not temperature > 0.0:
        raise LossError(f"temperature is {temperature}: only a policy above 0 has logprobs")
    batch = _padded(datums, next(model.parameters()).device)
    # Where all datums begin with unsampled tokens (a prompt), their logits are not even computed.
    first = int(batch.sampled.any(dim=0).to(torch.uint8).argmax())
    trims = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": batch.sampled.shape[1] - first} if trims else {}
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, **kept
    ).logits
    sampled = batch.sampled[:, -logits.shape[1] :]
    chosen, targets = logits[sampled], batch.targets[batch.sampled]
    lengths = [len(datum) for datum in datums]
    return TokenLogprobs(
        _per_datum(_logprobs(chosen, targets, temperature), batch.sampled, lengths),
        _per_datum(_entropies(chosen, temperature), batch.sampled, lengths) if entropies else None,
    )


def _padded(datums: Sequence[TrainingDatum], device: torch.device) -> _Padded:
    shape = (len(datums), max(map(len, datums)))
    ids, targets, attended = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    sampled = np.zeros(shape, dtype=np.bool_)
    for i, datum in enumerate(datums):
        row = slice(len(datum))
        ids[i, row] = datum.input_tokens
        targets[i, row] = datum.target_tokens
        attended[i, row] = 1
        sampled[i, row] = datum.mask
    return _Padded(*(torch.from_numpy(x).to(device) for x in (ids, attended, targets, sampled)))


def _logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[M, V] logits and [M] targets to [M] logprobs. Under gradient, each chunk is computed again
    in the backward pass instead of being kept in single precision."""
    size = _chunk_size(logits)
    pairs = zip(torch.split(logits, size), torch.split(targets, size), strict=True)
    recompute = partial(checkpoint, _chosen_logprobs, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([recompute(*pair, temperature) for pair in pairs])


def _chosen_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -cross_entropy(_scaled(logits, temperature), targets, reduction="none")


@torch.no_grad()
def _entropies(logits: Tensor, temperature: float) -> Tensor:
    """[M, V] logits to [M] entropies."""
    chunks = (_scaled(chunk, temperature) for chunk in torch.split(logits, _chunk_size(logits)))
    return torch.cat([torch.special.entr(chunk.softmax(dim=-1)).sum(dim=-1) for chunk in chunks])


def _chunk_size(logits: Tensor) -> int:
    return max(1, CHUNK_LOGITS // logits.shape[-1])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return precise if temperature == 1.0 else precise / temperature


def _per_datum(values: Tensor, sampled: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    padded = values.new_zeros(sampled.shape).masked_scatter(sampled, values)
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]
