"""What each call of the training wire does to a model in training.

Invariant: a call is checked before it changes anything; what is wrong with it is a `ServiceError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service.training import _wire_losses as wire
from eval_protocol_rft.loop.service.training._checkpoints import Checkpoints, Made, Owner
from eval_protocol_rft.loop.service.training._model_in_training import AdamParams, ModelInTraining

_T = TypeVar("_T")


class _Forward(msgspec.Struct, frozen=True):
    forward_input: wire.LossInput


class _ForwardBackward(msgspec.Struct, frozen=True):
    forward_backward_input: wire.LossInput


class _OptimStep(msgspec.Struct, frozen=True):
    adam_params: AdamParams
    grad_accumulation_normalization: Literal["num_loss_tokens", "num_sequences", "none"] | None = (
        None
    )


_Path = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_NewName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern="^[^/:]*$")]
"""Others could be neither loaded nor promoted: `/` and `:` end a name in a path."""


class _Save(msgspec.Struct, frozen=True):
    path: _NewName
    checkpoint_type: Literal["base", "delta", "merged_base"] = "base"


class _Load(msgspec.Struct, frozen=True):
    path: _Path
    optimizer: bool = False


class Done(NamedTuple):
    """What came of a call."""

    answer: dict[str, Any]
    made: Made = ()
    """Rows to be put on record with the answer."""
    shown: str | None = None
    """A line for whoever watches."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call is carried out."""

    trained: ModelInTraining
    owner: Owner
    checkpoints: Checkpoints
    vocabulary: int
    """Tokens that the model has an embedding of."""
    context: int
    """Most tokens of a datum."""

    def forward(self, body: bytes) -> Done:
        given = decode(body, _Forward).forward_input
        examples = wire.read_targets(given, vocabulary=self.vocabulary, context=self.context)
        return Done(wire.outputs(self.trained.logprobs(examples), {}))

    def forward_backward(self, body: bytes) -> Done:
        given = decode(body, _ForwardBackward).forward_backward_input
        examples = wire.read_examples(given, vocabulary=self.vocabulary, context=self.context)
        loss = wire.WireLoss(given.loss_fn, given.loss_fn_config)
        logprobs, total = self.trained.forward_backward(examples, loss)
        return Done(wire.outputs(logprobs, {"loss:sum": total}))

    def optim_step(self, body: bytes) -> Done:
        given = decode(body, _OptimStep)
        divisor = given.grad_accumulation_normalization
        loss = self.trained.gathered_loss
        metrics = self.trained.optim_step(given.adam_params, None if divisor == "none" else divisor)
        shown = (
            f"step {self.trained.steps}: loss {loss:.4g}, gradient {metrics['grad_norm']:.3g}, "
            f"learning rate {metrics['learning_rate']:.3g}"
        )
        return Done({"metrics": metrics}, shown=shown)

    def save_weights_for_sampler(self, body: bytes) -> Done:
        save = decode(body, _Save)
        made = self.checkpoints.save_snapshot(
            self.owner, self.trained, save.path, save.checkpoint_type
        )
        answer = {"path": save.path, "type": "save_weights_for_sampler"}
        return Done(answer, made, f"saved {save.path} to sample from ({save.checkpoint_type})")

    def save_weights(self, body: bytes) -> Done:
        path = decode(body, _Save).path
        made = self.checkpoints.save_state(self.owner, self.trained, path)
        return Done({"path": path, "type": "save_weights"}, made, f"saved {path} to train on")

    def load_weights(self, body: bytes) -> Done:
        load = decode(body, _Load)
        self.checkpoints.load_state(self.owner, self.trained, load.path, optimizer=load.optimizer)
        return Done(
            {"path": load.path, "type": "load_weights"},
            shown=f"goes on from {load.path}, step {self.trained.steps}",
        )


CALLS: dict[str, Callable[[Place, bytes], Done]] = {
    "forward": Place.forward,
    "forward_backward": Place.forward_backward,
    "optim_step": Place.optim_step,
    "save_weights_for_sampler": Place.save_weights_for_sampler,
    "save_weights": Place.save_weights,
    "load_weights": Place.load_weights,
}
"""By their names on the wire."""
REPLAYED = frozenset({"forward_backward", "optim_step"})
"""A model that is rebuilt goes through these again. The rest only look at it, but for
`load_weights`: what that read may be another file by then, so that its state is saved at once."""
ENDING = frozenset({"optim_step", "load_weights"})
"""After these it has no gradient, so that its state can be saved."""


def decode(body: bytes, kind: type[_T]) -> _T:
    """The request's body.

    Raises:
        ServiceError: it is not JSON of that kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"the request cannot be read: {error}") from error
