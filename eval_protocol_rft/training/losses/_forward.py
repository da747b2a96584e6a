"""Logprobs of datums under a torch model: the forward pass of a training step.

Invariant: single precision or better from the logits on, whatever the model computes in; and
only sampled positions, one chunk at a time, are ever held in it.

How datums lie in one batch of token ids, and where their targets' logits come out.

Invariant: every sampled target has exactly one place, whose logits follow the very tokens that
stand before it in its datum. Shapes: D datums, B rows of W columns, M sampled targets.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training.losses._tensors import LossError

SHARED_WIDTH = 1024
"""Most columns of a row whose datums share their prompt: attention costs the square of it."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """One batch as arrays."""

    input_ids: Ints
    """[B, W] padded on the right."""
    attended: NDArray[np.bool_]
    """[B, W] False on padding; or [B, 1, W, W] what each column sees, where prompts are shared."""
    positions: Ints | None
    """[B, W] position of each token in its own datum; None where columns are positions."""
    rows: Ints
    """[M] of the logits that predict each sampled target, datum by datum."""
    columns: Ints
    targets: Ints
    """[M] ids."""

    @property
    def first_column(self) -> int:
        """No logits are needed before it."""
        return int(self.columns.min()) if len(self.columns) else 0


def side_by_side(datums: Sequence[TrainingDatum]) -> Layout:
    """A row for each datum."""
    width = max(map(len, datums))
    input_ids = np.zeros((len(datums), width), np.int64)
    attended = np.zeros((len(datums), width), np.bool_)
    for row, datum in enumerate(datums):
        input_ids[row, : len(datum)] = datum.input_tokens
        attended[row, : len(datum)] = True
    columns = [np.flatnonzero(datum.mask) for datum in datums]
    return Layout(
        input_ids=input_ids,
        attended=attended,
        positions=None,
        rows=np.repeat(np.arange(len(datums)), [len(row) for row in columns]),
        columns=np.concatenate(columns),
        targets=_targets(datums),
    )


def sharing_prompts(bundles: Sequence[Sequence[TrainingDatum]]) -> Layout:
    """A row for each bundle: its prompt once, then what follows it in each of its datums, which
    sees the prompt and itself.

    Args:
        bundles: datums with the same prompt each, see `bundled`.
    """
    # Where the input of a datum ends in its row.
    ends = [
        bundle[0].prompt_length + np.cumsum([len(d) - d.prompt_length for d in bundle])
        for bundle in bundles
    ]
    width = max(int(row[-1]) for row in ends)
    shape = (len(bundles), width)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)  # 0: the prompt; k: what follows it in the k-th datum
    rows: list[Ints] = []
    columns: list[Ints] = []
    for i, bundle in enumerate(bundles):
        prompt = bundle[0].prompt_length
        input_ids[i, :prompt] = bundle[0].input_tokens[:prompt]
        positions[i, :prompt] = np.arange(prompt)
        segments[i, :prompt] = 0
        start = prompt
        for k, (datum, stop) in enumerate(zip(bundle, ends[i].tolist(), strict=True), start=1):
            input_ids[i, start:stop] = datum.input_tokens[prompt:]
            positions[i, start:stop] = np.arange(prompt, len(datum))
            segments[i, start:stop] = k
            sampled = np.flatnonzero(datum.mask)
            rows.append(np.full(len(sampled), i))
            # The target after the prompt is predicted by the prompt's own last token.
            columns.append(np.where(sampled < prompt, sampled, sampled - prompt + start))
            start = stop
    query, key = segments[:, :, None], segments[:, None, :]
    attended = ((key == 0) | (key == query)) & (positions[:, None, :] <= positions[:, :, None])
    # Padding is seen by nobody, and sees itself: a softmax over nothing would be NaN.
    attended &= key >= 0
    attended |= np.eye(width, dtype=np.bool_)
    return Layout(
        input_ids=input_ids,
        attended=attended[:, None],
        positions=positions,
        rows=np.concatenate(rows),
        columns=np.concatenate(columns),
        targets=_targets([datum for bundle in bundles for datum in bundle]),
    )


def bundled(datums: Sequence[TrainingDatum]) -> list[list[int]]:
    """Places of neighbours with the same prompt, as many as fit into `SHARED_WIDTH` columns."""
    bundles: list[list[int]] = []
    width = 0
    for place, datum in enumerate(datums):
        columns = len(datum) - datum.prompt_length
        previous = datums[bundles[-1][0]] if bundles else None
        if (
            previous is not None
            and width + columns <= SHARED_WIDTH
            and _same_prompt(previous, datum)
        ):
            bundles[-1].append(place)
            width += columns
        else:
            bundles.append([place])
            width = len(datum)
    return bundles


def _same_prompt(one: TrainingDatum, other: TrainingDatum) -> bool:
    length = one.prompt_length
    return length == other.prompt_length and np.array_equal(
        one.input_tokens[:length], other.input_tokens[:length]
    )


def _targets(datums: Sequence[TrainingDatum]) -> Ints:
    return np.concatenate([datum.target_tokens[datum.mask] for datum in datums])


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
        and "position_ids" in _arguments(model)
    )


def _logits(model: torch.nn.Module, layout: Layout, device: torch.device) -> Tensor:
    """[M, V] logits of the sampled targets."""
    # Where all rows begin with unsampled tokens (a prompt), their logits are not even computed.
    first = layout.first_column
    options: dict[str, Any] = {}
    taken = _arguments(model)
    if "logits_to_keep" in taken:
        options["logits_to_keep"] = layout.input_ids.shape[1] - first
    if "use_cache" in taken:
        # Keys and values for a next token that never comes.
        options["use_cache"] = False
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


def _arguments(model: torch.nn.Module) -> Collection[str]:
    """What the model's forward takes by name; of one with adapters (peft), whose own takes all that
    the model within takes."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inspect.signature(inner.forward).parameters


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
