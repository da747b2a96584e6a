"""Logprobs of datums under a torch model: the forward pass of a training step.

Invariant: single precision or better from the logits on, whatever the model computes in; and
only sampled positions, one chunk at a time, are ever held in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from eval_protocol_rft.training.datums import TrainingDatum
from eval_protocol_rft.training.losses.layout import (
    Layout,
    bundled,
    sharing_prompts,
    side_by_side,
)
from eval_protocol_rft.training.losses.tensors import LossError

CHUNK_LOGITS = 2**25
"""Logits held in single precision at one time: 128 MiB."""


class TokenLogprobs(NamedTuple):
    """One [T_i] tensor per datum, in its target coordinates; 0 where nothing was sampled."""

    logprobs: list[Tensor]
    """Nats, with gradient where it is enabled."""
    entropies: list[Tensor] | None
    """Nats, of the whole next-token distribution; without gradient."""


def token_logprobs(
    model: torch.nn.Module,
    datums: Sequence[TrainingDatum],
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    share_prompts: bool = False,
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
        share_prompts: neighbours with the same prompt run through the model behind one copy of it.
            The same logprobs up to float noise, for less work where prompts are long; the model
            must be one that `can_share_prompts`.

    Raises:
        LossError: no datums, or a temperature that is not above 0 (greedy has no policy ratio).
    """
    if not datums:
        raise LossError("no datums: there is nothing to run the model on")
    if not temperature > 0.0:
        raise LossError(f"temperature is {temperature}: only a policy above 0 has logprobs")
    bundles = bundled(datums) if share_prompts else []
    if any(len(places) > 1 for places in bundles):
        layout = sharing_prompts([[datums[i] for i in places] for places in bundles])
    else:
        layout = side_by_side(datums)
    device = next(model.parameters()).device
    chosen = _logits(model, layout, device)
    targets = torch.from_numpy(layout.targets).to(device)
    return TokenLogprobs(
        _per_datum(_logprobs(chosen, targets, temperature), datums),
        _per_datum(_entropies(chosen, temperature), datums) if entropies else None,
    )


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether every layer attends to all that it is shown, so that a mask alone decides what a
    token sees: no sliding window, no recurrence."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return False
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) if not kinds else None
    # Some count distances in columns, inside their layers (GPT-Neo, Falcon).
    by_column = "local" in (getattr(text, "attention_layers", None) or ()) or getattr(
        text, "alibi", False
    )
    return (
        not window
        and not by_column
        and kinds <= {"full_attention"}
        and getattr(text, "_attn_implementation", None) in ("sdpa", "eager")
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def _logits(model: torch.nn.Module, layout: Layout, device: torch.device) -> Tensor:
    """[M, V] logits of the sampled targets."""
    # Where all rows begin with unsampled tokens (a prompt), their logits are not even computed.
    first = layout.first_column
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = layout.input_ids.shape[1] - first
    if layout.positions is not None:
        options["position_ids"] = torch.from_numpy(layout.positions).to(device)
        seen = torch.from_numpy(layout.attended).to(device)
        # Added to the scores: eager attention does not know a mask of truth values.
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
    else:
        mask = torch.from_numpy(layout.attended.astype(np.int64)).to(device)
    logits: Tensor = model(
        input_ids=torch.from_numpy(layout.input_ids).to(device), attention_mask=mask, **options
    ).logits
    skipped = layout.input_ids.shape[1] - logits.shape[1]
    rows, columns = torch.from_numpy(layout.rows), torch.from_numpy(layout.columns - skipped)
    return logits[rows.to(device), columns.to(device)]


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


def _per_datum(values: Tensor, datums: Sequence[TrainingDatum]) -> list[Tensor]:
    """[M] values to one [T_i] tensor per datum."""
    masks = [torch.from_numpy(datum.mask).to(values.device) for datum in datums]
    flat = torch.cat(masks)
    spread = values.new_zeros(len(flat)).masked_scatter(flat, values)
    return list(torch.split(spread, [len(mask) for mask in masks]))
