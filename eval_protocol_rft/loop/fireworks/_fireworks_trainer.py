"""`FireworksTrainer`: the Fireworks training API as a `Trainer`.

Invariant: what the server adds up is the loss that the datums describe, nothing less and nothing
more: the server never divides (`grad_accumulation_normalization=None`), thresholds and all of
AdamW's settings are always sent, and positions that were not sampled have no part in a loss.
Logprobs meet datums by position only after their numbers and lengths were compared. A folder that
names a saved state is read back as it was written, or not at all.

Which loss the server computes by itself, and how any other is computed on this side.

Invariant: the server is given a loss by name only where its documented formula on the tensors that
it gets is ours, to the last weight. Everything else is differentiated here, with respect to the
logprobs, and reaches the server as weights of a cross entropy, which is exact for any loss.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from eval_protocol_rft import training
from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.loop._trainer import ForwardBackward, LossFunction, NamedLoss, TrainerError
from eval_protocol_rft.loop.fireworks._hot_load import HotLoad, SnapshotChain
from eval_protocol_rft.training import FloatArray, TrainingDatum

if TYPE_CHECKING:
    from torch import Tensor

    from eval_protocol_rft.loop._run_options import Optimizer
    from eval_protocol_rft.training.losses import Objective


def check_temperature(temperature: float) -> None:
    """Raise a TrainerError unless `temperature`, the sampler's, is 1."""
    if temperature != 1.0:
        raise TrainerError(
            f"completions are sampled at temperature {temperature}, and Fireworks' trainer "
            "computes logprobs at 1 only, so its ratios to the sampler's would be wrong: sample at "
            "temperature 1, or train where the model is local"
        )


def read_logprobs(result: Any, datums: Sequence[TrainingDatum]) -> list[FloatArray]:
    """[T_i] per datum from an answer of the training server, 0.0 where nothing was sampled.

    Raises:
        TrainerError: not one finite value per sampled target.
    """
    outputs = result.loss_fn_outputs
    if len(outputs) != len(datums):
        raise TrainerError(f"the server answered {len(outputs)} datums of {len(datums)}")
    logprobs: list[FloatArray] = []
    for i, (output, datum) in enumerate(zip(outputs, datums, strict=True)):
        values = output["logprobs"].to_numpy().reshape(-1)
        if len(values) != len(datum):
            raise TrainerError(
                f"datum {i}: the server answered {len(values)} logprobs for {len(datum)} targets"
            )
        kept = np.where(datum.mask, values, np.float32(0.0)).astype(np.float32)
        if not np.isfinite(kept).all():
            place = int(np.flatnonzero(~np.isfinite(kept))[0])
            raise TrainerError(f"datum {i}, target {place}: the server's logprob is {kept[place]}")
        logprobs.append(kept)
    return logprobs


def check_shapes(
    name: str, values: Sequence[FloatArray] | None, datums: Sequence[TrainingDatum]
) -> None:
    """Raise a TrainerError unless `values` is None or one [T_i] array per datum."""
    if values is None:
        return
    shapes = [np.shape(value) for value in values]
    wanted = [(len(datum),) for datum in datums]
    if shapes != wanted:
        raise TrainerError(f"{name} has shapes {shapes}, the datums have targets {wanted}")


BUILT_IN = {
    "ppo": "ppo",
    "grpo": "ppo",
    "importance_sampling": "importance_sampling",
    "cispo": "cispo",
}
"""Name of ours -> name on the wire. Not here although the server has the name: dro acts on the
prompt too; over which tokens gspo takes its mean, what reinforce multiplies, and what dapo adds to
ppo is not documented."""

SERVER_LOSS = "loss:sum"
_LOCAL = "eval-protocol-rft[local]"

SdkLoss = Callable[[Sequence[Any], Sequence["Tensor"]], "tuple[Tensor, dict[str, float]]"]


def built_in_name(loss: NamedLoss | LossFunction) -> str | None:
    """The server's name for exactly this loss, or None."""
    if not isinstance(loss, NamedLoss) or loss.kl_beta or loss.correction is not None:
        return None
    return BUILT_IN.get(loss.loss_fn)


def built_in_data(
    datums: Sequence[TrainingDatum],
    loss_fn: str,
    *,
    old_logprobs: Sequence[FloatArray] | None,
    types: Any,
) -> list[Any]:
    """SDK datums for a loss that the server computes. Ratios are taken against `old_logprobs`,
    which must be one [T_i] array per datum; None: against the sampler's own."""
    data = []
    for i, datum in enumerate(datums):
        inputs = training.loss_fn_inputs(datum, loss_fn)
        if old_logprobs is not None:
            # The server takes exp(current - this) at every position, the prompt's too.
            old = np.where(datum.mask, old_logprobs[i], np.float32(0.0))
            inputs = {**inputs, "logprobs": old.astype(np.float32)}
        data.append(training.build_datum(datum, inputs, types))
    return data


