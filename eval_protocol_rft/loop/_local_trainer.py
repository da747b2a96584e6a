"""`LocalTrainer`: a torch model in this process as a `Trainer`, with or without LoRA adapters.

Invariant: what is trained is a copy of its own; the sampler's weights change in `publish` alone.
The same calls on the same state give the same bits on one torch thread, and `load` goes back to
all of the state that `save` wrote.

LoRA adapters (peft) are put on, and merged for sampling: the merged weights, in the base model, are
the policy in training. So a layer whose weight another one shares takes no adapter: merged into the
one, it would change the other as well. Merging never touches the weights in training, and copies
only those that have adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from eval_protocol_rft.local import no_loading_bar, spare_threads
from eval_protocol_rft.loop import _trainer as trainer
from eval_protocol_rft.loop._metrics import reduce_metrics
from eval_protocol_rft.loop._run_options import LoraSettings, Optimizer
from eval_protocol_rft.loop._trainer import ForwardBackward, LossFunction, NamedLoss, TrainerError
from eval_protocol_rft.training import FloatArray, TrainingDatum, losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")

_SEEDING = threading.Lock()

_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError)
"""What torch raises of files that are cut off, empty or of something else."""


class LocalTrainer:
    """AdamW on all parameters of a causal language model, or on LoRA adapters (peft).

    Args:
        model: what to train; copied, in float32. It runs in evaluation mode: with dropout its
            logprobs would be those of another policy than the one that sampled.
        sink: where `publish` sends weights.
        temperature: the one that completions were sampled with.
        lora: train adapters instead of all parameters.
        optimizer: AdamW's settings; only matrices decay.
        keep_reference: hold a frozen copy of `model`, for a penalty on the distance to it. With
            LoRA it costs nothing and is always there.
        entropies: measure the policy's entropy with every pass.
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
    ) -> None:
        adam = optimizer or Optimizer()
        self.temperature = temperature
        self._sink = sink
        self._base = _frozen(model).requires_grad_(lora is None)
        self._module: torch.nn.Module = self._base if lora is None else add_lora(self._base, lora)
        self._lora = lora
        self._reference = _frozen(model) if keep_reference and lora is None else None
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            _decaying(self._parameters, adam.weight_decay),
            lr=0.0,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            foreach=False,
        )
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
            with no_loading_bar(), _writing(folder):
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
        return [by_datum[i] for i in range(len(datums))]

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
        for places in self._microbatches(datums):
            chosen = [datums[i] for i in places]
            values = losses.token_logprobs(
                self._module,
                chosen,
                temperature=self.temperature,
                entropies=self._entropies,
                share_prompts=self._share_prompts,
            )
            if isinstance(loss, NamedLoss):
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
            parts.append(metrics)
            for i, logprobs in zip(places, values.logprobs, strict=True):
                by_datum[i] = logprobs.detach().cpu().numpy()
        return ForwardBackward([by_datum[i] for i in range(len(datums))], reduce_metrics(parts))

    def _optim_step(self, learning_rate: float) -> dict[str, float]:
        if not self._gathered:
            raise TrainerError("optim_step without a forward_backward: there is no gradient")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainerError(
                f"the gradient's norm is {norm.item()}: lower the learning rate, or look at the "
                "last batch's logprobs"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._gathered = False
        return {"grad_norm": norm.item(), "learning_rate": learning_rate}

    def _save(self, folder: Path) -> None:
        trained = {n: p.detach() for n, p in self._module.named_parameters() if p.requires_grad}
        state = {"parameters": trained, "optimizer": self._optimizer.state_dict()}
        with _writing(folder / "trainer.pt"):
            torch.save(state, folder / "trainer.pt")

    def _load(self, folder: Path) -> None:
        path = folder / "trainer.pt"
        try:
            state = torch.load(path, weights_only=True)
            saved, optimizer = state["parameters"], state["optimizer"]
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise trainer.DamagedCheckpointError(
                f"{path} cannot be read ({reason[:200]})"
            ) from error
        trainable = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        if trainable.keys() != saved.keys() or any(
            trainable[n].shape != saved[n].shape for n in trainable
        ):
            raise TrainerError(f"{folder} holds other parameters than this model's")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])
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


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 that nothing trains."""
    frozen: Any = copy.deepcopy(model)
    return frozen.float().train(False).requires_grad_(False)  # type: ignore[no-any-return]


def _objective(loss: NamedLoss | LossFunction) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    if not isinstance(loss, NamedLoss):
        return loss
    return losses.make_loss(
        loss.loss_fn, loss.config, correction=loss.correction, kl_beta=loss.kl_beta
    )


def _decaying(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Norms and biases are not pulled to zero."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from `seed` inside, as they were before behind it. They are of the
    whole process: of several threads, one at a time is inside."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> torch.nn.Module:
    """Put adapters on `model`, which they then share.

    Raises:
        TrainerError: peft is not installed, or finds no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainerError("LoRA needs peft: pip install 'eval-protocol-rft[lora]'") from error
    modules = settings.target_modules
    try:
        with warnings.catch_warnings():
            # Between peft and transformers, and nothing that a user can do anything about.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted: Any = get_peft_model(
                model,
                LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.alpha,
                    target_modules=modules if isinstance(modules, str) else list(modules),
                    lora_dropout=0.0,
                    bias="none",
                    task_type="CAUSAL_LM",
                ),
            )
    except ValueError as error:
        raise TrainerError(f"LoRA on {type(model).__name__}: {error}") from error
    check_mergeable(adapted)
    adapted.train(False)
    return adapted  # type: ignore[no-any-return]


