"""Deployments, and the adapters that are deployed on them.

Invariant: what a deployment serves is in its row (`_weights`, `_version`), so that it serves the
same after a restart. Nothing has to be waited for: a deployment is READY in the answer that makes
it, an adapter DEPLOYED.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control import _models as models
from eval_protocol_rft.loop.service.control import _resources as resources
from eval_protocol_rft.loop.service.control._models import Models
from eval_protocol_rft.loop.service.control._resources import Call, RouteTable

if TYPE_CHECKING:
    from eval_protocol_rft.loop.service.inference._hot_load import Served

KIND, ADAPTERS = "deployments", "deployedModels"
_OUTPUT = frozenset({"name", "createTime", "updateTime", "createdBy", "state", "status"})
_COUNTED = frozenset({"desiredReplicaCount", "replicaStats", "deleteTime", "purgeTime", "region"})
"""Set by the service as well; a client that sends them back changes nothing."""
_SECRET = frozenset({"directRouteApiKeys"})
"""Not kept: nobody here needs them."""
_KEPT_DELETED = timedelta(days=7)
TRANSITIONS = ("HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED", "ASYNC", "SYNC")


class Deployments:
    """`deployments` and `deployedModels`."""

    def __init__(
        self, store: Store, catalogue: Models, served: Served, say: Callable[[str], None]
    ) -> None:
        self._store = store
        self._models = catalogue
        self._served = served
        self._say = say

    @property
    def routes(self) -> RouteTable:
        one, adapters = f"accounts/*/{KIND}/*", f"accounts/*/{ADAPTERS}"
        return (
            ("GET", f"accounts/*/{KIND}", self.list_deployments),
            ("POST", f"accounts/*/{KIND}", self.create),
            ("GET", one, self.get),
            ("PATCH", one, self.update),
            ("DELETE", one, self.delete),
            ("PATCH", f"{one}:scale", self.scale),
            ("POST", f"{one}:scale", self.scale),
            ("POST", f"{one}:undelete", self.undelete),
            ("GET", adapters, self.list_adapters),
            ("POST", adapters, self.create_adapter),
            ("GET", f"{adapters}/*", self.get_adapter),
            ("PATCH", f"{adapters}/*", self.update_adapter),
            ("DELETE", f"{adapters}/*", self.delete_adapter),
        )

    async def list_deployments(self, call: Call) -> dict[str, Any]:
        rows = self._store.list(KIND, f"{call.name}/")
        if not call.wants("showDeleted"):
            rows = [row for row in rows if row["state"] != "DELETED"]
        return resources.page(rows, call.query, KIND, fields.DEPLOYMENT)

    async def create(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.DEPLOYMENT, "deployment")
        key = call.query.get("deploymentId") or names.last(body.get("name", ""))
        key = resources.check_id(key or secrets.token_hex(4), "deploymentId")
        name = f"{call.name}/{key}"
        model = self._models.find(fields.need(body, "baseModel", "deployment"))
        settings = {k: v for k, v in body.items() if k not in _OUTPUT | _COUNTED | _SECRET}
        self._check(settings, model)
        if "deploymentShape" in settings:
            settings["deploymentShape"] = self._shape(settings["deploymentShape"], model)
        if self._store.get(KIND, name) is not None:
            raise resources.exists(name)
        created = names.now()
        row: Resource = {
            **settings, "name": name, "state": "READY", "createTime": created,
            "updateTime": created, "_weights": model["_weights"], "_version": None,
        }  # fmt: skip
        _count_replicas(row, settings)
        if not call.wants("validateOnly"):
            self._store.put(KIND, name, row)
            self._say(f"deployment {key}: READY, serves {names.last(model['name'])}")
        return resources.view(row)

    async def get(self, call: Call) -> dict[str, Any]:
        return resources.view(self.row(call.name, deleted=True))

    async def update(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.DEPLOYMENT, "deployment")
        mask = fields.read_mask(call.query.get("updateMask", ""), fields.DEPLOYMENT, "deployment")
        if fixed := sorted(set(mask) & _OUTPUT):
            raise ServiceError(f"{call.name}: {', '.join(fixed)} cannot be changed")
        row = self.row(call.name)
        named = {name: body.get(name) for name in mask} if mask else body
        changes = {k: v for k, v in named.items() if k not in _OUTPUT | _COUNTED | _SECRET}
        if changes.get("baseModel", row["baseModel"]) != row["baseModel"]:
            raise ServiceError(
                f"{call.name} serves {row['baseModel']}, and baseModel cannot be changed: make "
                "another deployment"
            )
        model = self._models.find(row["baseModel"])
        bounds = {name: row[name] for name in ("minReplicaCount", "maxReplicaCount")}
        self._check(bounds | {k: v for k, v in changes.items() if v is not None}, model)
        if shape := changes.get("deploymentShape"):
            changes["deploymentShape"] = self._shape(shape, model)
        before = row.get("hotLoadTrainerJob")
        for field, value in changes.items():
            if value is None:
                row.pop(field, None)
            else:
                row[field] = value
        _count_replicas(row, changes)
        row["updateTime"] = names.now()
        reattached = row.get("hotLoadTrainerJob") != before
        if reattached:
            # Its replicas start again, on the base model, and know nothing of earlier snapshots:
            # in one change, so that they do whatever comes between.
            row |= {"_weights": model["_weights"], "_version": None}
        self._store.put(KIND, call.name, row)
        key = names.last(call.name)
        if reattached:
            await self._served.load(call.name, model["_weights"], version=None)
            row = self.row(call.name)
            job = names.last(row.get("hotLoadTrainerJob") or "nothing")
            self._say(f"deployment {key}: READY, takes snapshots of {job}")
        elif {"minReplicaCount", "maxReplicaCount", "replicaCount"} & set(changes):
            self._say(f"deployment {key}: READY, {_replicas(row)}")
        return resources.view(row)

    async def scale(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, {"name": str, "replicaCount": int}, "the request")
        count = body.get("replicaCount", 0)  # protobuf leaves a 0 out
        if count < 0:
            raise ServiceError(f"replicaCount is {count}: at least 0")
        row = self.row(call.name)
        row |= {"replicaCount": count, "desiredReplicaCount": count}
        row["maxReplicaCount"] = max(row["maxReplicaCount"], count)
        row["updateTime"] = names.now()
        self._store.put(KIND, call.name, row)
        self._say(f"deployment {names.last(call.name)}: READY, {_replicas(row)}")
        return {}

    async def delete(self, call: Call) -> dict[str, Any]:
        row = self.row(call.name, deleted=True)
        adapters = self._adapters_on(call.name)
        if adapters and not call.wants("ignoreChecks"):
            deployed = ", ".join(adapter["name"] for adapter in adapters)
            raise resources.wrong_state(
                f"{call.name} is in use: {deployed} are deployed on it; delete them first, or pass "
                "ignoreChecks=true"
            )
        hard = call.wants("hard")
        with self._store.change():
            for adapter in adapters:
                self._store.delete(ADAPTERS, adapter["name"])
            if hard:
                self._store.delete(KIND, call.name)
            elif row["state"] != "DELETED":
                purged = datetime.now(UTC) + _KEPT_DELETED
                row |= {
                    "state": "DELETED", "deleteTime": names.now(),
                    "purgeTime": purged.isoformat().replace("+00:00", "Z"),
                }  # fmt: skip
                self._store.put(KIND, call.name, row)
        for gone in (call.name, *(adapter["name"] for adapter in adapters)):
            self._served.drop(gone)
        also = f", and {len(adapters)} adapters on it" if adapters else ""
        self._say(f"deployment {names.last(call.name)}: deleted{also}")
        return {}

    async def undelete(self, call: Call) -> dict[str, Any]:
        fields.read_fields(call.body, {"name": str}, "the request")
        row = self.row(call.name, deleted=True)
        if row["state"] != "DELETED":
            raise resources.wrong_state(f"{call.name} is {row['state']}, not DELETED")
        for field in ("deleteTime", "purgeTime"):
            row.pop(field, None)
        row |= {"state": "READY", "updateTime": names.now()}
        self._store.put(KIND, call.name, row)
        self._say(f"deployment {names.last(call.name)}: READY again")
        return resources.view(row)

    def row(self, name: str, *, deleted: bool = False) -> Resource:
        """A deployment; one that was deleted and is still remembered only where `deleted`.

        Raises:
            ServiceError: there is none of that name.
        """
        row = self._store.get(KIND, name)
        if row is None:
            raise ServiceError.not_found(name)
        if row["state"] == "DELETED" and not deleted:
            raise resources.wrong_state(f"{name} is DELETED: undelete it first")
        return row

    def _check(self, settings: dict[str, Any], model: Resource) -> None:
        low, high = settings.get("minReplicaCount", 0), settings.get("maxReplicaCount")
        if low < 0 or (high is not None and not low <= high):
            raise ServiceError(f"minReplicaCount {low} and maxReplicaCount {high} do not fit")
        if job := settings.get("hotLoadTrainerJob"):
            row = self._store.get("rlorTrainerJobs", job)
            if row is None or row["state"] == "JOB_STATE_DELETED":
                raise ServiceError.not_found(f"hotLoadTrainerJob {job}")
            if row.get("_base", model["_base"]) != model["_base"]:
                raise ServiceError(
                    f"hotLoadTrainerJob {job} trains {row['_base']}, and the deployment serves "
                    f"{model['name']}"
                )
        if transition := settings.get("hotLoadTransitionType"):
            fields.one_of(transition, TRANSITIONS, "deployment.hotLoadTransitionType")

    def _shape(self, shape: str, model: Resource) -> str:
        """The version of a deployment shape."""
        base = self._models.base_of_shape(shape)
        if base.name != model["_base"]:
            raise ServiceError(f"deploymentShape {shape} is of {base.name}, not {model['name']}")
        return shape if "/versions/" in shape else f"{shape}/versions/1"

    # Adapters

    async def list_adapters(self, call: Call) -> dict[str, Any]:
        rows = self._store.list(ADAPTERS, f"{call.name}/")
        return resources.page(rows, call.query, ADAPTERS, fields.DEPLOYED_MODEL)

    async def create_adapter(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.DEPLOYED_MODEL, "deployedModel")
        model = self._models.row(
            names.full_name(fields.need(body, "model", "deployedModel"), "models")
        )
        name = names.full_name(fields.need(body, "deployment", "deployedModel"), KIND)
        deployment, replace = self.row(name), call.wants("replaceMergedAddon")
        self._check_fits(model, deployment, replace=replace)
        others = self._adapters_on(name)
        if any(other["model"] == model["name"] for other in others):
            raise resources.exists(f"{model['name']} on {name}")
        elsewhere = [row for row in self._store.list(ADAPTERS) if row["model"] == model["name"]]
        created = names.now()
        key = f"{names.last(model['name'])[:54]}-{secrets.token_hex(4)}"
        row: Resource = {
            **{k: v for k, v in body.items() if k not in _OUTPUT},
            "name": f"{call.name}/{key}", "model": model["name"], "deployment": name,
            "state": "DEPLOYED", "default": not elsewhere, "createTime": created,
            "updateTime": created, "_merged": replace,
        }  # fmt: skip
        with self._store.change():
            for other in others if replace else ():
                self._store.delete(ADAPTERS, other["name"])
            self._store.put(ADAPTERS, row["name"], row)
        for other in others if replace else ():
            self._served.drop(other["name"])
        gone = "".join(f", in place of {names.last(o['model'])}" for o in others if replace)
        self._say(f"model {names.last(model['name'])}: DEPLOYED on {names.last(name)}{gone}")
        return resources.view(row)

    async def get_adapter(self, call: Call) -> dict[str, Any]:
        return resources.view(self._adapter(call.name))

    async def update_adapter(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.DEPLOYED_MODEL, "deployedModel")
        mask = fields.read_mask(
            call.query.get("updateMask", ""), fields.DEPLOYED_MODEL, "deployedModel"
        )
        row = self._adapter(call.name)
        changes = {name: body.get(name) for name in mask} if mask else body
        for field, value in changes.items():
            if field in ("model", "deployment") and value != row[field]:
                raise ServiceError(f"{call.name}: {field} cannot be changed")
            if field not in _OUTPUT:
                row[field] = value
        row["updateTime"] = names.now()
        self._store.put(ADAPTERS, call.name, row)
        return resources.view(row)

    async def delete_adapter(self, call: Call) -> dict[str, Any]:
        row = self._adapter(call.name)
        self._store.delete(ADAPTERS, call.name)
        self._served.drop(call.name)
        where = names.last(row["deployment"])
        self._say(f"model {names.last(row['model'])}: no longer on {where}")
        return {}

    def _adapter(self, name: str) -> Resource:
        row = self._store.get(ADAPTERS, name)
        if row is None:
            raise ServiceError.not_found(name)
        return row

    def _adapters_on(self, deployment: str) -> list[Resource]:
        return [row for row in self._store.list(ADAPTERS) if row["deployment"] == deployment]

    def _check_fits(self, model: Resource, deployment: Resource, *, replace: bool) -> None:
        if model["kind"] != models.ADDON:
            raise ServiceError(
                f"{model['name']} is a {model['kind']}, no adapter: make a deployment of it"
            )
        base = self._models.find(deployment["baseModel"])["_base"]
        if model["_base"] != base:
            raise ServiceError(
                f"{model['name']} is an adapter of {model['_base']}, and {deployment['name']} "
                f"serves {base}"
            )
        if not (deployment.get("enableAddons") or replace):
            raise resources.wrong_state(
                f"{deployment['name']} takes no adapters: make it with enableAddons=true, or pass "
                "replaceMergedAddon=true"
            )


def _count_replicas(row: Resource, changes: dict[str, Any]) -> None:
    """How many there are, by the bounds on them: one where nobody says how many."""
    low = row.setdefault("minReplicaCount", 0)
    high = row.setdefault("maxReplicaCount", max(low, row.get("replicaCount", 0), 1))
    wanted = row.get("replicaCount") or 1
    if changes.get("replicaCount") == 0:
        wanted = 0
    row["replicaCount"] = row["desiredReplicaCount"] = min(max(wanted, low), high)


def _replicas(row: Resource) -> str:
    count = row["replicaCount"]
    return f"{count} replica" if count == 1 else f"{count or 'no'} replicas"
