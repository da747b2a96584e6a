"""What a name leads to: which resource samples for it, with which weights, by the state on disk.

Invariant: nothing is remembered here: what the store says now is what a name means.

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

from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local.server import ApiError
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

_NAMES_TOLD = 8
"""In the refusal of an unknown name."""
_MOST_REFUSED = 1000
"""Refusals that are remembered so as to be told once."""


class Target(NamedTuple):
    """What a name leads to."""

    key: str
    """The resource that samples: a base model, a deployment or an adapter."""
    weights: str
    version: str | None


class _NotServedError(EvalProtocolRftError):
    """Why a name that is known is not answered. Ends in an `ApiError`."""


class _AsleepError(_NotServedError):
    """Of a deployment that a request wakes."""


class Targets:
    """
    Args:
        store: says what is deployed where.
        weights: the models.
        say: called with a line when a name is asked for that is not served, once a name and reason.
    """

    def __init__(self, store: Store, weights: Weights, *, say: Callable[[str], None]) -> None:
        self._store = store
        self._weights = weights
        self._say = say
        self._refused: set[str] = set()

    def of(self, asked: str) -> Target:
        """What a request that names `asked` leads to.

        Raises:
            ApiError: 404, there is no such model, or it is not deployed; 503, its deployment is
                scaled to zero, and wakes.
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
            reason = (
                f"not served: {error}" if str(error) != repr(asked) else "which nothing here serves"
            )
            self._mention(f"asked for {asked[:200]!r}, {reason}")
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

    def _alone(self, name: str) -> Target | None:
        """What a name without `#` leads to."""
        collection = name.split("/")[-2] if name.count("/") == 3 else MODELS
        if collection == DEPLOYMENTS:
            return self._up(self.deployment(name))
        if collection == ADAPTERS:
            row = self._store.get(ADAPTERS, name)
            return None if row is None else self._adapter(row)
        if (base := self._base(name)) is not None:
            return Target(base.name, base.weights_id, None)
        return self._somewhere(_full_name(name, MODELS))

    def _on(self, place: str, model: str) -> Target | None:
        """What `model` leads to on a deployment."""
        row = self.deployment(_full_name(place, DEPLOYMENTS))
        if self._same(model, row["baseModel"]):
            return self._up(row)
        for adapter in self._store.list(ADAPTERS):
            if adapter.get("deployment") == row["name"] and self._same(model, adapter["model"]):
                return self._adapter(adapter)
        return None

    def _somewhere(self, model: str) -> Target | None:
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

    def _adapter(self, row: Resource) -> Target:
        if row.get("state") != "DEPLOYED":
            raise _NotServedError(f"{row['name']} is {row.get('state')}")
        if place := row.get("deployment"):
            self._up(self.deployment(place))
        return Target(row["name"], self._weights_of(row["model"]), None)

    def _up(self, row: Resource) -> Target:
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
                return Target(adapter["name"], self._weights_of(adapter["model"]), None)
        return self.of_deployment(row)

    def _wake(self, deployment: str) -> ApiError:
        """As the service does: the request is not kept, and later ones are answered."""
        row = self.deployment(deployment)
        self._store.put(DEPLOYMENTS, deployment, {**row, "replicaCount": 1})
        return ApiError(
            "Deployment is currently scaled to zero and is scaling up. Please retry your request "
            "in a few minutes.",
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            code="DEPLOYMENT_SCALING_UP",
        )

    def of_deployment(self, row: Resource) -> Target:
        """What a deployment samples with while it answers."""
        weights = row.get(WEIGHTS) or self._weights_of(row["baseModel"])
        return Target(row["name"], weights, row.get(VERSION))

    def _weights_of(self, model: str) -> str:
        if (base := self._base(model)) is not None:
            return base.weights_id
        row = self._store.get(MODELS, _full_name(model, MODELS))
        if row is None:
            raise ServiceError.not_found(model)
        return str(row[WEIGHTS])

    def deployment(self, name: str) -> Resource:
        """Its row.

        Raises:
            ServiceError: there is none of that name.
        """
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
            rows = self._store.list(kind)
            names += [row["name"] for row in rows if row.get("state") != "DELETED"]
        more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
        return ", ".join(map(repr, names[:_NAMES_TOLD])) + more

    def listed(self, kind: str, row: Resource) -> Target | None:
        """What a deployment or an adapter leads to; None where it does not answer now."""
        try:
            return self._adapter(row) if kind == ADAPTERS else self._up(row)
        except (ServiceError, _NotServedError):
            return None


def _full_name(name: str, collection: str) -> str:
    """`accounts/A/<collection>/x` of that, of `A/x` or, in the account, of `x`."""
    parts = name.split("/")
    if len(parts) == 1:
        return f"{ACCOUNT}/{collection}/{name}"
    if len(parts) == 2:
        return f"accounts/{parts[0]}/{collection}/{parts[1]}"
    return name
