"""LoRA adapters by peft: put on, and merged for sampling.

Invariant: merging never touches the weights in training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eval_protocol_rft.loop.trainer import TrainerError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Hu et al. 2021 (arXiv:2106.09685): W + alpha / rank * B A."""

    rank: int = 16
    alpha: int = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers, or peft's word for all of them but the output layer."""


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> torch.nn.Module:
    """Put adapters on `model`, which they then share.

    Raises:
        TrainerError: peft is not installed, or finds no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainerError("LoRA needs peft: pip install 'eval-protocol-rft[lora]'") from error
    modules = settings.target_modules
    try:
        adapted: Any = get_peft_model(
            model,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules=modules if isinstance(modules, str) else list(modules),
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise TrainerError(f"LoRA on {type(model).__name__}: {error}") from error
    adapted.train(False)
    return adapted  # type: ignore[no-any-return]


@torch.no_grad()
def merged_weights(adapted: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the base model with the adapters added in, by the base model's names."""
    merged: Any = copy.deepcopy(adapted)
    weights: dict[str, Tensor] = merged.merge_and_unload().state_dict()
    return weights
