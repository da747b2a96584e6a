"""Datums as they come over the wire, and the losses that the service computes on them.

Written from the wire's documentation alone and apart from `eval_protocol_rft.training.losses`, so
that the one checks the other. T positions a datum, position t being about its t-th target token;
lp are the logprobs of the model in training, q the `logprobs` of the datum, A its `advantages`,
r = exp(lp - q). Every loss is a sum over all positions: the wire has no mask, and what was not
sampled has advantage or weight 0. Of these sources nothing says over which positions `gspo` takes
its mean: here over those whose advantage is not 0; nor what `reinforce` and `dppo` are: the first
is taken as the cookbook's client computes it, the second is refused.

Invariant: a datum is checked whole before anything is computed; what is wrong names datum, tensor
and place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.training import FloatArray, TrainingDatum

_Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Chunk(msgspec.Struct, frozen=True):
    tokens: list[_Integer]
    type: Literal["encoded_text"] = "encoded_text"


class _ModelInput(msgspec.Struct, frozen=True):
    chunks: list[_Chunk]


class _TensorData(msgspec.Struct, frozen=True):
    data: list[float]
    dtype: Literal["float32", "int64"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class _Datum(msgspec.Struct, frozen=True):
    model_input: _ModelInput
    loss_fn_inputs: dict[str, _TensorData]


class LossInput(msgspec.Struct, frozen=True):
    """`forward_input` and `forward_backward_input`."""

    data: list[_Datum]
    loss_fn: str
    loss_fn_config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One datum that was checked."""

    tokens: NDArray[np.int64]
    """[T] int64, what the model reads."""
    tensors: Mapping[str, NDArray[Any]]
    """[T] each."""

    def as_datum(self) -> TrainingDatum:
        """As the forward pass takes it, every position a target."""
        zeros: FloatArray = np.zeros(len(self.tokens), np.float32)
        return TrainingDatum(
            input_tokens=self.tokens,
            target_tokens=self.tensors["target_tokens"],
            logprobs=zeros,
            advantages=zeros,
            weights=np.ones_like(zeros),
            prompt_length=1,
            reward=0.0,
            truncated=False,
            group=0,
            row_id=None,
            completion=0,
        )


_RL = frozenset({"target_tokens", "logprobs", "advantages"})
_INPUTS: Mapping[str, frozenset[str]] = {
    "cross_entropy": frozenset({"target_tokens", "weights"}),
    "importance_sampling": _RL,
    "ppo": _RL,
    "cispo": _RL,
    "dro": _RL,
    "dapo": _RL,
    "gspo": _RL,
    "reinforce": _RL,
}
_MASKS = frozenset({"weights", "loss_mask"})
"""Tensors that may be of either type: they multiply."""
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CAP = {"ratio_log_cap": 20.0}
_LARGEST = 1e30
"""Of a setting: well within float32."""
_CONFIG: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": _CAP,
    "reinforce": _CAP,
    "ppo": {**_CLIP, **_CAP},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0, **_CAP},
    "dro": {"beta": 0.05},
    "dapo": {**_CLIP, "clip_high_threshold": 1.28, "eps_clip_c": math.inf, **_CAP},
    "gspo": {
        "clip_low_threshold": 1 - 3e-4,
        "clip_high_threshold": 1 + 4e-4,
        "seq_ratio_log_cap": 10.0,
    },
}
"""Keys that each loss takes, with what is used where a request names none."""


def read_examples(given: LossInput, *, vocabulary: int, context: int) -> list[Example]:
    """The datums of a `forward_backward`.

    Raises:
        ServiceError: an unknown loss, or the first thing that is wrong with a datum.
    """
    if given.loss_fn not in _INPUTS:
        raise ServiceError(
            f"loss_fn {given.loss_fn!r} is not one of {', '.join(sorted(_INPUTS))}"
            + (", which this server has: its formula is not published" * (given.loss_fn == "dppo"))
        )
    return [
        _example(datum, i, given.loss_fn, vocabulary, context) for i, datum in enumerate(given.data)
    ]


def read_targets(given: LossInput, *, vocabulary: int, context: int) -> list[Example]:
    """The datums of a `forward`, which asks for logprobs of the target tokens alone."""
    return [_example(datum, i, None, vocabulary, context) for i, datum in enumerate(given.data)]


def _example(datum: _Datum, i: int, loss_fn: str | None, vocabulary: int, context: int) -> Example:
    tokens = np.array([t for c in datum.model_input.chunks for t in c.tokens], np.int64)
    if not 0 < len(tokens) <= context:
        raise ServiceError(
            f"datum {i}: model_input has {len(tokens)} tokens, this model takes 1 to {context}"
        )
    names = datum.loss_fn_inputs.keys()
    wanted = _INPUTS[loss_fn] if loss_fn is not None else {"target_tokens"}
    if missing := sorted(wanted - names):
        raise ServiceError(f"datum {i}: loss_fn_inputs lacks {', '.join(missing)}")
    if loss_fn is not None and (unknown := sorted(names - wanted)):
        raise ServiceError(
            f"datum {i}: {loss_fn} takes {', '.join(sorted(wanted))} in loss_fn_inputs, not "
            f"{', '.join(unknown)}"
        )
    tensors = {
        name: _array(values, f"datum {i}: {name}", name, len(tokens))
        for name, values in datum.loss_fn_inputs.items()
    }
    for name, ids in (("model_input", tokens), ("target_tokens", tensors["target_tokens"])):
        outside = np.flatnonzero((ids < 0) | (ids >= vocabulary))
        if len(outside):
            raise ServiceError(
                f"datum {i}: {name}[{outside[0]}] is {ids[outside[0]]}, this model has the tokens "
                f"0 to {vocabulary - 1}"
            )
    return Example(tokens, tensors)


