"""The samplers of the service's models, one for each base model, deployment and adapter.

Invariant: a deployment and an adapter each sample with weights of their own, and nobody else's
reach them. A sampler is made from the state on disk when it is first asked for, so the same names
serve the same weights after a restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from eval_protocol_rft import rollout
from eval_protocol_rft.local import LoadedTokenizer, LocalSampler
from eval_protocol_rft.local.server import ApiError, ServedModel
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import BaseModel, Weights
from eval_protocol_rft.loop.service.inference._targets import (
    ADAPTERS,
    DEPLOYMENTS,
    VERSION,
    WEIGHTS,
    Target,
    Targets,
)

_UNNAMED = ""
"""What a sampler calls weights that no snapshot names: replies leave it out, and a completion in
which they were replaced shows that it was."""
_MOST_BYTES = 4 * 2**30
"""Of weights that are kept in memory for requests; what was not asked for longest goes first, and
is read again when it is asked for."""


@dataclass(slots=True)
class _Loaded:
    """A sampler, and what it samples with."""

    target: Target
    sampler: LocalSampler
    base: BaseModel
    size: int
    """Bytes of its weights; 0 where they are the base model's own."""


class ServedModels:
    """The models of the service, for its endpoints. Belongs to one event loop.

    Args:
        store: says what is deployed where.
        weights: the models.
        say: called with a line when a name is asked for that is not served, once a name and reason.
    """

    def __init__(
        self, store: Store, weights: Weights, *, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._store = store
        self._weights = weights
        self._targets = Targets(store, weights, say=say)
        self._began = int(time.time())
        self._loaded: dict[str, _Loaded] = {}
        """By key, the longest unused first."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._tokenizers: dict[str, LoadedTokenizer] = {}

    async def find(self, name: str) -> ServedModel:
        """What answers requests for `name`.

        Raises:
            ApiError: 404, there is no such model, or it is not deployed; 503, its deployment is
                scaled to zero, and wakes.
        """
        found = self._current(name)
        if found is None:
            async with self._lock(self._targets.of(name).key):
                found = self._current(name) or await self._make(self._targets.of(name))
        base = found.base
        return ServedModel(
            name=name.partition("@")[0],
            sampler=found.sampler,
            tokenizer=self._tokenizer(base),
            context_length=found.sampler.context_length,
        )

    async def load(self, deployment: str, weights: str, *, version: str | None) -> None:
        """Sample with `weights` for a deployment from here on, between two tokens of what it
        samples now; on disk when this returns.

        Args:
            version: the snapshot's identity, which replies name.

        Raises:
            ServiceError: there is no such deployment, or the weights are no model's of its base.
        """
        async with self._lock(deployment):
            row = self._targets.deployment(deployment)
            base = await asyncio.to_thread(self._weights.base_of, weights)
            own = await asyncio.to_thread(
                self._weights.base_of, self._targets.of_deployment(row).weights
            )
            if base is not own:
                raise ServiceError(
                    f"{deployment} runs {own.name}, and these weights are of {base.name}"
                )
            target = Target(deployment, weights, version)
            found = self._loaded.get(deployment)
            if found is not None and found.target != target:
                state = await asyncio.to_thread(self._weights.state_dict, weights)
                await found.sampler.load_weights(state, policy_version=version or _UNNAMED)
                found.target = target
            with self._store.change():
                row = self._targets.deployment(deployment)
                if not self._weights.has(weights):  # freed meanwhile
                    raise ServiceError.not_found(f"weights {weights}")
                self._store.put(
                    DEPLOYMENTS, deployment, {**row, WEIGHTS: weights, VERSION: version}
                )

    def drop(self, name: str) -> None:
        """Free what a deployment or an adapter that is gone had in memory. What it samples now is
        sampled to its end."""
        self._loaded.pop(name, None)
        self._locks.pop(name, None)

    async def listed(self) -> list[dict[str, Any]]:
        """What can be asked for: base models, deployments and adapters."""
        bases = self._weights.models.values()
        entries = [await self._entry(base.name, base, self._began) for base in bases]
        for kind in (DEPLOYMENTS, ADAPTERS):
            for row in self._store.list(kind):
                if (target := self._targets.listed(kind, row)) is None:
                    continue
                base = await asyncio.to_thread(self._weights.base_of, target.weights)
                created = _unix_seconds(row.get("createTime"), self._began)
                entries.append(await self._entry(row["name"], base, created))
        return entries

    async def aclose(self) -> None:
        """End what is being sampled."""
        samplers = [loaded.sampler for loaded in self._loaded.values()]
        self._loaded.clear()
        await asyncio.gather(*(sampler.aclose() for sampler in samplers))

    def _current(self, name: str) -> _Loaded | None:
        """The sampler, where it is in memory and has the weights that it should have."""
        target = self._targets.of(name)
        found = self._loaded.get(target.key)
        if found is None or found.target != target:
            return None
        self._loaded[target.key] = self._loaded.pop(target.key)
        return found

    async def _make(self, target: Target) -> _Loaded:
        try:
            found = await asyncio.to_thread(self._read, target)
        except ServiceError as error:
            raise ApiError(str(error), status=error.status) from error
        self._loaded[target.key] = found
        for key in list(self._too_many(target.key)):
            self.drop(key)
        return found

    def _read(self, target: Target) -> _Loaded:
        base = self._weights.base_of(target.weights)
        # Nobody loads other weights into a base model; deployments and adapters have a copy.
        is_base = target.key == base.name
        module = base.module if is_base else self._weights.module(target.weights)
        size = 0 if is_base else sum(p.numel() * p.element_size() for p in module.parameters())
        sampler = LocalSampler(module, base.tokenizer, policy_version=target.version or _UNNAMED)
        return _Loaded(target, sampler, base, size)

    def _too_many(self, kept: str) -> Iterator[str]:
        """Keys of what is over the bound, the longest unused first."""
        size = sum(loaded.size for loaded in self._loaded.values())
        for key, loaded in self._loaded.items():
            if size <= _MOST_BYTES:
                return
            if key != kept and loaded.size:
                size -= loaded.size
                yield key

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _tokenizer(self, base: BaseModel) -> LoadedTokenizer:
        if base.name not in self._tokenizers:
            self._tokenizers[base.name] = LoadedTokenizer.wrap(base.tokenizer, base.name)
        return self._tokenizers[base.name]

    async def _entry(self, name: str, base: BaseModel, created: int) -> dict[str, Any]:
        context_length = await asyncio.to_thread(lambda: base.context_length)
        tokenizer = self._tokenizer(base)
        chats = tokenizer.chat_template_hash is not None
        return {
            "id": name,
            "owned_by": name.split("/")[1],
            "created": created,
            "kind": "HF_PEFT_ADDON" if f"/{ADAPTERS}/" in name else "HF_BASE_MODEL",
            "supports_chat": chats,
            "supports_image_input": False,
            "supports_tools": chats and rollout.tool_format(tokenizer) is not None,
            "context_length": context_length,
        }


def _unix_seconds(created: str | None, unknown: int) -> int:
    return int(datetime.fromisoformat(created).timestamp()) if created else unknown