def objective_of(loss: NamedLoss) -> Objective:
    """The loss in torch; checks its name, thresholds and options.

    Raises:
        LossError: unknown name, unknown or missing option, or a value out of range.
        MissingPackageError: torch is not installed.
    """
    losses = training.require("eval_protocol_rft.training.losses", install=_LOCAL)
    objective: Objective = losses.make_loss(
        loss.loss_fn, loss.config, correction=loss.correction, kl_beta=loss.kl_beta
    )
    return objective


def metrics_of(
    objective: Objective,
    datums: Sequence[TrainingDatum],
    logprobs: Sequence[FloatArray],
    server: Mapping[str, float],
    *,
    old_logprobs: Sequence[FloatArray] | None,
) -> dict[str, float]:
    """The server's metrics and ours, made of its [T_i] logprobs per datum; and how far its loss is
    from ours, where it tells."""
    torch = training.require("torch", install=_LOCAL)
    tensors = [torch.from_numpy(values) for values in logprobs]
    loss, metrics = objective(datums, tensors, old_logprobs=old_logprobs)
    if SERVER_LOSS in server:
        metrics = {**metrics, "server_loss_difference:max": abs(server[SERVER_LOSS] - float(loss))}
    return {**server, **metrics}


def custom_loss(
    loss: NamedLoss | LossFunction,
    datums: Sequence[TrainingDatum],
    *,
    old_logprobs: Sequence[FloatArray] | None,
    reference_logprobs: Sequence[FloatArray] | None,
) -> SdkLoss:
    """`loss` as `forward_backward_custom` calls it, for `datums` in the order of its data."""
    if isinstance(loss, NamedLoss):
        return objective_of(loss).for_sdk(
            datums, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs
        )
    losses = training.require("eval_protocol_rft.training.losses", install=_LOCAL)
    torch = training.require("torch", install=_LOCAL)
    closure = loss

    def loss_fn(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        losses.check_same_targets(datums, data)
        # As every trainer gives them: 0 where nothing was sampled, and no gradient through it.
        masked = [
            torch.where(torch.from_numpy(datum.mask), values, 0.0)
            for datum, values in zip(datums, logprobs, strict=True)
        ]
        return closure(datums, masked)

    return loss_fn


STATE_FILE = "fireworks.json"


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """Weights and optimiser state on the server."""

    path: str
    """As the server named it."""
    trainer_job: str | None
    """Id of the job that saved it, where known: another job finds it by that."""

    def write(self, folder: Path) -> None:
        write_whole(folder / STATE_FILE, msgspec.json.encode(self) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> SavedState:
        """What `write` wrote.

        Raises:
            TrainerError: it is not there, or something else is.
        """
        try:
            return msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise TrainerError(
                f"{folder} holds no state of a Fireworks trainer: {error}"
            ) from error


_RECONNECT = (
    "What gradient the server holds is in doubt: connect anew, load the last saved state and "
    "repeat the step"
)


class FireworksTrainer:
    """A policy in training on Fireworks, or behind any server with its training API.

    Args:
        client: the SDK's `FiretitanTrainingClient`, used by nobody else meanwhile.
        temperature: the one that completions are sampled with. Only 1 is taken: the server's
            logprobs know no temperature, so ratios to others would be between two policies.
        optimizer: of every `optim_step`.
        hot_load: the deployment that `publish` loads; None: this trainer cannot publish.
        lora: the client trains adapters.
        make_reference: makes a client of the frozen base model, called once when it is needed.
        trainer_job: id of the job behind the client, for states that another job shall load.
        close: called by `aclose`, in a thread.

    Raises:
        TrainerError: another temperature than 1.
    """

    def __init__(
        self,
        client: Any,
        *,
        temperature: float,
        optimizer: Optimizer,
        hot_load: HotLoad | None = None,
        lora: bool = False,
        make_reference: Callable[[], Any] | None = None,
        trainer_job: str | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        check_temperature(temperature)
        self.hot_load = hot_load
        self._client = client
        self._optimizer = optimizer
        self._make_reference = make_reference
        self._reference: Any = None
        self._trainer_job = trainer_job
        self._close = close
        self._chain = SnapshotChain(lora=lora)
        self._published: dict[int, int] = {}
        self._types = training.require(
            "fireworks.training.sdk.types", install="eval-protocol-rft[fireworks]"
        )
        sdk = training.require("fireworks.training.sdk", install="eval-protocol-rft[fireworks]")
        self._sdk_error: type[Exception] = sdk.TrainingError

    async def forward(
        self,
        datums: Sequence[TrainingDatum],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> list[FloatArray]:
        if temperature is not None:
            check_temperature(temperature)
        client = await self._reference_client() if reference else self._client
        # The routing on record is that of the policy's weights: a reference routes by itself.
        routed = (
            [msgspec.structs.replace(d, routing_matrices=None) for d in datums]
            if reference
            else datums
        )
        data = self._cross_entropy_data(routed)
        result = await self._done("forward", lambda: client.forward(data, "cross_entropy"))
        return read_logprobs(result, datums)

    async def forward_backward(
        self,
        datums: Sequence[TrainingDatum],
        loss: NamedLoss | LossFunction,
        *,
        old_logprobs: Sequence[FloatArray] | None = None,
        reference_logprobs: Sequence[FloatArray] | None = None,
    ) -> ForwardBackward:
        """See `Trainer`. `BUILT_IN` says which losses the server computes by itself; the others
        cost a forward pass more. For those of the server, metrics are computed here from its
        logprobs, and `server_loss_difference:max` tells how far its loss is from ours."""
        for name, values in (("old", old_logprobs), ("reference", reference_logprobs)):
            check_shapes(f"{name}_logprobs", values, datums)
        built_in = built_in_name(loss)
        if built_in is None or not isinstance(loss, NamedLoss):
            data = self._cross_entropy_data(datums)
            loss_fn = custom_loss(
                loss, datums, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs
            )
            result = await self._done(
                "forward_backward_custom",
                lambda: self._client.forward_backward_custom(data, loss_fn),
            )
            return ForwardBackward(read_logprobs(result, datums), dict(result.metrics))
        objective = objective_of(loss)
        data = built_in_data(datums, built_in, old_logprobs=old_logprobs, types=self._types)
        config = dict(loss.config) or None
        result = await self._done(
            "forward_backward", lambda: self._client.forward_backward(data, built_in, config)
        )
        logprobs = read_logprobs(result, datums)
        metrics = metrics_of(objective, datums, logprobs, result.metrics, old_logprobs=old_logprobs)
        return ForwardBackward(logprobs, metrics)

    async def optim_step(self, *, learning_rate: float) -> dict[str, float]:
        adam = self._optimizer
        params = self._types.AdamParams(
            learning_rate=learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            grad_clip_norm=adam.max_grad_norm or 0.0,
        )
        result = await self._done(
            "optim_step",
            lambda: self._client.optim_step(params, grad_accumulation_normalization=None),
        )
        return {**(result.metrics or {}), "learning_rate": learning_rate}

    async def publish(self, version: int) -> None:
        if self.hot_load is None:
            raise TrainerError("this trainer has no deployment to publish to: pass hot_load=")
        kind = self._chain.next_type()
        metadata = self._chain.metadata(kind)
        # Whatever happens from here on, the deployment holds what we know only at the end.
        self._chain.loaded = None
        count = self._published[version] = self._published.get(version, -1) + 1
        name = f"version-{version}" + (f"-again-{count}" if count else "")
        try:
            saved = await asyncio.to_thread(
                self._client.save_weights_for_sampler_ext, name, checkpoint_type=kind
            )
        except self._sdk_error as error:
            raise TrainerError(f"save_weights_for_sampler {name!r}: {error}") from error
        # The SDK put a suffix of the session to the name; this is what the deployment knows.
        await self.hot_load.load(saved.snapshot_name, metadata)
        self._chain.loaded = saved.snapshot_name

    async def save(self, folder: Path) -> None:
        """Save weights and optimiser state on the server; `folder` gets a file that names them."""
        name = f"state-{secrets.token_hex(8)}"
        result = await self._done("save_state", lambda: self._client.save_state(name))
        state = SavedState(path=result.path, trainer_job=self._trainer_job)
        await asyncio.to_thread(state.write, folder)

    async def load(self, folder: Path) -> None:
        """Load what `save` saved. Gradient that was gathered and not used stays on the server."""
        state = await asyncio.to_thread(SavedState.read, folder)
        path = state.path
        if None not in (state.trainer_job, self._trainer_job) and (
            state.trainer_job != self._trainer_job
        ):
            path = self._client.resolve_checkpoint_path(path, source_job_id=state.trainer_job)
        await self._done(
            f"load_state {path!r}", lambda: self._client.load_state_with_optimizer(path)
        )
        # What is saved next is no delta of what was published last.
        self._chain.loaded = None

    async def aclose(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            await asyncio.to_thread(close)

    def _cross_entropy_data(self, datums: Sequence[TrainingDatum]) -> list[Any]:
        if not datums:
            raise TrainerError("no datums: there is nothing to run the model on")
        return [
            training.build_datum(d, training.loss_fn_inputs(d, "cross_entropy"), self._types)
            for d in datums
        ]

    async def _reference_client(self) -> Any:
        if self._reference is None:
            if self._make_reference is None:
                raise TrainerError("this trainer has no reference model: pass make_reference=")
            self._reference = await asyncio.to_thread(self._make_reference)
        return self._reference

    async def _done(self, what: str, start: Callable[[], Any]) -> Any:
        """Start a call of the SDK, which packs its data, in a thread, and wait for its future."""
        try:
            return await (await asyncio.to_thread(start))
        except self._sdk_error as error:
            raise TrainerError(f"{what} failed: {error}. {_RECONNECT}") from error
