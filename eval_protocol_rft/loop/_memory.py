"""How much memory a run in this process takes, sampler and trainer together, before a weight is
read; and what would take less, where that is more than there is.

Invariant: what is counted is what `LocalTrainer` does: its own passes, run without numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval_protocol_rft.local import (
    DEFAULT_MAX_BATCH_TOKENS,
    Memory,
    Placement,
    by_depth,
    estimate,
    free_memory,
    is_small,
    peak_bytes,
    require_fit,
    sampling_memory,
    tensor_bytes,
    unloaded_model,
)
from eval_protocol_rft.loop._optimizer import Masters, recompute_layers
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.training import TrainingDatum, losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LARGEST_STEP = 2
"""Copies of the largest weight that AdamW makes while it changes it, on the CPU."""
_PROMPT, _COMPLETION = 512, 1536
"""Tokens of long ones, where nothing is said of them."""
_SMALLER_RANK = 16
_FEWER_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """What decides how much memory a run in this process takes."""

    config: PretrainedConfig
    place: Placement
    """That was `chosen`."""
    lora: LoraSettings | None
    optimizer: Optimizer
    sampler: Memory = field(default_factory=Memory)
    """What the sampler in this process takes, if there is one."""
    reference: bool
    """A frozen copy is kept, see `LocalTrainer`."""
    longest: int
    """Tokens of a long datum; of longer ones fewer go through the model at once."""
    datums: int
    """Most of them in a step."""

    def memory(self) -> Memory | None:
        """None for a model so small that it matters to nobody."""
        parts = {f"sampler's {name}": size for name, size in self.sampler.parts.items()}
        sampler = Memory(parts, self.sampler.at_most)
        model = unloaded_model(self.config, self.place)
        return None if is_small(model) else sampler | self._training(model)

    def _training(self, model: Any) -> Memory:
        weights = tensor_bytes(model)
        merged = self._prepare(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        rounded = sum(p.numel() for p in trained if p.dtype != torch.float32)
        step = max(p.numel() for p in trained) * 4 * _LARGEST_STEP
        rows = max(1, min(self.datums, self.optimizer.microbatch_tokens // self.longest))
        activations = by_depth(self.config, self.place, partial(self._pass, rows))
        return Memory(
            {
                "weights in training": tensor_bytes(model),
                "their float32 masters": rounded * 4,
                "gradients": count * 4,
                "AdamW's state": count * (2 if self.optimizer.variant == "adamw_8bit" else 8),
                "frozen copy": weights if self.reference and self.lora is None else 0,
                f"a pass of {rows} x {self.longest} tokens": max(activations, step, merged),
            }
        )

    def _prepare(self, model: Any) -> int:
        """As `LocalTrainer` does; returns the bytes of what adapters are merged into."""
        model.requires_grad_(self.lora is None)
        merged = 0 if self.lora is None else _adapt(model, self.lora)
        if self.optimizer.gradient_checkpointing:
            recompute_layers(model)
        return merged

    def _pass(self, rows: int, model: Any) -> int:
        """The peak of a forward and backward pass, gradients aside: they were there before."""
        self._prepare(model)
        own = {id(parameter) for parameter in model.parameters()}
        weights: Any = Masters(model).weights.values()
        for master in weights:
            if id(master) in own:
                master.register_post_accumulate_grad_hook(_forget_gradient)
            else:
                master.grad = torch.zeros_like(master)
        batch = [_datum(self.longest)] * rows

        def forward_backward() -> None:
            values = losses.token_logprobs(model, batch, entropies=True)
            torch.autograd.backward(torch.cat(values.logprobs).sum())

        return peak_bytes(forward_backward)

    def checked(self) -> Memory:
        """What it takes, if that is there.

        Raises:
            RefusedError: it takes more than is free; the message says what would fit.
        """
        memory = estimate(self.memory)
        require_fit(memory, self.place.device, smaller=self._smaller)
        return memory

    def _smaller(self) -> str:
        """The first of some ways to take less that fits, each with those before it."""
        said: list[str] = []
        free = free_memory(self.place.device) or 0
        for flag, changed in self._ways():
            said.append(flag)
            total = estimate(changed.memory).total
            if total <= free:
                return f"with {' '.join(said)} it would take {total / 1e9:.2g} GB"
        return (
            f"nor would it with {' '.join(said)}: train a smaller model, or on several GPUs "
            "(docs/scaling.md)"
        )

    def _ways(self) -> list[tuple[str, LocalRun]]:
        """Flags, each with the run that it and those before it make."""
        ways: list[tuple[str, LocalRun]] = []
        run = self

        def add(flag: str, **changes: Any) -> None:
            nonlocal run
            run = replace(run, **changes)
            ways.append((flag, run))

        if not run.optimizer.gradient_checkpointing:
            add(
                "--gradient-checkpointing",
                optimizer=replace(run.optimizer, gradient_checkpointing=True),
            )
        if run.optimizer.microbatch_tokens > _FEWER_TOKENS:
            add(
                f"--microbatch-tokens {_FEWER_TOKENS}",
                optimizer=replace(run.optimizer, microbatch_tokens=_FEWER_TOKENS),
            )
        if run.place.dtype != "bfloat16":
            half = replace(run.place, dtype="bfloat16")
            sampler = run.sampler
            if sampler.parts:
                sampler = estimate(lambda: sampler_memory(run.config, half))
            add("--dtype bfloat16", place=half, sampler=sampler)
        if run.lora is None:
            rank = _SMALLER_RANK
            add(f"--lora-rank {rank}", lora=LoraSettings(rank=rank, alpha=2 * rank))
        return ways


def sampler_memory(config: PretrainedConfig, place: Placement) -> Memory | None:
    """What a sampler in this process takes, as `train` makes it."""
    return sampling_memory(config, place, max_batch_tokens=DEFAULT_MAX_BATCH_TOKENS)


def _forget_gradient(parameter: Tensor) -> None:
    """In the place of one that it is added to: without numbers that would make another one."""
    parameter.grad = None


def long_datum(config: PretrainedConfig, max_tokens: int | None) -> int:
    """Tokens of a long prompt and a completion of `max_tokens`; None: a long one."""
    text: Any = config.get_text_config(decoder=True)
    asked = _PROMPT + (max_tokens or _COMPLETION)
    return min(asked, getattr(text, "max_position_embeddings", asked))


class _Adapted(torch.nn.Module):
    """A linear layer with an adapter, as peft computes it; peft's own layers need numbers."""

    def __init__(self, layer: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        device = layer.weight.device
        self.down = torch.nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.up = torch.nn.Linear(rank, layer.out_features, bias=False, device=device)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.layer(values)
        changed: Tensor = result + self.up(self.down(values.float())) * 2.0
        return changed.to(result.dtype)


def _adapt(base: Any, settings: LoraSettings) -> int:
    """Put adapters on, and return what merging them makes, in bytes."""
    targets, head = settings.target_modules, base.get_output_embeddings()
    merged = 0
    for name, layer in list(base.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        if isinstance(targets, str):
            chosen = layer is not head if targets == "all-linear" else re.fullmatch(targets, name)
        else:
            chosen = name.rpartition(".")[2] in targets or name in targets
        if chosen:
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _Adapted(layer, settings.rank))
            merged += layer.weight.nbytes
    return merged


def _datum(length: int) -> TrainingDatum:
    """All of it sampled: every position has logits."""
    tokens = np.zeros(length, np.int64)
    ones = np.ones(length, np.float32)
    return TrainingDatum(
        input_tokens=tokens,
        target_tokens=tokens,
        logprobs=-ones,
        advantages=ones,
        weights=ones,
        prompt_length=1,
        reward=0.0,
        truncated=False,
        group=0,
        row_id="of an estimate",
        completion=0,
    )
