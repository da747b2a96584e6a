"""Where a model lies and what it computes in, and loading it there.

Invariant: what was asked for is what is used, or it is refused before a weight is read; only `auto`
leaves something to be chosen here, and what was chosen is told. A model in half precision has a
float32 output layer: logits, and all that is made of them, are never rounded to its dtype.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.sampling import RefusedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PLACE = functools.partial(Flag, panel="The model in this process")

FLASH = "flash_attention_2"
_AMPERE = 8
"""Compute capability from which on a GPU calculates in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model of this process lies, and what it computes in: of `LocalSampler`,
    `LocalParts`, `generate` and the commands."""

    device: Annotated[str, _PLACE(metavar="auto|cpu|cuda|cuda:N")] = "auto"
    """Where a model of this process runs; auto: on a GPU, if torch sees one."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], _PLACE()] = "auto"
    """What it computes in; auto: on the CPU float32, on a GPU what its weights are in.

    Weights in float16 are taken for bfloat16, which holds their range."""
    attention: Annotated[
        Literal["sdpa", "eager", "flash_attention_2"] | None, _PLACE(unset="the model's own")
    ] = None
    """How it computes attention."""
    deterministic: Annotated[bool, _PLACE()] = False
    """On a GPU, the same bits for the same batches, at some speed.

    For the whole process: torch's deterministic algorithms where it has them (it warns of others),
    and no split sums in matrix products of bfloat16."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(
                f"device must be auto, cpu, cuda, or cuda:0 and so on, got {self.device!r}"
            )
        check_options(self)

    def __str__(self) -> str:
        attention = f", {self.attention} attention" if self.attention else ""
        repeatable = ", deterministic" if self.deterministic else ""
        return f"{self.device}, {self.dtype}{attention}{repeatable}"

    def chosen(self, weights_dtype: torch.dtype | str | None = None) -> Placement:
        """The same with a device and a dtype in the place of `auto`.

        Args:
            weights_dtype: what the weights are in, as a model's config says.

        Raises:
            RefusedError: torch or the device is not there, or cannot compute so.
        """
        device = self._device()
        placement = replace(self, device=device, dtype=self._dtype(device, weights_dtype))
        placement._check_attention()
        return placement

    def torch_dtype(self) -> torch.dtype:
        """Of a placement that was `chosen`."""
        import torch

        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _device(self) -> str:
        torch = _torch(f"device {self.device}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "cpu" or (self.device == "auto" and not gpus):
            return "cpu"
        if not gpus:
            reason = (
                f"torch {torch.__version__} is built for the CPU alone: install one for your "
                "GPU's driver (https://pytorch.org/get-started/locally)"
                if torch.version.cuda is None
                else "torch sees no GPU: look at nvidia-smi, and at CUDA_VISIBLE_DEVICES"
            )
            raise RefusedError(f"device {self.device}: {reason}; or take device cpu")
        index = int(self.device.partition(":")[2] or 0)
        if index >= gpus:
            there = "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
            raise RefusedError(f"device {self.device}: this machine has {there}")
        return f"cuda:{index}"

    def _dtype(
        self, device: str, weights_dtype: torch.dtype | str | None
    ) -> Literal["float32", "bfloat16"]:
        import torch

        able = device == "cpu" or torch.cuda.get_device_capability(device)[0] >= _AMPERE
        if self.dtype == "auto":
            half = str(weights_dtype).removeprefix("torch.") in ("bfloat16", "float16")
            return "bfloat16" if half and able and device != "cpu" else "float32"
        if self.dtype == "bfloat16" and not able:
            name = torch.cuda.get_device_name(device)
            raise RefusedError(f"dtype bfloat16: {device} ({name}) lacks it; take float32")
        return self.dtype

    def _check_attention(self) -> None:
        if self.attention != FLASH:
            return
        if self.device == "cpu" or self.dtype == "float32":
            raise RefusedError(
                f"attention {FLASH} computes in bfloat16 on a GPU, and this model is on "
                f"{self.device} in {self.dtype}: take sdpa"
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise RefusedError(f"attention {FLASH} needs a package: pip install flash-attn")


def load_model(
    name: str | Path,
    *,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model from a folder or by hub id, in evaluation mode.

    Args:
        name: of the model.
        placement: where to.
        trust_remote_code: let its folder run its own code.

    Raises:
        RefusedError: torch is not installed, there is no such model, or it cannot be placed so.
    """
    _, place = config_and_place(name, placement, trust_remote_code=trust_remote_code)
    from transformers import AutoModelForCausalLM

    if place.deterministic:
        _be_deterministic()
    try:
        with no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(
                name,
                trust_remote_code=trust_remote_code,
                dtype=place.torch_dtype(),
                attn_implementation=place.attention,
            )
    except (OSError, ValueError, ImportError) as error:
        raise RefusedError(f"cannot load the local model {str(name)!r}: {error}") from error
    moved: Any = model
    return with_float32_head(moved.to(place.device).train(False))


