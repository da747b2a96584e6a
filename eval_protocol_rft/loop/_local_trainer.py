"""`LocalTrainer`: a torch model in this process as a `Trainer`, with or without LoRA adapters.

Invariant: what is trained is a copy of its own; the sampler's weights change in `publish` alone.
The same calls on the same state give the same bits on one torch thread, and `load` goes back to
all of the state that `save` wrote. A model in bfloat16 runs in it, forward and backward, as it does
where it is sampled; what is learnt gathers in float32.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from eval_protocol_rft.local import no_loading_bar, spare_threads, with_float32_head
from eval_protocol_rft.loop import _trainer as trainer
from eval_protocol_rft.loop._lora import add_lora, merged_names, merged_weights
from eval_protocol_rft.loop._metrics import reduce_metrics
from eval_protocol_rft.loop._optimizer import Masters, adamw, recompute_layers
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.loop._trainer import ForwardBackward, LossFunction, NamedLoss, TrainerError
from eval_protocol_rft.training import FloatArray, TrainingDatum, losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")

_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError)
"""What torch raises of files that are cut off, empty or of something else."""


class LocalTrainer:
    """AdamW on all parameters of a causal language model, or on LoRA adapters (peft).

    Args:
        model: what to train, where it lies and in its dtype, float32 or bfloat16. It runs in
            evaluation mode: with dropout its logprobs would be those of another policy than the
            one that sampled.
        sink: where `publish` sends weights.
        temperature: the one that completions were sampled with.
        lora: train adapters instead of all parameters.
        optimizer: AdamW's settings, and what a pass may take.
        keep_reference: hold a frozen copy of `model`, for a penalty on the distance to it. With
            LoRA it costs nothing and is always there.
        entropies: measure the policy's entropy with every pass.
        in_place: train `model` itself, which nobody samples from, and not a copy.

    Raises:
        TrainerError: the model is in float16, whose range gradients leave; a package is missing;
            gradient checkpointing is not known of this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sink: trainer.WeightSink,
        temperature: float = 1.0,
        lora: LoraSettings | None = None,
        optimizer: Optimizer | None = None,
        keep_reference: bool = False,
        entropies: bool = True,
        in_place: bool = False,
    ) -> None:
        adam = optimizer or Optimizer()
        self.temperature = temperature
        self._sink = sink
        self._reference = _frozen(model) if keep_reference and lora is None else None
        self._base = _frozen(model, copied=not in_place).requires_grad_(lora is None)
        self._module: torch.nn.Module = self._base if lora is None else add_lora(self._base, lora)
        self._lora = lora
        self._masters = Masters(self._module)
        self._optimizer = adamw(self._masters.weights.values(), adam)
        if adam.gradient_checkpointing:
            recompute_layers(self._base)
        self._max_grad_norm = adam.max_grad_norm or float("inf")
        self._microbatch_tokens = adam.microbatch_tokens
        self._entropies = entropies
        self._share_prompts = losses.can_share_prompts(self._base)
        self._gathered = False
        self._has_published = False
        # A thread of its own, so that the event loop goes on; and always the same one, as torch's
        # number of threads belongs to a thread.
        self._thread = ThreadPoolExecutor(
            1, "local-trainer", initializer=spare_threads, initargs=(self._base,)
        )

    async def forward(
        self,
        datums: Sequence[TrainingDatum],
        *,
        reference: bool = False,
        temperature: float | None = None,
    ) -> list[FloatArray]:
        chosen = self.temperature if temperature is None else temperature
        return await self._run(self._forward, datums, reference, chosen)

    async def forward_backward(
        self,
        datums: Sequence[TrainingDatum],
        loss: NamedLoss | LossFunction,
        *,
        old_logprobs: Sequence[FloatArray] | None = None,
        reference_logprobs: Sequence[FloatArray] | None = None,
    ) -> ForwardBackward:
        return await self._run(
            self._forward_backward, datums, loss, old_logprobs, reference_logprobs
        )

    async def optim_step(self, *, learning_rate: float) -> dict[str, float]:
        return await self._run(self._optim_step, learning_rate)

    async def publish(self, version: int) -> None:
        weights = await self._run(self.weights)
        if self._lora is not None and self._has_published:
            unchanged = frozenset(weights) - merged_names(self._module)
            await self._sink.publish(self._base, weights, version, unchanged=unchanged)
        else:
            await self._sink.publish(self._base, weights, version)
        self._has_published = True

    def weights(self) -> dict[str, Tensor]:
        """The model's weights by its own names, adapters merged in; the rest are no copies."""
        return self._base.state_dict() if self._lora is None else merged_weights(self._module)

    async def save(self, folder: Path) -> None:
        await self._run(self._save, folder)

    async def load(self, folder: Path) -> None:
        await self._run(self._load, folder)

    async def export(self, folder: Path) -> None:
        """Write the model as transformers reads it, adapters merged in; `local/<folder>` samples
        from it once a tokenizer lies beside."""

        def write() -> None:
            with no_loading_bar(), writing(folder):
                self._base.save_pretrained(folder, state_dict=self.weights())

        await self._run(write)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    @torch.no_grad()
    def _forward(
        self, datums: Sequence[TrainingDatum], reference: bool, temperature: float
    ) -> list[FloatArray]:
        if reference and self._lora is not None:
            with self._module.disable_adapter():  # type: ignore[operator]
                return self._logprobs(self._module, datums, temperature)
        if reference and self._reference is None:
            raise TrainerError("this trainer keeps no reference: pass keep_reference=True")
        module = self._reference if reference and self._reference is not None else self._module
        return self._logprobs(module, datums, temperature)

    def _logprobs(
        self, module: torch.nn.Module, datums: Sequence[TrainingDatum], temperature: float
    ) -> list[FloatArray]:
        by_datum: dict[int, FloatArray] = {}
        for places in self._microbatches(datums):
            part = losses.token_logprobs(
                module,
                [datums[i] for i in places],
                temperature=temperature,
                share_prompts=self._share_prompts,
            )
            for i, values in zip(places, part.logprobs, strict=True):
                by_datum[i] = values.cpu().numpy()
        return self._in_order(by_datum)

    def _in_order(self, by_datum: dict[int, FloatArray]) -> list[FloatArray]:
        everyones = {i: values for part in self._of_all(by_datum) for i, values in part.items()}
        return [everyones[i] for i in range(len(everyones))]

    def _of_all(self, own: _T) -> list[_T]:
        """What each process that trains this model has: here it is one."""
        return [own]

    def _whole(self, value: Tensor) -> Tensor:
        """A tensor of which this process may have a part."""
        return value

    def _forward_backward(
        self,
        datums: Sequence[TrainingDatum],
        loss: NamedLoss | LossFunction,
        old: Sequence[FloatArray] | None,
        reference: Sequence[FloatArray] | None,
    ) -> ForwardBackward:
        objective = _objective(loss)
        by_datum: dict[int, FloatArray] = {}
        parts: list[dict[str, float]] = []
        slopes: list[Tensor] | None = None
        if isinstance(objective, losses.Objective) and objective.whole_batch:
            slopes, of_all = self._slopes(datums, objective, old, reference)
            parts.append(of_all)
        for places in self._microbatches(datums):
            chosen = [datums[i] for i in places]
            values = losses.token_logprobs(
                self._module,
                chosen,
                temperature=self.temperature,
                entropies=self._entropies,
                share_prompts=self._share_prompts,
            )
            if slopes is not None:
                pairs = zip(values.logprobs, places, strict=True)
                total = torch.stack([(lp * slopes[i].to(lp)).sum() for lp, i in pairs]).sum()
                metrics = None
            elif isinstance(loss, NamedLoss):
                total, metrics = objective(
                    chosen,
                    values.logprobs,
                    old_logprobs=old and [old[i] for i in places],
                    reference_logprobs=None
                    if reference is None
                    else [reference[i] for i in places],
                    entropies=values.entropies,
                )
            else:
                total, metrics = objective(chosen, values.logprobs)
            torch.autograd.backward(total)
            self._gathered = True
            if metrics is not None:
                parts.append(metrics)
            for i, logprobs in zip(places, values.logprobs, strict=True):
                by_datum[i] = logprobs.detach().cpu().numpy()
        parts = [part for own in self._of_all(parts) for part in own]
        return ForwardBackward(self._in_order(by_datum), reduce_metrics(parts))

    def _slopes(
        self,
        datums: Sequence[TrainingDatum],
        objective: losses.Objective,
        old: Sequence[FloatArray] | None,
        reference: Sequence[FloatArray] | None,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """[T_i] per datum, the derivative of a loss of the whole batch by each logprob, and its
        metrics: the sum of logprobs times these has the gradient of the loss, in any parts."""
        with torch.no_grad():
            values = self._logprobs(self._module, datums, self.temperature)
        logprobs = [torch.from_numpy(value).requires_grad_() for value in values]
        total, metrics = objective(datums, logprobs, old_logprobs=old, reference_logprobs=reference)
        return list(torch.autograd.grad(total, logprobs)), metrics

    def _optim_step(self, learning_rate: float) -> dict[str, float]:
        if not self._gathered:
            raise TrainerError("optim_step without a forward_backward: there is no gradient")
        weights = list(self._masters.weights.values())
        norm = self._whole(torch.nn.utils.clip_grad_norm_(weights, self._max_grad_norm))
        if not torch.isfinite(norm):
            raise TrainerError(
                f"the gradient's norm is {norm.item()}: lower the learning rate, or look at the "
                "last batch's logprobs"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._masters.write()
        self._optimizer.zero_grad(set_to_none=True)
        self._gathered = False
        return {"grad_norm": norm.item(), "learning_rate": learning_rate}

    def _save(self, folder: Path) -> None:
        self._write(self._saved(), folder / "trainer.pt")

    def _saved(self) -> dict[str, Any]:
        return {
            "parameters": {name: weight.detach() for name, weight in self._masters.weights.items()},
            "optimizer": self._optimizer.state_dict(),
            "dtype": str(self._base.dtype),
        }

    def _write(self, state: dict[str, Any], path: Path) -> None:
        with writing(path):
            torch.save(state, path)

    def _load(self, folder: Path) -> None:
        path = folder / "trainer.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            saved, optimizer, dtype = state["parameters"], state["optimizer"], state["dtype"]
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise trainer.DamagedCheckpointError(
                f"{path} cannot be read ({reason[:200]})"
            ) from error
        trainable = self._masters.weights
        if trainable.keys() != saved.keys() or any(
            trainable[n].shape != saved[n].shape for n in trainable
        ):
            raise TrainerError(f"{folder} holds other parameters than this model's")
        if dtype != str(self._base.dtype):
            here, there = (name.removeprefix("torch.") for name in (str(self._base.dtype), dtype))
            raise TrainerError(
                f"{folder} was trained in {there}, and this is in {here}: go on with "
                f'Placement(dtype="{there}") (--dtype {there})'
            )
        self._restore(saved, optimizer)

    def _restore(self, saved: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self._masters.weights.items():
                parameter.copy_(saved[name])
        self._masters.write()
        self._optimizer.load_state_dict(optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        self._gathered = False

    def _microbatches(self, datums: Sequence[TrainingDatum]) -> Iterator[list[int]]:
        """Places of datums that go through the model together: neighbours in length, so that
        little is padding, and prompt by prompt where those are shared."""
        if self._share_prompts:
            bundles = losses.bundled(datums)
        else:
            bundles = [[place] for place in range(len(datums))]
        widths = [_width([datums[i] for i in bundle]) for bundle in bundles]
        together: list[int] = []
        for i in sorted(range(len(bundles)), key=lambda i: widths[i]):
            if together and (len(together) + 1) * widths[i] > self._microbatch_tokens:
                yield [place for k in together for place in bundles[k]]
                together = []
            together.append(i)
        if together:
            yield [place for k in together for place in bundles[k]]


def _width(bundle: Sequence[TrainingDatum]) -> int:
    """Columns of a row that holds datums with one prompt."""
    prompt = bundle[0].prompt_length
    return prompt + sum(len(datum) - prompt for datum in bundle)


def _frozen(model: PreTrainedModel, *, copied: bool = True) -> PreTrainedModel:
    """A copy that nothing trains."""
    frozen: Any = copy.deepcopy(model) if copied else model
    return with_float32_head(frozen.train(False).requires_grad_(False))


def _objective(loss: NamedLoss | LossFunction) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    if not isinstance(loss, NamedLoss):
        return loss
    return losses.make_loss(
        loss.loss_fn, loss.config, correction=loss.correction, kl_beta=loss.kl_beta
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a disk is full, torch and safetensors speak of positions in their own code."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise TrainerError(
            f"{path} cannot be written; is there room on its disk? Earlier checkpoints are whole, "
            f"and the same command goes on from the newest of them ({reason})"
        ) from error
