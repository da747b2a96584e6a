"""`ShardedTrainer`: a `LocalTrainer` over several processes of this machine, with FSDP2.

Weights, gradients and the optimiser's state are cut into as many parts as there are processes, and
so is each batch. This process samples, scores and says what is done next; the others do the same
calls on their part of the data. What leaves the trainer (logprobs, metrics, weights, checkpoints)
is whole, and a checkpoint is the one that a single process writes and reads.

Invariant: all processes make the same passes through the model, in the same order, or they would
wait for each other for ever; whoever has less data than others makes empty ones. The others end
when this one does, however it ends, and nothing is trained on after one of them has died.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eval_protocol_rft.local import LocalSampler, Placement, no_loading_bar
from eval_protocol_rft.loop import _trainer as trainer
from eval_protocol_rft.loop._local_trainer import LocalTrainer, writing
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer, SetupError
from eval_protocol_rft.training import TrainingDatum, losses

_T = TypeVar("_T")
_FOR_EVER = timedelta(days=365)
"""Between two calls the others wait: sampling may take hours. A process that dies is seen at once,
its connections end."""
_LAST_SECONDS = 5.0
_START_SECONDS = 600
"""For the others to load their model."""


class _Shard(LocalTrainer):
    """The part that one process has."""

    def __init__(self, model: Any, **options: Any) -> None:
        shards: Any = copy.deepcopy(model)
        layers = [m for m in shards.modules() if type(m).__name__ in shards._no_split_modules]
        mesh = init_device_mesh(shards.device.type, (dist.get_world_size(),))
        for module in (*layers, shards):
            fully_shard(module, mesh=mesh)
        for module in shards.modules():
            if isinstance(module, FSDPModule):
                # Losses are sums over a batch, and so are their gradients over the processes.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        super().__init__(shards, in_place=True, **options)

    def weights(self) -> dict[str, Tensor]:
        return {name: _whole(weight) for name, weight in self._base.state_dict().items()}

    def _of_all(self, own: _T) -> list[_T]:
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, own)
        return everyones

    def _whole(self, value: Tensor) -> Tensor:
        whole: Tensor = _whole(value)
        return whole

    def _microbatches(self, datums: Sequence[TrainingDatum]) -> Iterator[list[int]]:
        everyones = list(super()._microbatches(datums))
        processes = dist.get_world_size()
        own = everyones[dist.get_rank() :: processes]
        yield from own
        for _ in range(len(own), -(-len(everyones) // processes)):
            self._empty_pass(datums[0])

    def _empty_pass(self, datum: TrainingDatum) -> None:
        [logprobs] = losses.token_logprobs(self._module, [datum]).logprobs
        if torch.is_grad_enabled():
            torch.autograd.backward(logprobs.sum() * 0.0)
            self._gathered = True

    def _saved(self) -> dict[str, Any]:
        state: dict[str, Any] = _mapped(super()._saved(), lambda value: _whole(value).cpu())
        return state

    def _write(self, state: dict[str, Any], path: Path) -> None:
        if dist.get_rank() == 0:
            super()._write(state, path)

    def _restore(self, saved: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        masters = self._masters.weights
        names = list(masters)
        groups = [n for n in names if masters[n].ndim >= 2] + [
            n for n in names if masters[n].ndim < 2
        ]
        for number, name in enumerate(groups):
            state = optimizer["state"].get(number, {})
            for key, value in state.items():
                if value.shape == masters[name].shape:
                    state[key] = _cut(value, masters[name])
        super()._restore({n: _cut(saved[n], masters[n]) for n in names}, optimizer)


class ShardedTrainer(_Shard):
    """AdamW on all parameters of a causal language model, in `processes` processes.

    Args:
        model: in float32, as the sampler of this process has it; the others load it themselves.
        source: the folder that it was loaded from.
        placement: of the others' model.
        processes: this one included.
        trust_remote_code: let the model's folder run its own code.
        sink, temperature, optimizer, entropies: as for `LocalTrainer`.

    Raises:
        TrainerError: the model is not in float32; a process did not come up.
    """

    def __init__(
        self,
        model: Any,
        *,
        source: str,
        placement: Placement,
        processes: int,
        sink: trainer.WeightSink,
        trust_remote_code: bool = False,
        temperature: float = 1.0,
        optimizer: Optimizer | None = None,
        entropies: bool = True,
    ) -> None:
        if model.dtype != torch.float32:
            raise trainer.TrainerError(
                f"the model is in {model.dtype}, and several processes train in float32: pass "
                'Placement(dtype="float32") (--dtype float32)'
            )
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, processes, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=_START_SECONDS),
        )  # fmt: skip
        options = {"temperature": temperature, "optimizer": optimizer, "entropies": entropies}
        self._others = []
        try:
            for rank in range(1, processes):
                task = (store.port, rank, processes, source, placement, trust_remote_code, options)
                # A session of its own: Ctrl-C is for this process, which ends the others.
                other = subprocess.Popen(  # noqa: S603 - our own code
                    [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
                    stdin=subprocess.PIPE,
                    start_new_session=True,
                )
                self._others.append(other)
                assert other.stdin is not None  # noqa: S101 - narrows the type
                with other.stdin as stdin:
                    stdin.write(pickle.dumps(task))
            _join(store, 0, processes)
            super().__init__(model, sink=sink, **options)
        except (RuntimeError, OSError) as error:
            self._end()
            raise trainer.TrainerError(f"a process of training did not come up: {error}") from error

    async def _run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await super()._run(self._together, work, arguments)

    def _together(self, work: Callable[..., _T], arguments: tuple[Any, ...]) -> _T:
        try:
            dist.broadcast_object_list([work.__name__, arguments], src=0)
            return work(*arguments)
        except trainer.TrainerError:
            raise
        except RuntimeError as error:
            dead = list(filter(_has_ended, self._others))
            if not dead:
                raise
            raise trainer.TrainerError(
                f"{len(dead)} of {len(self._others) + 1} processes that train together died: was "
                "there too little memory? The same command goes on from the newest checkpoint"
            ) from error

    async def export(self, folder: Path) -> None:
        weights = await self._run(self.weights)
        with no_loading_bar(), writing(folder):
            self._base.save_pretrained(folder, state_dict=weights)

    async def aclose(self) -> None:
        await super().aclose()
        self._end()

    def _end(self) -> None:
        """End the other processes. Idempotent."""
        for other in self._others:
            other.kill()
            other.wait()
        if dist.is_initialized():
            dist.destroy_process_group()


def make_trainer(
    model: Any,
    *,
    source: str,
    processes: int,
    placement: Placement,
    trust_remote_code: bool,
    lora: LoraSettings | None,
    keep_reference: bool,
    in_place: bool,
    **common: Any,
) -> LocalTrainer:
    """One for this process, or for several; `source`: the folder that the others load.

    Raises:
        SetupError: there are adapters or a reference, which are for one process.
        TrainerError: as of the trainers.
    """
    if processes == 1:
        return LocalTrainer(
            model, lora=lora, keep_reference=keep_reference, in_place=in_place, **common
        )
    if lora is not None or keep_reference:
        raise SetupError(
            "several processes train all parameters, without adapters and without a reference "
            "model: leave out --lora-rank and --kl-beta, or --processes"
        )
    return ShardedTrainer(
        model,
        source=source,
        placement=placement,
        processes=processes,
        trust_remote_code=trust_remote_code,
        **common,
    )


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    # Its connections end a moment before it does.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_SECONDS)
    return process.returncode is not None


def _join(store: Any, rank: int, processes: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=processes, timeout=_FOR_EVER
    )


def _serve() -> None:
    """What the other processes do: as they are told, until the first one is gone."""
    port, rank, processes, source, placement, trusted, options = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own process
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, timeout=timedelta(seconds=_START_SECONDS)
    )
    if torch.cuda.is_available() and placement.device != "cpu":
        torch.cuda.set_device(rank)
        placement = replace(placement, device=f"cuda:{rank}")
    loaded = LocalSampler.from_pretrained(source, placement=placement, trust_remote_code=trusted)
    _join(store, rank, processes)
    shard = _Shard(loaded.model, sink=None, **options)
    torch.set_num_threads(1)
    while True:
        call: list[Any] = [None, None]
        try:
            dist.broadcast_object_list(call, src=0)
        except RuntimeError:
            return  # the first one is gone
        name, arguments = call
        try:
            getattr(shard, name)(*arguments)
        except trainer.DamagedCheckpointError:
            continue  # all read the same file, and may try an earlier one
        except (trainer.TrainerError, losses.LossError):
            return  # the first one says it too, or else must not wait for us


def _read_only(values: dict[Any, Any]) -> Any:
    return MappingProxyType(values)


# What datums hold besides tokens travels between processes, and Python pickles no such mapping.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _cut(value: Tensor, like: Any) -> Tensor:
    """This process' part of it."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor in dicts and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
