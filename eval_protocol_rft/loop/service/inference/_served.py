"""Which weights answer a request: by the name that it asks for, from the state on disk.

Invariant: a deployment and an adapter each sample with weights of their own, and nobody else's
reach them. What the store says is served is what answers: a sampler is made from it when it is
first asked for, so the same names serve the same weights after a restart.

Ways in which clients name what they want:

    accounts/fireworks/models/BASE                        the base model, also `fireworks/BASE`, `BASE`
    accounts/acc/deployments/D                            a deployment
    accounts/fireworks/models/BASE#accounts/acc/deployments/D      also `BASE#D`
    accounts/acc/models/M#accounts/acc/deployments/D      an adapter on a deployment
    accounts/acc/deployedModels/A                         likewise
    accounts/acc/models/M                                 a model that is deployed somewhere

Any of them may end in `@IDENTITY`, which asks for that snapshot and no other.
"""  # noqa: E501 - the table

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any, NamedTuple

from eval_protocol_rft import rollout
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import LoadedTokenizer, LocalSampler
from eval_protocol_rft.local.server import ApiError, ServedModel
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._names import ACCOUNT
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import PUBLIC, BaseModel, Weights

MODELS, DEPLOYMENTS, ADAPTERS = "models", "deployments", "deployedModels"
"""Kinds of the store."""
WEIGHTS = "_weights"
"""Of a deployment and of a model of the account: the weights that it has; a deployment without
them has those of its `baseModel`."""
VERSION = "_version"
"""Of a deployment: the identity of the snapshot that these weights are."""
MERGED = "_merged"
"""Of an adapter: it answers whatever is asked of its deployment (`replaceMergedAddon`)."""

_UNNAMED = ""
"""What a sampler calls weights that no snapshot names: replies leave it out, and a completion in
which they were replaced shows that it was."""
_MOST_BYTES = 4 * 2**30
"""Of weights that are kept in memory for requests; what was not asked for longest goes first, and
is read again when it is asked for."""
_NAMES_TOLD = 8
"""In the refusal of an unknown name."""
_MOST_REFUSED = 1000
"""Refusals that are remembered so as to be told once."""


class _Target(NamedTuple):
    """What a name leads to."""

    key: str
    """The resource that samples: a base model, a deployment or an adapter."""
    weights: str
    version: str | None


@dataclass(slots=True)
class _Loaded:
    """A sampler, and what it samples with."""

    target: _Target
    sampler: LocalSampler
    base: BaseModel
    size: int
    """Bytes of its weights; 0 where they are the base model's own."""


class _NotServedError(EvalProtocolRftError):
    """Why a name that is known is not answered. Ends in an `ApiError`."""


