"""One model in training, as the wire's calls change it.

Invariant: the same calls on the same state give the same bits, and a datum's logprobs do not depend
on what it is sent with: each runs through the model alone. A call that fails leaves weights,
optimizer and gradients as they were. Every method blocks; they are called from one thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval_protocol_rft.local import spare_threads
from eval_protocol_rft.loop._lora import add_lora, merged_weights, seeded
from eval_protocol_rft.loop._optimizer import Masters
from eval_protocol_rft.loop._run_options import LoraSettings
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service.training._wire_losses import Example, WireLoss
from eval_protocol_rft.training import losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NotNegative = Annotated[float, msgspec.Meta(ge=0.0)]
_Beta = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class AdamParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As the client sends them, with its defaults. Others than these would be no AdamW: a negative
    bound turns the gradient round, and with an `eps` of 0 a gradient of 0 makes weights NaN."""

    learning_rate: _NotNegative = 0.0001
    beta1: _Beta = 0.9
    beta2: _Beta = 0.95
    eps: Annotated[float, msgspec.Meta(gt=0.0)] = 1e-12
    weight_decay: _NotNegative = 0.0
    grad_clip_norm: _NotNegative = 0.0
    """0: the gradient is not cut."""
    emit_grad_norm_metrics: Any = None


class ModelInTraining:
    """AdamW on all parameters, or on LoRA adapters.

    Args:
        module: the base model, nobody else's.
        lora: adapters to train; None: all parameters.
        seed: of the adapters' first weights.
        start: which weights `module` has; adapters mean nothing on others.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        lora: LoraSettings | None = None,
        seed: int = 0,
        start: str = "",
    ) -> None:
        spare_threads(module)
        base: Any = module
        self._base = base.train(False).requires_grad_(lora is None)
        self._module: torch.nn.Module = self._base
        if lora is not None:
            with seeded(seed):
                self._module = add_lora(self._base, lora)
        self._lora = lora
        self._kind = {} if lora is None else {"start": start, "alpha": lora.alpha}
        self._masters = Masters(self._module)
        self._parameters = self._masters.weights
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=0.0, foreach=False)
        self._tokens = self._sequences = 0
        self.gathered_loss = 0.0
        """Of all that was gathered since the last step."""
        self.steps = 0
        """Taken since the base model's weights, those before a `load` among them."""

    @property
    def has_gradient(self) -> bool:
        """Whether something was gathered since the last step."""
        return any(p.grad is not None for p in self._parameters.values())

    @torch.no_grad()
    def logprobs(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """[T] of each example's targets, at every position.

        Raises:
            ServiceError: one is not finite.
        """
        logprobs = [self._forward(example).cpu().numpy() for example in examples]
        for i, values in enumerate(logprobs):
            if not np.isfinite(values).all():
                raise ServiceError(
                    f"datum {i}: its logprobs are not finite, as the model's weights went too far: "
                    "load a saved state",
                    code=Code.FAILED_PRECONDITION,
                )
        return logprobs

    def forward_backward(
        self, examples: Sequence[Example], loss: WireLoss
    ) -> tuple[list[NDArray[np.float32]], float]:
        """Add to the gradient; returns the logprobs before any update, and the loss.

        Raises:
            ServiceError: the loss of a datum is not finite.
        """
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters.values()]
        try:
            gathered = [self._gather(example, loss, i) for i, example in enumerate(examples)]
        except BaseException:
            for parameter, gradient in zip(self._parameters.values(), before, strict=True):
                parameter.grad = gradient
            raise
        self._tokens += sum(tokens for _, _, tokens in gathered)
        self._sequences += len(examples)
        total = sum(value for _, value, _ in gathered)
        self.gathered_loss += total
        return [lp for lp, _, _ in gathered], total

    def _gather(
        self, example: Example, loss: WireLoss, i: int
    ) -> tuple[NDArray[np.float32], float, int]:
        """Logprobs, loss, and at how many positions it has a gradient."""
        logprobs = self._forward(example)
        leaf = logprobs.detach().requires_grad_()
        value = loss(leaf, example.tensors)
        (gradient,) = torch.autograd.grad(value, leaf)
        if not (value.isfinite() and gradient.isfinite().all()):
            raise ServiceError(f"datum {i}: its loss is {value.item()}, or its gradient not finite")
        torch.autograd.backward(logprobs, gradient)
        return leaf.detach().cpu().numpy(), value.item(), int(gradient.count_nonzero())

    def _forward(self, example: Example) -> Tensor:
        (logprobs,) = losses.token_logprobs(self._module, [example.as_datum()]).logprobs
        return logprobs

    def optim_step(self, adam: AdamParams, normalization: str | None) -> dict[str, float]:
        """One AdamW step with what was gathered, and forget it.

        Args:
            normalization: what the gradient is divided by: `num_loss_tokens` (positions whose
                logprob has a gradient), `num_sequences` (datums), None: nothing.

        Raises:
            ServiceError: the gradient is not finite; it is forgotten, the weights stay.
        """
        counts = {"num_loss_tokens": self._tokens, "num_sequences": self._sequences}
        divisor = max(1, counts[normalization]) if normalization is not None else 1
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif divisor != 1:
                parameter.grad.div_(divisor)
        limit = adam.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), limit)
        if norm.isfinite():
            for group in self._optimizer.param_groups:
                group |= {
                    "lr": adam.learning_rate,
                    "betas": (adam.beta1, adam.beta2),
                    "eps": adam.eps,
                    "weight_decay": adam.weight_decay,
                }
            self._optimizer.step()
            self._masters.write()
            self.steps += 1
        self._forget_gradient()
        if not norm.isfinite():
            raise ServiceError(
                f"the gradient's norm is {norm.item()}: this step was left out",
                code=Code.FAILED_PRECONDITION,
            )
        return {"grad_norm": norm.item(), "learning_rate": adam.learning_rate}

    def _forget_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._tokens = self._sequences = 0
        self.gathered_loss = 0.0

    def weights(self) -> dict[str, Tensor]:
        """By the base model's names, adapters merged in. Not copies."""
        return self._base.state_dict() if self._lora is None else merged_weights(self._module)

    def save(self, path: Path, *, seq: int = 0) -> None:
        """Write weights and optimizer, whole or not at all; a gradient is no part of it.

        Args:
            seq: the call after which this is; `load` returns it.
        """
        state = {
            "parameters": {n: p.detach() for n, p in self._parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "kind": self._kind,
            "steps": self.steps,
            "seq": seq,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path, *, optimizer: bool) -> int:
        """Take over what `save` wrote, with a fresh optimizer if its own is not asked for. Returns
        the `seq` that was saved with it.

        Raises:
            ServiceError: it is of another model, or of other adapters.
        """
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved = state["parameters"]
        shapes = {n: tuple(p.shape) for n, p in self._parameters.items()}
        alike = shapes == {n: tuple(p.shape) for n, p in saved.items()}
        if not alike or state["kind"] != self._kind:
            raise ServiceError(
                "this state is of another model, or was trained with other LoRA adapters",
                code=Code.FAILED_PRECONDITION,
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(saved[name])
        self._masters.write()
        if optimizer:
            self._optimizer.load_state_dict(state["optimizer"])
        else:
            self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=0.0, foreach=False)
        self._forget_gradient()
        self.steps = state["steps"]
        return int(state["seq"])
