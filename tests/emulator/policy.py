"""One model in training, by the documented formulas: sums over all positions, unmasked.

Written straight from the wire's documentation and apart from `eval_protocol_rft.training.losses`,
which it is there to check.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

INPUTS = {
    "cross_entropy": {"target_tokens", "weights"},
    "ppo": {"target_tokens", "logprobs", "advantages"},
    "cispo": {"target_tokens", "logprobs", "advantages"},
    "importance_sampling": {"target_tokens", "logprobs", "advantages"},
}
"""Names of the tensors that a loss takes: no more, no less."""
Datums = list[dict[str, Any]]


class Policy:
    """Gradients add up until `step`. `module` is in training, `start` is where that began."""

    def __init__(self, module: Any) -> None:
        self.module = copy.deepcopy(module).train(False)
        self.start = copy.deepcopy(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0, foreach=False)

    def forward(self, data: Datums, *, base: bool = False) -> list[Tensor]:
        """[T] logprobs of each datum's targets, at every position."""
        module = self.start if base else self.module
        found = []
        for datum in data:
            (chunk,) = datum["model_input"]["chunks"]
            logits = module(input_ids=torch.tensor([chunk["tokens"]])).logits[0]
            targets = torch.tensor(datum["loss_fn_inputs"]["target_tokens"]["data"])
            found.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
        return found

    def forward_backward(
        self, data: Datums, loss_fn: str, config: dict[str, float] | None
    ) -> tuple[list[Tensor], float]:
        logprobs = self.forward(data)
        loss = torch.stack(
            [
                _loss(loss_fn, lp, datum["loss_fn_inputs"], config or {})
                for lp, datum in zip(logprobs, data, strict=True)
            ]
        ).sum()
        loss.backward()
        return logprobs, loss.item()

    def step(self, adam: dict[str, float]) -> float:
        """One AdamW step; returns the norm of the gradient before it is cut."""
        limit = adam["grad_clip_norm"] or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"], group["eps"] = adam["learning_rate"], adam["eps"]
            group["betas"] = (adam["beta1"], adam["beta2"])
            group["weight_decay"] = adam["weight_decay"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def state(self) -> Any:
        return copy.deepcopy((self.module.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: Any, *, optimizer: bool) -> None:
        weights, moments = copy.deepcopy(state)
        self.module.load_state_dict(weights)
        if optimizer:
            self.optimizer.load_state_dict(moments)


def check_tensors(data: Datums, loss_fn: str) -> None:
    """Raise a ValueError at what the wire does not allow."""
    for i, datum in enumerate(data):
        (chunk,) = datum["model_input"]["chunks"]
        tensors = datum["loss_fn_inputs"]
        if set(tensors) != INPUTS[loss_fn]:
            raise ValueError(f"datum {i}: {loss_fn} does not take {sorted(tensors)}")
        for name, tensor in tensors.items():
            wanted = "int64" if name == "target_tokens" else "float32"
            size = len(chunk["tokens"])
            if (tensor["dtype"], tensor["shape"], len(tensor["data"])) != (wanted, [size], size):
                raise ValueError(f"datum {i}: {name} is {tensor['dtype']} {tensor['shape']}")


def _loss(
    loss_fn: str, lp: Tensor, tensors: dict[str, dict[str, Any]], config: dict[str, float]
) -> Tensor:
    given = {name: torch.tensor(t["data"]) for name, t in tensors.items()}
    if loss_fn == "cross_entropy":
        return -(lp * given["weights"]).sum()
    ratio, gain = (lp - given["logprobs"]).exp(), given["advantages"]
    if loss_fn == "importance_sampling":
        return -(ratio * gain).sum()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    if loss_fn == "ppo":
        return -torch.minimum(ratio * gain, clipped * gain).sum()
    return -(clipped.detach() * lp * gain).sum()