class _AsleepError(_NotServedError):
    """Of a deployment that a request wakes."""


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
        self._say = say
        self._refused: set[str] = set()
        self._weights = weights
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
            async with self._lock(self._target(name).key):
                found = self._current(name) or await self._make(self._target(name))
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
            row = self._deployment(deployment)
            base = await asyncio.to_thread(self._weights.base_of, weights)
            own = await asyncio.to_thread(self._weights.base_of, self._row_target(row).weights)
            if base is not own:
                raise ServiceError(
                    f"{deployment} runs {own.name}, and these weights are of {base.name}"
                )
            target = _Target(deployment, weights, version)
            found = self._loaded.get(deployment)
            if found is not None and found.target != target:
                state = await asyncio.to_thread(self._weights.state_dict, weights)
                await found.sampler.load_weights(state, policy_version=version or _UNNAMED)
                found.target = target
            with self._store.change():
                row = self._deployment(deployment)
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
                if (target := self._listed_target(kind, row)) is None:
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

    # From a name to weights

    def _target(self, asked: str) -> _Target:
        """
        Raises:
            ApiError: as `find`.
        """
        name, _, version = asked.partition("@")
        model, mark, place = name.partition("#")
        try:
            target = self._on(place, model) if mark else self._alone(model)
            if target is None or (version and target.version != version):
                raise _NotServedError(repr(asked))
        except (_NotServedError, ServiceError) as error:
            if isinstance(error, _AsleepError):
                raise self._wake(str(error)) from None
            self._mention(f"asked for {asked[:200]!r}, not served: {error}")
            raise ApiError(
                f"Model not found, inaccessible, and/or not deployed: {error}; this server has "
                f"{self._told_names()}",
                status=HTTPStatus.NOT_FOUND,
            ) from None
        return target

    def _mention(self, line: str) -> None:
        """Clients ask again for a minute or more before they show a 404 to anybody."""
        if line in self._refused:
            return
        if len(self._refused) >= _MOST_REFUSED:
            self._refused.clear()
        self._refused.add(line)
        self._say(line)

    def _alone(self, name: str) -> _Target | None:
        """What a name without `#` leads to."""
        collection = name.split("/")[-2] if name.count("/") == 3 else MODELS
        if collection == DEPLOYMENTS:
            return self._up(self._deployment(name))
        if collection == ADAPTERS:
            row = self._store.get(ADAPTERS, name)
            return None if row is None else self._adapter(row)
        if (base := self._base(name)) is not None:
            return _Target(base.name, base.weights_id, None)
        return self._somewhere(_full_name(name, MODELS))

    def _on(self, place: str, model: str) -> _Target | None:
        """What `model` leads to on a deployment."""
        row = self._deployment(_full_name(place, DEPLOYMENTS))
        if self._same(model, row["baseModel"]):
            return self._up(row)
        for adapter in self._store.list(ADAPTERS):
            if adapter.get("deployment") == row["name"] and self._same(model, adapter["model"]):
                return self._adapter(adapter)
        return None

    def _somewhere(self, model: str) -> _Target | None:
        """A model of the account: on its default adapter, on another one, or on the deployment that
        was made of it; the first of these that answers."""
        adapters = [row for row in self._store.list(ADAPTERS) if row["model"] == model]
        adapters.sort(key=lambda row: not row.get("default", False))
        places = [row for row in self._store.list(DEPLOYMENTS) if row["baseModel"] == model]
        reasons: list[_NotServedError | ServiceError] = []
        for find, rows in ((self._adapter, adapters), (self._up, places)):
            for row in rows:
                try:
                    return find(row)
                except (_NotServedError, ServiceError) as reason:
                    reasons.append(reason)
        reasons.sort(key=lambda reason: not isinstance(reason, _AsleepError))
        if reasons:
            raise reasons[0]
        if self._store.get(MODELS, model) is not None:
            raise _NotServedError(f"{model} is there, and no deployment has it")
        return None

    def _adapter(self, row: Resource) -> _Target:
        if row.get("state") != "DEPLOYED":
            raise _NotServedError(f"{row['name']} is {row.get('state')}")
        if place := row.get("deployment"):
            self._up(self._deployment(place))
        return _Target(row["name"], self._weights_of(row["model"]), None)

    def _up(self, row: Resource) -> _Target:
        """A deployment that answers."""
        name = row["name"]
        if row.get("state") != "READY":
            raise _NotServedError(f"{name} is {row.get('state')}")
        if row.get("replicaCount", 1) < 1:
            if row.get("maxReplicaCount", 1) < 1:
                raise _NotServedError(f"{name} is scaled to zero")
            raise _AsleepError(name)
        for adapter in self._store.list(ADAPTERS):
            if adapter.get(MERGED) and adapter.get("deployment") == name:
                return _Target(adapter["name"], self._weights_of(adapter["model"]), None)
        return self._row_target(row)

    def _wake(self, deployment: str) -> ApiError:
        """As the service does: the request is not kept, and later ones are answered."""
        row = self._deployment(deployment)
        self._store.put(DEPLOYMENTS, deployment, {**row, "replicaCount": 1})
        return ApiError(
            "Deployment is currently scaled to zero and is scaling up. Please retry your request "
            "in a few minutes.",
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            code="DEPLOYMENT_SCALING_UP",
        )

    def _row_target(self, row: Resource) -> _Target:
        weights = row.get(WEIGHTS) or self._weights_of(row["baseModel"])
        return _Target(row["name"], weights, row.get(VERSION))

    def _weights_of(self, model: str) -> str:
        if (base := self._base(model)) is not None:
            return base.weights_id
        row = self._store.get(MODELS, _full_name(model, MODELS))
        if row is None:
            raise ServiceError.not_found(model)
        return str(row[WEIGHTS])

    def _deployment(self, name: str) -> Resource:
        row = self._store.get(DEPLOYMENTS, name)
        if row is None:
            raise ServiceError.not_found(name)
        return row

    def _base(self, name: str) -> BaseModel | None:
        """The base model of that name, whole or short; one of the account goes before it."""
        if "/" not in name and self._store.get(MODELS, _full_name(name, MODELS)) is not None:
            return None
        full = f"{PUBLIC}/{name}" if "/" not in name else _full_name(name, MODELS)
        try:
            return self._weights.base(full)
        except ServiceError:
            return None

    def _same(self, asked: str, model: str) -> bool:
        base = self._base(asked)
        return _full_name(asked, MODELS) == model or (
            base is not None and base == self._base(model)
        )

    def _told_names(self) -> str:
        names = [*self._weights.models]
        for kind in (DEPLOYMENTS, ADAPTERS):
            names += [row["name"] for row in self._store.list(kind)]
        more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
        return ", ".join(map(repr, names[:_NAMES_TOLD])) + more

    def _listed_target(self, kind: str, row: Resource) -> _Target | None:
        """None where it does not answer now."""
        try:
            return self._adapter(row) if kind == ADAPTERS else self._up(row)
        except (ServiceError, _NotServedError):
            return None

    # From weights to a sampler

    def _current(self, name: str) -> _Loaded | None:
        """The sampler, where it is in memory and has the weights that it should have."""
        target = self._target(name)
        found = self._loaded.get(target.key)
        if found is None or found.target != target:
            return None
        self._loaded[target.key] = self._loaded.pop(target.key)
        return found

    async def _make(self, target: _Target) -> _Loaded:
        try:
            found = await asyncio.to_thread(self._read, target)
        except ServiceError as error:
            raise ApiError(str(error), status=error.status) from error
        self._loaded[target.key] = found
        for key in list(self._too_many(target.key)):
            self.drop(key)
        return found

    def _read(self, target: _Target) -> _Loaded:
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


def _full_name(name: str, collection: str) -> str:
    """`accounts/A/<collection>/x` of that, of `A/x` or, in the account, of `x`."""
    parts = name.split("/")
    if len(parts) == 1:
        return f"{ACCOUNT}/{collection}/{name}"
    if len(parts) == 2:
        return f"accounts/{parts[0]}/{collection}/{parts[1]}"
    return name


def _unix_seconds(created: str | None, unknown: int) -> int:
    return int(datetime.fromisoformat(created).timestamp()) if created else unknown
