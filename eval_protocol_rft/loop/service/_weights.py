"""Base models, and sets of weights on disk.

Invariant: a set of weights is written once, whole or not at all, and never changed. It holds what
differs from its base model; tensors that are equal to the base's are read from the base.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft import local
from eval_protocol_rft.loop.service._errors import ServiceError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PUBLIC = "accounts/fireworks/models"
"""Where the service keeps its base models."""


class BaseModel:
    """A model that the service offers, loaded when it is first needed. Safe from any thread.

    Args:
        key: the last part of its name, `accounts/fireworks/models/<key>`.
        folder: weights, config, tokenizer and chat template, as transformers writes them.
        placement: where it is sampled and trained.
    """

    def __init__(self, key: str, folder: Path, placement: local.Placement | None = None) -> None:
        self.name = f"{PUBLIC}/{key}"
        self.folder = folder
        self._placement = placement
        self.weights_id = f"base:{key}"
        """The id of its own weights."""
        self._lock = threading.Lock()
        self._loaded: local.LocalSampler | None = None

    def _load(self) -> local.LocalSampler:
        with self._lock:
            if self._loaded is None:
                self._loaded = local.LocalSampler.from_pretrained(
                    self.folder, placement=self._placement
                )
            return self._loaded

    @property
    def module(self) -> PreTrainedModel:
        """Nobody may change it."""
        return self._load().model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load().tokenizer

    @property
    def vocabulary(self) -> int:
        """Tokens that it has an embedding of."""
        embeddings: Any = self._load().model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._load().context_length


class Weights:
    """Sets of weights by id, below `folder`. Safe from any thread; saving and reading block."""

    def __init__(self, folder: Path, models: Iterable[BaseModel]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.models = {model.name: model for model in models}
        """By name."""
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()

    def base(self, name: str) -> BaseModel:
        """The base model of that name; a quantisation, as its deployments name it
        (`...-fp8`), is the model itself.

        Raises:
            ServiceError: there is none; the message names those that there are.
        """
        found = self.models.get(name) or self.models.get(name.removesuffix("-fp8"))
        if found is None:
            raise ServiceError.not_found(f"{name} (this server has {', '.join(self.models)})")
        return found

    def base_of(self, weights: str) -> BaseModel:
        """The model that a set of weights belongs to."""
        for model in self.models.values():
            if model.weights_id == weights:
                return model
        with self._open(weights) as file:
            return self.base(file.metadata()["base"])

    def save(self, state: Mapping[str, Tensor], *, base: str) -> str:
        """Write what differs from the base model's; returns the id."""
        import torch
        from safetensors.torch import save_file

        own = self.base(base).module.state_dict()
        kept: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in state.items():
            if value.data_ptr() in seen or (name in own and torch.equal(value, own[name])):
                continue  # tied tensors are one
            seen.add(value.data_ptr())
            kept[name] = value.detach().contiguous().clone()
        key = secrets.token_hex(8)
        path = self._path(key)
        part = path.with_suffix(".part")
        save_file(kept, part, metadata={"base": base})
        os.replace(part, path)
        return key

    def state_dict(self, weights: str) -> dict[str, Tensor]:
        """All tensors of a set, by the model's names; those of the base are its own, no copies.

        Raises:
            ServiceError: there is no such set.
        """
        base = self.base_of(weights)
        state = dict(base.module.state_dict())
        if weights == base.weights_id:
            return state
        for name, value in self._read(weights).items():
            tied = [n for n in state if state[n].data_ptr() == state[name].data_ptr()]
            state |= dict.fromkeys(tied, value)
        return state

    def module(self, weights: str) -> PreTrainedModel:
        """A model of its own with these weights."""
        base = self.base_of(weights)
        module = copy.deepcopy(base.module)
        if weights != base.weights_id:
            module.load_state_dict(self.state_dict(weights))
        return module

    def has(self, weights: str) -> bool:
        """Whether there is such a set."""
        own = any(model.weights_id == weights for model in self.models.values())
        return own or self._path(weights).is_file()

    def delete_all_but(self, used: Collection[str]) -> None:
        """Free the room of sets that nothing refers to."""
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in used:
                path.unlink(missing_ok=True)

    def delete(self, weights: str) -> None:
        """Idempotent; a base model's stay."""
        self._path(weights).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor]:
        with self._open(key) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _open(self, key: str) -> Any:
        """A set's file, of which nothing is read yet but its head."""
        from safetensors import safe_open

        path = self._path(key)
        if not path.is_file():
            raise ServiceError.not_found(f"weights {key}")
        return safe_open(path, framework="pt")