def check_mergeable(adapted: torch.nn.Module) -> None:
    """Whether `merged_weights` of a peft model are the policy in training.

    Raises:
        TrainerError: an adapted layer shares its weight, or an adapter is no plain LoRA.
    """
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    if tied := _tied_targets(base):
        raise TrainerError(
            f"LoRA on {', '.join(tied)}: the weight belongs to another layer of "
            f"{type(base).__name__} as well (tied embeddings), so what is sampled would not be "
            "what was trained: leave it out of target_modules, or untie the model "
            "(tie_word_embeddings=False in its config) first"
        )
    layers = _adapted_layers(base)
    variants = [name for name, layer in layers.items() if getattr(layer, "lora_variant", None)]
    if variants or not layers:
        raise TrainerError(
            f"the adapters of {variants[0] if variants else type(adapted).__name__} are no plain "
            "LoRA, and others are not merged here: use LoraConfig without use_dora"
        )


@torch.no_grad()
def merged_weights(adapted: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of the base model with the adapters added in, by the base model's names. Those
    without an adapter are the base model's own tensors, no copies."""
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    layers = _adapted_layers(base)
    weights: dict[str, Tensor] = {}
    for name, value in base.state_dict().items():
        layer = next((path for path in _parents(name) if path in layers), None)
        if layer is None:
            weights[name] = value
        elif name.startswith(f"{layer}.base_layer."):
            weights[name.replace(f"{layer}.base_layer.", f"{layer}.", 1)] = value
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            key = f"{name}.weight"
            weights[key] = weights[key] + layer.get_delta_weight(adapter).to(weights[key].dtype)
    return weights


def merged_names(adapted: torch.nn.Module) -> frozenset[str]:
    """Names of the base model's weights that adapters change."""
    base: Any = adapted.get_base_model()  # type: ignore[operator]
    return frozenset(f"{name}.weight" for name in _adapted_layers(base))


def _adapted_layers(base: torch.nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


def _tied_targets(base: torch.nn.Module) -> list[str]:
    """Adapted layers whose weight has a second place in the model, under its own name or as the
    same layer twice."""
    layers = _adapted_layers(base)
    places: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        places[parameter.data_ptr()].add(name)
    return [
        n
        for n, layer in layers.items()
        if len(places[layer.get_base_layer().weight.data_ptr()]) > 1
    ]


def _parents(name: str) -> list[str]:
    """`a.b.c` of `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