def config_and_place(
    name: str | Path, placement: Placement | None, *, trust_remote_code: bool
) -> tuple[PretrainedConfig, Placement]:
    """A model's config, and where the model will lie.

    Raises:
        RefusedError: as `load_model`.
    """
    _torch(repr(str(name)))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise RefusedError(f"cannot load the local model {str(name)!r}: {error}") from error
    return config, (placement or Placement()).chosen(getattr(config, "dtype", None))


def load_tokenizer_of(name: str | Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights.

    Raises:
        RefusedError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot load the local model {str(name)!r}: {error}") from error


def _be_deterministic() -> None:
    import torch

    # Read when the first matrix product runs on a GPU; without it those may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    products: Any = torch.backends.cuda.matmul
    try:
        products.allow_bf16_reduced_precision_reduction = (False, False)  # nor split along K
    except (TypeError, RuntimeError):  # an older torch has one flag for both
        products.allow_bf16_reduced_precision_reduction = False


def placement_of(model: torch.nn.Module) -> str:
    """Where a loaded model lies and what it computes in, in words."""
    weight = next(model.parameters())
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    words = [str(weight.device), str(weight.dtype).removeprefix("torch.")]
    return ", ".join(words + ([f"{attention} attention"] if attention else []))


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise RefusedError(
            f"{what} in this process needs torch: pip install 'eval-protocol-rft[local]'"
        ) from error
    return torch


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar per shard into a command's or a test's output."""
    from transformers.utils import logging

    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


_KEPT: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, Tensor] | None] = (
    weakref.WeakKeyDictionary()
)
"""Output layers whose weight is kept in float32 between forwards, with the version that it is of.
Here and not on the layer, so that a copy of a model has no copy of it."""


def with_float32_head(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself. Its output layer, if it is a plain linear one in half precision, computes in
    float32 from here on; weights, their names and their dtype stay.

    Rounded to bfloat16, a logit of 20 is off by up to 0.06, and so is a logprob (MiniMax-M1,
    arXiv:2506.13585, found its mismatch between sampler and trainer there)."""
    from torch import nn

    head = _head(model)
    if type(head) is nn.Linear and head.weight.dtype != _torch("").float32:
        head.__class__ = _float32_linear()
    return model


def keep_float32_head(model: PreTrainedModel) -> None:
    """Where forwards without gradient are many and weights change seldom: cast them once."""
    head = _head(model)
    if type(head) is _float32_linear():
        _KEPT[head] = None


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


@functools.cache
def _float32_linear() -> Any:
    """A class, made once torch is there."""
    import torch
    from torch.nn.functional import linear

    class Float32Linear(torch.nn.Linear):
        """Its weight is in half precision, its arithmetic and its result in float32."""

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            bias = None if self.bias is None else self.bias.float()
            return linear(input.float(), self._weight(), bias)

        def _weight(self) -> Tensor:
            if torch.is_grad_enabled() or self not in _KEPT:
                return self.weight.float()
            version, kept = _KEPT[self] or (None, None)
            if kept is None or version != self.weight._version:
                kept = self.weight.detach().float()
                _KEPT[self] = self.weight._version, kept
            return kept

    return Float32Linear
