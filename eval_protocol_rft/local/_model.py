"""What sampling needs of a causal language model. Weights are read here and nowhere else.

Invariant: a model whose state is more than keys and values is refused, never batched approximately.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from eval_protocol_rft.sampling import RefusedError


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model and the few facts about it that decide how it is sampled."""

    module: PreTrainedModel
    layers: int
    """Layers that keep keys and values."""
    vocab_size: int
    context_length: int
    """Most tokens that prompt and completion may have together."""
    skips_logits: bool
    """Whether the module can leave out the logits of all positions but the last."""

    @classmethod
    def wrap(cls, module: PreTrainedModel) -> LocalModel:
        """Take a causal language model, and put it into evaluation mode.

        Raises:
            RefusedError: it is recurrent or hybrid, or its config names no context length.
        """
        config = module.config.get_text_config(decoder=True)
        cache_layers = DynamicCache(config=config).layers
        kinds = {type(layer) for layer in cache_layers}
        if not kinds or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no cache layers"
            raise RefusedError(
                f"{type(module).__name__} has {names}; local sampling batches plain attention "
                "caches only: serve this model with vLLM and sample over HTTP"
            )
        context_length = getattr(config, "max_position_embeddings", None)
        if not isinstance(context_length, int):
            raise RefusedError(
                f"the config of {type(module).__name__} has no max_position_embeddings, so its "
                "context length is unknown: set it on the config"
            )
        module.train(False)
        return cls(
            module=module,
            layers=len(cache_layers),
            vocab_size=config.vocab_size,
            context_length=context_length,
            skips_logits="logits_to_keep" in inspect.signature(module.forward).parameters,
        )

    @property
    def device(self) -> torch.device:
        return self.module.device

    def last_logits(self, ids_BQ: Tensor, lengths_B: Tensor, cache: Cache) -> Tensor:
        """[B, V] logits that follow the last of Q new right-aligned columns. `lengths_B` counts
        each row's tokens, new ones included; `cache` takes up the keys and values of the new."""
        new = ids_BQ.shape[1]
        width = cache.get_seq_length() + new
        column_W = torch.arange(width, device=ids_BQ.device)
        padding_B1 = (width - lengths_B).unsqueeze(1)
        options: dict[str, Any] = {"logits_to_keep": 1} if self.skips_logits else {}
        output = self.module(
            input_ids=ids_BQ,
            attention_mask=column_W >= padding_B1,
            position_ids=(column_W[-new:] - padding_B1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


@torch.no_grad()
def copy_weights(
    module: PreTrainedModel, weights: Mapping[str, Tensor], *, keep: Collection[str] = ()
) -> None:
    """Copy `weights` over those of `module`, all or none; those in `keep` may be missing.

    Raises:
        RefusedError: they are not this model's.
    """
    current = module.state_dict()
    shared = {value.data_ptr() for name, value in current.items() if name in weights}
    known = {*weights, *keep}
    missing = [n for n, v in current.items() if n not in known and v.data_ptr() not in shared]
    unknown = [name for name in weights if name not in current]
    misshapen = [n for n, v in weights.items() if n in current and v.shape != current[n].shape]
    for what, names in (("lack", missing), ("have unknown", unknown), ("misshape", misshapen)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RefusedError(f"the new weights {what} {names[0]}{more}: are they of this model?")
    for name, value in weights.items():
        current[name].copy_(value)
