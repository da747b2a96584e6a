"""LoRA adapters (peft) on a model in training: put on, and merged for sampling.

Invariant: the merged weights, in the base model, are the policy in training. So a layer whose
weight another one shares takes no adapter: merged into the one, it would change the other as well.
Merging never touches the weights in training, and copies only those that have adapters.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval_protocol_rft.loop._run_options import LoraSettings
from eval_protocol_rft.loop._trainer import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEEDING = threading.Lock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from `seed` inside, as they were before behind it. They are of the
    whole process: of several threads, one at a time is inside."""
    gpus = range(torch.cuda.device_count())
    with _SEEDING, torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


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
        with warnings.catch_warnings():
            # Between peft and transformers, and nothing that a user can do anything about.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
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
    check_mergeable(adapted)
    adapted.train(False)
    return adapted  # type: ignore[no-any-return]


def check_mergeable(adapted: torch.nn.Module) -> None:
    """Whether `merged_weights` of a peft model are the policy in training.

    Raises:
        TrainerError: an adapted layer shares its weight, or an adapter is no plain LoRA.
    """
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    if tied := _tied_targets(base):
        raise TrainerError(
            f"LoRA on {', '.join(tied)}: the weight belongs to another layer of "
            f"{type(base).__name__} as well (tied embeddings), so what is sampled would not be "
            "what was trained: leave it out of target_modules, or untie the model "
            "(tie_word_embeddings=False in its config) first"
        )
    layers = _adapted_layers(base)
    variants = [name for name, layer in layers.items() if getattr(layer, "lora_variant", None)]
    if variants or not layers:
        raise TrainerError(
            f"the adapters of {variants[0] if variants else type(adapted).__name__} are no plain "
            "LoRA, and others are not merged here: use LoraConfig without use_dora"
        )


@torch.no_grad()
def merged_weights(adapted: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the base model with the adapters added in, by the base model's names. Those
    without an adapter are the base model's own tensors, no copies."""
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    layers = _adapted_layers(base)
    weights: dict[str, Tensor] = {}
    for name, value in base.state_dict().items():
        layer = next((path for path in _parents(name) if path in layers), None)
        if layer is None:
            weights[name] = value
        elif name.startswith(f"{layer}.base_layer."):
            weights[name.replace(f"{layer}.base_layer.", f"{layer}.", 1)] = value
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            key = f"{name}.weight"
            # Added in the adapter's precision: rounded first, a small change would be lost twice.
            merged = weights[key] + layer.get_delta_weight(adapter)
            weights[key] = merged.to(weights[key].dtype)
    return weights


def merged_names(adapted: torch.nn.Module) -> frozenset[str]:
    """Names of the base model's weights that adapters change."""
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    return frozenset(f"{name}.weight" for name in _adapted_layers(base))


def _adapted_layers(base: torch.nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


def _tied_targets(base: torch.nn.Module) -> list[str]:
    """Adapted layers whose weight has a second place in the model, under its own name or as the
    same layer twice."""
    layers = _adapted_layers(base)
    places: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        places[parameter.data_ptr()].add(name)
    return [
        n
        for n, layer in layers.items()
        if len(places[layer.get_base_layer().weight.data_ptr()]) > 1
    ]


def _parents(name: str) -> list[str]:
    """`a.b.c` of `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
