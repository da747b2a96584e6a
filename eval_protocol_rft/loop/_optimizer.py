"""What one optimiser step needs around a model in this process: float32 master weights, AdamW with
its state in float32 or in 8 bits, and layers that are computed again instead of being kept.

Invariant: AdamW sees float32 weights and float32 gradients alone, whatever the model computes in;
and none of this changes what a forward pass gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._trainer import TrainerError


class Masters:
    """The trainable weights of a module, in float32: gradients gather in them and the optimiser
    changes them. Weights in half precision are these, rounded: a step of a millionth of a weight,
    which bfloat16 cannot hold (its steps are a 256th), is not lost.

    A weight that is in float32 is its own master. Of others the gradient leaves with every backward
    pass: there is none in half precision, in which those of several passes would not add up.

    Raises:
        TrainerError: weights are in float16.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._rounded: list[tuple[Tensor, Tensor]] = []
        self.weights: dict[str, Tensor] = {}
        """By the names of the module's parameters."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.weights[name] = self._master_of(name, parameter)

    def _master_of(self, name: str, parameter: Any) -> Tensor:
        if parameter.dtype == torch.float16:
            raise TrainerError(
                f"{name} is in float16, whose range gradients leave: train in bfloat16 or float32"
            )
        if parameter.dtype != torch.bfloat16:
            return parameter  # type: ignore[no-any-return]
        master: Tensor = parameter.detach().float().requires_grad_()

        def gather(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                if master.grad is None:
                    master.grad = gradient.float()
                else:
                    master.grad += gradient

        parameter.register_post_accumulate_grad_hook(gather)
        self._rounded.append((parameter, master))
        return master

    @torch.no_grad()
    def write(self) -> None:
        """Give the module the weights that these have become."""
        for parameter, master in self._rounded:
            parameter.copy_(master)


def adamw(weights: Iterable[Tensor], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW on float32 weights; only matrices decay. On a GPU it is one kernel, and on the CPU one
    weight after the other, which takes the least memory.

    Raises:
        TrainerError: its state is to be kept in 8 bits, and bitsandbytes is not installed.
    """
    chosen = list(weights)
    options: dict[str, Any] = {
        "lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.eps,
    }  # fmt: skip
    groups: list[dict[str, Any]] = [
        {"params": [w for w in chosen if w.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in chosen if w.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.variant == "adamw_8bit":
        return _in_8_bits([group for group in groups if group["params"]], options)
    if all(weight.is_cuda for weight in chosen):
        return torch.optim.AdamW(groups, fused=True, **options)
    return torch.optim.AdamW(groups, foreach=False, **options)


def _in_8_bits(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Dettmers et al. 2022 (arXiv:2110.02861): both moments in 8 bits, quantised in blocks of 256;
    weights of fewer than 4,096 numbers keep theirs in float32."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise TrainerError(
            "AdamW in 8 bits needs bitsandbytes: pip install 'eval-protocol-rft[8bit]'"
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, **options)  # type: ignore[no-any-return]


def recompute_layers(module: torch.nn.Module) -> None:
    """Keep the input of each layer alone for the backward pass, which runs the layer once more
    (Chen et al. 2016, arXiv:1604.06174). In evaluation mode, where transformers' own switch does
    nothing: nothing is dropped out, so both runs are the same.

    Raises:
        TrainerError: the model's layers are of no kind that this is known of.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainerError(
            f"{type(module).__name__} has no layers that transformers could compute again: train "
            "without gradient checkpointing, with fewer tokens at once (--microbatch-tokens)"
        )
    for layer in layers:
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again