def _array(values: _TensorData, where: str, name: str, length: int) -> NDArray[Any]:
    if values.sparse_crow_indices is not None or values.sparse_col_indices is not None:
        raise ServiceError(f"{where} is sparse: this server takes one value a position")
    kinds = (
        ("int64",)
        if name == "target_tokens"
        else ("float32", "int64")
        if name in _MASKS
        else ("float32",)
    )
    if values.dtype not in kinds:
        raise ServiceError(f"{where} has dtype {values.dtype}, not {' or '.join(kinds)}")
    shape = [len(values.data)] if values.shape is None else values.shape
    if shape != [length] or len(values.data) != length:
        raise ServiceError(
            f"{where} has shape {shape} and {len(values.data)} values, and model_input has "
            f"{length} tokens"
        )
    given = np.array(values.data, np.float64)
    if values.dtype == "int64":
        fits = (given == np.floor(given)) & (np.abs(given) < 2**53)
    else:
        fits = np.abs(given) <= np.finfo(np.float32).max
    bad = np.flatnonzero(~fits)
    if len(bad):
        raise ServiceError(f"{where}[{bad[0]}] is {given[bad[0]]}, no {values.dtype}")
    return given.astype(values.dtype)


class WireLoss:
    """A loss with its settings: from lp [T] and a datum's tensors to a number.

    Raises:
        ServiceError: a setting is unknown, or no number in its range.
    """

    def __init__(self, name: str, config: Mapping[str, Any] | None) -> None:
        self.name = name
        known = _CONFIG[name]
        given = {key: value for key, value in (config or {}).items() if value is not None}
        if unknown := sorted(given.keys() - known.keys()):
            raise ServiceError(
                f"loss_fn_config of {name} takes {', '.join(known) or 'nothing'}, not "
                f"{', '.join(unknown)}"
            )
        for key, value in given.items():
            number = not isinstance(value, bool) and isinstance(value, int | float)
            if not number or not 0 <= value <= _LARGEST:
                raise ServiceError(
                    f"loss_fn_config: {key} is {str(value)[:80]}, must be a number from 0 to "
                    f"{_LARGEST:g}"
                )
        self._config = {**known, **{key: float(value) for key, value in given.items()}}

    def __call__(self, lp: Tensor, tensors: Mapping[str, NDArray[Any]]) -> Tensor:
        given = {
            name: torch.from_numpy(np.asarray(values, np.float32)).to(lp)
            for name, values in tensors.items()
            if name != "target_tokens"
        }
        if self.name == "cross_entropy":
            return -(lp * given["weights"]).sum()
        return self._formula(lp, given["logprobs"], given["advantages"]).sum()

    @cached_property
    def _formula(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        formulas: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "importance_sampling": lambda lp, q, a: -self._ratio(lp - q) * a,
            "reinforce": lambda lp, q, a: -self._ratio(lp - q) * a,
            "ppo": lambda lp, q, a: self._surrogate(self._ratio(lp - q), a),
            "dapo": self._dapo,
            "gspo": self._gspo,
            "cispo": lambda lp, q, a: -self._clamped(self._ratio(lp - q)).detach() * lp * a,
            "dro": lambda lp, q, a: 0.5 * self._config["beta"] * (lp - q).square() - lp * a,
        }
        return formulas[self.name]

    def _ratio(self, log_ratio: Tensor) -> Tensor:
        cap = self._config["ratio_log_cap"]
        return log_ratio.clamp(-cap, cap).exp()

    def _clamped(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(self._config["clip_low_threshold"], self._config["clip_high_threshold"])

    def _surrogate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return -torch.minimum(ratio * advantages, self._clamped(ratio) * advantages)

    def _dapo(self, lp: Tensor, q: Tensor, advantages: Tensor) -> Tensor:
        """With the dual clip, where there is one: a loss of at most c |A| for A < 0."""
        loss = self._surrogate(self._ratio(lp - q), advantages)
        dual = self._config["eps_clip_c"]
        if math.isinf(dual):
            return loss
        return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)

    def _gspo(self, lp: Tensor, q: Tensor, advantages: Tensor) -> Tensor:
        """One ratio for the sequence; each token's gradient through its own logprob."""
        counted = advantages != 0
        log_ratio = torch.where(counted, lp - q, 0.0).sum().detach() / counted.sum().clamp(min=1)
        sequence = log_ratio.clamp(max=self._config["seq_ratio_log_cap"])
        return self._surrogate((sequence + lp - lp.detach()).exp(), advantages)


def outputs(
    logprobs: Sequence[NDArray[np.float32]], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The answer of `forward` and `forward_backward`."""
    return {
        "loss_fn_output_type": "TensorData",
        "loss_fn_outputs": [
            {"logprobs": {"data": lp.tolist(), "dtype": "float32", "shape": [len(lp)]}}
            for lp in logprobs
        ],
        "metrics": dict(metrics),
    }
