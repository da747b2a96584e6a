"""What is sent with every optimiser step and every fine-tuning step, spelled out.

Invariant: nothing that decides the numbers is left to a default of the SDK or the server, unless
its docstring says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eval_protocol_rft.loop._trainer import TrainerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) as the training server runs it."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    """The SDK's own default is 1e-12."""
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    """Longer gradients are cut to this norm; None: never."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        for name in ("eps", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite, not negative, got {getattr(self, name)}")
        norm = self.max_grad_norm
        # On the wire 0 means that nothing is cut.
        if norm is not None and not 0.0 < norm < math.inf:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {norm}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How one reinforcement fine-tuning step trains: what its job is created with."""

    learning_rate: float
    lora_rank: int
    """At least 1: the next step starts from an adapter, and so does the deployment."""
    epochs: int = 1
    """Passes over the step's data. After the first the data is no longer of the policy."""
    loss_method: Literal["GRPO", "DAPO", "GSPO_TOKEN"] = "GRPO"
    kl_beta: float | None = None
    """Penalty to the reference; None leaves it to the method (GRPO is documented with 0.001)."""
    max_context_length: int | None = None
    """Tokens of the longest sample; None leaves it to the server."""
    batch_size: int | None = None
    """Tokens of a packed batch; None leaves it to the server."""
    node_count: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.kl_beta is not None and not 0.0 <= self.kl_beta < math.inf:
            raise ValueError(f"kl_beta must be finite and not negative, got {self.kl_beta}")
        for name in ("lora_rank", "epochs", "max_context_length", "batch_size", "node_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def check_temperature(temperature: float) -> None:
    """Raise a TrainerError unless `temperature`, the sampler's, is 1."""
    if temperature != 1.0:
        raise TrainerError(
            f"completions are sampled at temperature {temperature}, and Fireworks' trainer "
            "computes logprobs at 1 only, so its ratios to the sampler's would be wrong: sample at "
            "temperature 1, or train where the model is local"
        )
