"""`Trainer`: what the loop asks of whoever holds the weights; and what takes new weights from it.

Invariant: gradients add up over `forward_backward` calls until `optim_step` uses and clears them,
and nothing divides them: normalisation is in the datums' weights. Weights that are sampled from
change in `publish` and nowhere else. When `publish` returns, every new request is answered by the
new weights; when it raises, the caller knows that the sampler may still have the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.training import ConfigValue, FloatArray, TrainingDatum

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.training.losses import Correction


class TrainerError(EvalProtocolRftError, RuntimeError):
    """A trainer that cannot do what was asked; the message says what to do next."""


class DamagedCheckpointError(TrainerError):
    """What was saved cannot be read back; an older checkpoint may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLoss:
    """A loss by its name on the wire, with what may be added to it."""

    loss_fn: str
    """A key of `training.losses.POLICY_LOSSES`."""
    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    """Its thresholds, absolute."""
    kl_beta: float = 0.0
    """Weight of the k3 penalty to the reference policy; needs `reference_logprobs`."""
    correction: Correction | None = None
    """For the distance between sampler and trainer; needs `old_logprobs`."""


LossFunction: TypeAlias = "Callable[[Sequence[TrainingDatum], Sequence[Tensor]], LossValue]"
"""A loss of one's own: datums and [T_i] logprobs of their targets, with gradient, to a scalar and
metrics (`name:reduction`). It must be a sum over datums: it may see them a few at a time."""
LossValue: TypeAlias = "tuple[Tensor, dict[str, float]]"


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """What one pass over datums told."""

    logprobs: list[FloatArray]
    """[T_i] per datum, nats, of the targets, before the update; 0.0 where nothing was sampled."""
    metrics: dict[str, float]
    """`name:reduction`, see `training.losses.Objective`."""


@runtime_checkable
class Trainer(Protocol):
    """One policy in training. Calls come one after the other."""

    async def forward(
        self,
        datums: Sequence[TrainingDatum],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> list[FloatArray]:
        """[T_i] logprobs (nats) of the targets under the current weights, without gradient.

        Args:
            datums: any number.
            reference: under the frozen weights that training began from.
            temperature: other than the trainer's own.
        """
        ...

    async def forward_backward(
        self,
        datums: Sequence[TrainingDatum],
        loss: NamedLoss | LossFunction,
        *,
        old_logprobs: Sequence[FloatArray] | None = None,
        reference_logprobs: Sequence[FloatArray] | None = None,
    ) -> ForwardBackward:
        """Add the gradient of `loss` over `datums` to what has gathered.

        Args:
            datums: one batch; with the advantages and weights that `build_batch` gave them.
            loss: what to differentiate.
            old_logprobs: ratios are taken against these, [T_i] per datum; default: against the
                sampler's own.
            reference_logprobs: [T_i] per datum, for `kl_beta`.

        Raises:
            LossError: the loss lacks something or is not finite.
            TrainerError: this trainer cannot compute it.
        """
        ...

    async def optim_step(self, *, learning_rate: float) -> dict[str, float]:
        """One step of the optimiser on the gathered gradient. Returns metrics (`grad_norm`)."""
        ...

    async def publish(self, version: int) -> None:
        """Make the sampler draw from the current weights, and call them `version`. When this
        returns, every new request is answered by them."""
        ...

    async def save(self, folder: Path) -> None:
        """Write weights and optimiser state into `folder`, an empty one."""
        ...

    async def load(self, folder: Path) -> None:
        """Go back to what `save` wrote, exactly.

        Raises:
            DamagedCheckpointError: it is incomplete or damaged.
            TrainerError: it is of another model, or the trainer cannot do it now.
        """
        ...

    async def aclose(self) -> None:
        """Release what the trainer holds. Idempotent."""
        ...


class WeightSink(Protocol):
    """Takes the weights that sampling is to go on with."""

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        """Hand over `weights`, which are those of `model` by its own names, as `version`.

        Args:
            model: what they belong to.
            weights: all of them.
            version: their name, a number.
            unchanged: names of those that are as this sink had them before.

        Raises:
            TrainerError: they did not arrive.
        """
        ...


def version_name(version: int) -> str:
    """How completions name the weights of a version."""
    return f"step-{version}"


def named_version(name: str | None) -> int | None:
    """The version that `version_name` named; None where others did, or nobody."""
    number = (name or "").removeprefix("step-")
    return int(number) if number != name and number.isdecimal() else None


class SamplerWeights:
    """Copies weights into a `LocalSampler` in place."""

    def __init__(self, sampler: LocalSampler) -> None:
        self._sampler = sampler

    async def publish(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        version: int,
        *,
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        changed = {name: value for name, value in weights.items() if name not in unchanged}
        await self._sampler.load_weights(
            changed, policy_version=version_name(version), keep=unchanged
        )
