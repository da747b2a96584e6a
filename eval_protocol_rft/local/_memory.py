"""How much memory a model of this process takes, by its config alone: its forward passes are run
without numbers (torch's fake tensors), before a weight is read.

Invariant: nothing here allocates what it counts. Counts are of tensors that live at the same time,
in bytes; what libraries and the GPU's context take themselves is not in them.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedModel

from eval_protocol_rft.local._cache import KEPT_SHARE, SMALL_MODEL_PARAMETERS
from eval_protocol_rft.local._placement import Placement, with_float32_head
from eval_protocol_rft.sampling import RefusedError

_PREFILLED = (4, 2048)
"""Rows and columns of a large prefill, see the sampling thread."""
_DEPTHS = (2, 4)
_ROWS = 96
"""Completions that are sampled at once where nobody says otherwise."""
_DRAW_BYTES = 36
"""Per logit of a step: itself, both log-softmaxes, and what drawing from them takes, in float64."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, by what takes them."""

    parts: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    """What grows with the work, up to a bound, and is not in the total."""
    unknown: str = ""
    """Why nothing is known."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """To stand behind the model's place; empty where it is too little to be told."""
        if self.unknown:
            return f"; how much memory it takes is not known ({self.unknown})"
        if not self.parts:
            return ""
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.parts.items() if size)
        more = "".join(f"; {name} up to {_gb(size)}" for name, size in self.at_most.items())
        return f"; about {_gb(self.total)} of memory: {parts}{more}"

    def __or__(self, other: Memory) -> Memory:
        return Memory({**self.parts, **other.parts}, {**self.at_most, **other.at_most})


def free_memory(device: str) -> int | None:
    """Bytes that are free for this process on a device; None where nobody knows."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    free: list[int] = []
    try:
        with open("/proc/meminfo") as lines:
            free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail")]
        # A container's own bound.
        with (
            open("/sys/fs/cgroup/memory.max") as most,
            open("/sys/fs/cgroup/memory.current") as now,
        ):
            free.append(int(most.read()) - int(now.read()))
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def require_fit(
    memory: Memory, device: str, *, smaller: Callable[[], str] = lambda: "take a smaller model"
) -> None:
    """Refuse what takes more memory than is free.

    Args:
        memory: what it takes.
        device: where.
        smaller: says what would fit.

    Raises:
        RefusedError: it does not fit.
    """
    free = free_memory(device)
    if free is not None and memory.total > free:
        raise RefusedError(
            f"{str(memory).removeprefix('; ')}, and {device} has {_gb(free)} free: it does not "
            f"fit; {smaller()}"
        )


def estimate(count: Callable[[], Memory | None]) -> Memory:
    """What `count` says, as far as it can be counted: a model's own code may need numbers."""
    try:
        return count() or Memory()
    except Exception as error:  # noqa: BLE001 - of any model's code; it is said, and decides nothing
        return Memory(unknown=f"{type(error).__name__}: {str(error)[:100]}")


def sampling_memory(config: Any, place: Placement, *, max_batch_tokens: int) -> Memory | None:
    """What `LocalSampler` takes; None for a model so small that it matters to nobody.

    Args:
        config: of the model.
        place: that was `chosen`.
        max_batch_tokens: of the sampler.
    """
    model = unloaded_model(config, place)
    if is_small(model):
        return None
    text = config.get_text_config(decoder=True)
    rows, columns = _PREFILLED
    columns = min(columns, getattr(text, "max_position_embeddings", columns))

    def prefill(shallow: PreTrainedModel) -> int:
        ids = torch.zeros((rows, columns), dtype=torch.int64)
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(shallow.forward).parameters:
            options["logits_to_keep"] = 1
        with torch.no_grad():
            return peak_bytes(lambda: shallow(input_ids=ids, **options))

    def cached(shallow: PreTrainedModel) -> int:
        ids = torch.zeros((1, 1), dtype=torch.int64)
        with torch.no_grad():
            cache: Any = shallow(input_ids=ids, use_cache=True).past_key_values
        return int(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))

    caches = int(max_batch_tokens * (1 + KEPT_SHARE) * by_depth(config, place, cached))
    step = _ROWS * text.vocab_size * _DRAW_BYTES
    return Memory(
        {
            "weights": tensor_bytes(model),
            "float32 output layer": _float32_head_bytes(model),
            "a prefill": max(by_depth(config, place, prefill), step),
        },
        {"keys and values": caches},
    )


def unloaded_model(config: Any, place: Placement) -> PreTrainedModel:
    """The model's parts and their shapes: no numbers, no passes."""
    with torch.device("meta"):
        return _from_config(config, place)


def by_depth(config: Any, place: Placement, measure: Callable[[PreTrainedModel], int]) -> int:
    """What `measure` would say of a model, from what it says of one with two layers and one with
    four: each layer more takes as much as the one before. Inside, a model is without numbers, and
    whatever is made of it."""
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    if depth is None or depth <= max(_DEPTHS):
        return _measured(config, place, measure)
    two, four = (_measured(_with_layers(config, layers), place, measure) for layers in _DEPTHS)
    each = max(0.0, (four - two) / (_DEPTHS[1] - _DEPTHS[0]))
    return int(four + each * (depth - _DEPTHS[1]))


def _measured(config: Any, place: Placement, measure: Callable[[PreTrainedModel], int]) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return measure(_from_config(config, place))


def _with_layers(config: Any, layers: int) -> Any:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = kinds[:layers]
    return shallow


def _from_config(config: Any, place: Placement) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(
        config, dtype=place.torch_dtype(), attn_implementation=_known(place.attention)
    )
    return with_float32_head(model.train(False))


def _known(attention: str | None) -> str | None:
    """Fused kernels of other packages are none without numbers; torch's take as much."""
    return attention if attention in ("eager", None) else "sdpa"


def is_small(model: torch.nn.Module) -> bool:
    """Whether its memory matters to nobody."""
    return sum(p.numel() for p in model.parameters()) < SMALL_MODEL_PARAMETERS


def _float32_head_bytes(model: Any) -> int:
    """What the sampler keeps of the output layer beside the weights."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or weight.dtype == torch.float32:
        return 0
    return int(weight.numel()) * 4


def tensor_bytes(model: torch.nn.Module) -> int:
    """Of parameters; those that are one count once."""
    return int(sum(parameter.nbytes for parameter in model.parameters()))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that lives at once of what `run` makes, results included."""
    peak = _Peak()
    with peak:
        result = run()
    del result
    return peak.most


class _Peak(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before is not counted, nor are views of it.
        tree_map_only(Tensor, self._pass_over, (args, kwargs))
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _pass_over(self, tensor: Tensor) -> None:
        self._known.setdefault(tensor.untyped_storage(), 0)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
