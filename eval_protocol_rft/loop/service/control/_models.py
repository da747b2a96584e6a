"""The account, the models that it sees, and the shapes of machines that stand for them.

Invariant: a base model is what this server was started with; a model of the account has weights of
its own, and names the base model at the root of them, however many steps lie between.

A training shape is a name for a base model on machines. Here there are no machines, so a shape is
known by the model that its id names: `ts-<model>`, with `-lora` or `-reference` at the end for what
kind of trainer it is. Its context length is the model's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import PUBLIC, BaseModel, Weights
from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control import _resources as resources
from eval_protocol_rft.loop.service.control._resources import Call, RouteTable

KIND = "models"
ADDON, BASE = "HF_PEFT_ADDON", "HF_BASE_MODEL"
_MADE = "2026-01-01T00:00:00Z"
"""When base models and shapes came to be: before all else."""
_MUTABLE = frozenset({"displayName", "description", "public"})
_VERSION = "1"
_MODES = {"lora": "LORA_TRAINER", "reference": "FORWARD_ONLY"}
_SHAPE_FIELDS = ("name", "createTime", "latestValidated", "validated", "public", "baseModel")


def training_shape(base: BaseModel) -> str:
    """The name of the shape that a base model is trained on."""
    return f"{names.PUBLIC_ACCOUNT}/trainingShapes/ts-{names.last(base.name)}"


class Models:
    """`accounts`, `models`, `trainingShapes` and `deploymentShapes`."""

    def __init__(self, store: Store, weights: Weights, say: Callable[[str], None]) -> None:
        self._store = store
        self._weights = weights
        self._say = say

    @property
    def routes(self) -> RouteTable:
        models = "accounts/*/models"
        return (
            ("GET", "accounts", self.accounts),
            ("GET", "accounts/*", self.account),
            ("GET", models, self.list_models),
            ("POST", models, self.create),
            ("GET", f"{models}/*", self.get),
            ("PATCH", f"{models}/*", self.update),
            ("DELETE", f"{models}/*", self.delete),
            ("POST", "accounts/*/deploymentShapeVersions:match", self.match),
            *(
                route
                for kind in ("trainingShapes", "deploymentShapes")
                for route in (
                    ("GET", f"accounts/*/{kind}", self.shapes),
                    ("GET", f"accounts/*/{kind}/*", self.shape),
                    ("GET", f"accounts/*/{kind}/*/versions", self.versions),
                    ("GET", f"accounts/*/{kind}/*/versions/*", self.version),
                )
            ),
        )

    async def accounts(self, call: Call) -> dict[str, Any]:
        account = await self.account(call._replace(name=names.ACCOUNT))
        return {"accounts": [account], "nextPageToken": "", "totalSize": 1}

    async def account(self, call: Call) -> dict[str, Any]:
        return {"name": call.name, "displayName": call.name, "state": "READY"}

    async def list_models(self, call: Call) -> dict[str, Any]:
        if call.parent == names.PUBLIC_ACCOUNT:
            rows = [await self._base_row(base) for base in self._weights.models.values()]
        else:
            rows = self._store.list(KIND, f"{call.name}/")
        return resources.page(rows, call.query, KIND, fields.MODEL)

    async def create(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(
            call.body, {"modelId": str, "model": fields.MODEL, "cluster": str}, "the request"
        )
        raise ServiceError(
            f"model {body.get('modelId')}: this server takes no uploaded models; start it with "
            "--model FOLDER to serve one",
            code=Code.UNIMPLEMENTED,
        )

    async def get(self, call: Call) -> dict[str, Any]:
        if call.name.startswith(f"{PUBLIC}/"):
            return await self._base_row(self._weights.base(call.name))
        row = self.row(call.name)
        deployed = [
            {name: d[name] for name in ("name", "deployment", "state", "default") if name in d}
            for d in self._store.list("deployedModels")
            if d["model"] == call.name
        ]
        return {**resources.view(row), "deployedModelRefs": deployed}

    async def update(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.MODEL, "model")
        mask = fields.read_mask(call.query.get("updateMask", ""), fields.MODEL, "model")
        row = self.row(call.name)
        changes = {name: body.get(name) for name in mask} if mask else body
        for field, value in changes.items():
            if field not in _MUTABLE and value != row.get(field):
                raise ServiceError(f"{call.name}: {field} cannot be changed")
        row |= {**changes, "updateTime": names.now()}
        self._store.put(KIND, call.name, row)
        return resources.view(row)

    async def delete(self, call: Call) -> dict[str, Any]:
        row = self.row(call.name)
        if user := self._user(call.name):
            raise resources.wrong_state(f"{call.name} is in use by {user}: delete that first")
        self._store.delete(KIND, call.name)
        self._say(f"model {names.last(call.name)}: deleted")
        if not self._still_used(row["_weights"]):
            await asyncio.to_thread(self._weights.delete, row["_weights"])
        return {}

    def row(self, name: str) -> Resource:
        """A model of the account.

        Raises:
            ServiceError: there is none of that name.
        """
        row = self._store.get(KIND, name)
        if row is None:
            raise ServiceError.not_found(name)
        return row

    def find(self, name: str) -> Resource:
        """What is needed of any model, a base model or one of the account: `_weights`, `_base`,
        `kind`, and of an adapter `peftDetails`.

        Raises:
            ServiceError: there is none of that name.
        """
        if not name.startswith("accounts/"):
            raise ServiceError(f"{name!r} names no model: accounts/ACCOUNT/models/MODEL")
        if name.startswith(f"{names.ACCOUNT}/"):
            return self.row(name)
        base = self._weights.base(name)
        return {"name": name, "_weights": base.weights_id, "_base": base.name, "kind": BASE}

    async def made(
        self, name: str, *, weights: str, base: str, lora_rank: int, **more: Any
    ) -> Resource:
        """The row of a model that training made. Loads the base model, where it is not yet."""
        created = names.now()
        row: Resource = {
            "name": name, "state": "READY", "createTime": created, "updateTime": created,
            "kind": ADDON if lora_rank else BASE, "_weights": weights, "_base": base, **more,
        }  # fmt: skip
        if lora_rank:
            adapted = await asyncio.to_thread(self._adapted, base)
            row["peftDetails"] = {"baseModel": base, "r": lora_rank, "targetModules": adapted}
        else:
            row["baseModelDetails"] = {"moe": False, "tunable": True}
        return row

    def _adapted(self, base: str) -> list[str]:
        """Names of the layers that get an adapter: all linear ones but the output layer."""
        import torch

        module: Any = self._weights.base(base).module
        output = module.get_output_embeddings()
        return sorted(
            {
                name.rpartition(".")[2]
                for name, layer in module.named_modules()
                if isinstance(layer, torch.nn.Linear) and layer is not output
            }
        )

    async def _base_row(self, base: BaseModel) -> Resource:
        context = await asyncio.to_thread(lambda: base.context_length)
        return {
            "name": base.name, "displayName": names.last(base.name), "kind": BASE,
            "state": "READY", "createTime": _MADE, "updateTime": _MADE, "public": True,
            "contextLength": context, "trainingContextLength": context, "supportsLora": True,
            "tunable": True, "rlTunable": True, "supportsTools": True,
            "useHfApplyChatTemplate": True,
            # The tokenizer, for clients on this machine.
            "huggingFaceUrl": base.folder.absolute().as_uri(),
            "baseModelDetails": {"moe": False, "tunable": True, "checkpointFormat": "HUGGINGFACE"},
        }  # fmt: skip

    def _user(self, name: str) -> str | None:
        """What would miss the model."""
        for deployed in self._store.list("deployedModels"):
            if deployed["model"] == name:
                return str(deployed["name"])
        for deployment in self._store.list("deployments"):
            if deployment["baseModel"] == name and deployment["state"] != "DELETED":
                return str(deployment["name"])
        for job in self._store.list("rlorTrainerJobs"):
            config = job.get("trainingConfig", {})
            running = job["state"] in ("JOB_STATE_PENDING", "JOB_STATE_RUNNING")
            if running and name in (config.get("baseModel"), config.get("warmStartFrom")):
                return str(job["name"])
        return None

    def _still_used(self, weights: str) -> bool:
        """Whether another row names a set of weights."""
        kinds = ("models", "deployments", "rlorTrainerJobs")
        rows = [row for kind in kinds for row in self._store.list(kind)]
        saved = [row for kind in ("checkpoints", "snapshots") for row in self._store.list(kind)]
        return any(row.get("_weights") == weights for row in rows) or any(
            weights in (row.get("weights"), row.get("_weights")) for row in saved
        )

    # Shapes

    async def shapes(self, call: Call) -> dict[str, Any]:
        kind = names.last(call.name)
        prefix = "ts" if kind == "trainingShapes" else "ds"
        rows: list[Resource] = [
            {"name": f"{call.name}/{prefix}-{names.last(name)}{end}", "baseModel": name}
            for name in self._weights.models
            for end in (("", "-lora", "-reference") if prefix == "ts" else ("",))
        ]
        return resources.page(rows, call.query, kind, dict.fromkeys(_SHAPE_FIELDS, str))

    async def shape(self, call: Call) -> dict[str, Any]:
        version = await self.version(call)
        return {**version["snapshot"], "name": call.name, "createTime": _MADE}

    async def versions(self, call: Call) -> dict[str, Any]:
        one = await self.version(call._replace(name=f"{call.parent}/versions/{_VERSION}"))
        kind = "trainingShapeVersions" if "/trainingShapes/" in call.name else (
            "deploymentShapeVersions"
        )  # fmt: skip
        return resources.page([one], call.query, kind, dict.fromkeys(_SHAPE_FIELDS, str))

    async def match(self, call: Call) -> dict[str, Any]:
        """The shapes on which a deployment can be made: the one of its model."""
        asked = fields.read_fields(
            call.body,
            {"createDeploymentRequest": {"parent": str, "deployment": fields.DEPLOYMENT}},
            "the request",
        ).get("createDeploymentRequest", {})
        deployment = asked.get("deployment", {})
        model = self.find(fields.need(deployment, "baseModel", "deployment"))
        shape = f"{names.PUBLIC_ACCOUNT}/deploymentShapes/ds-{names.last(model['_base'])}"
        version = await self.version(call._replace(name=f"{shape}/versions/{_VERSION}"))
        return {"deploymentShapeVersions": [version], "nextPageToken": "", "totalSize": 1}

    async def version(self, call: Call) -> dict[str, Any]:
        shape = call.name.partition("/versions/")[0]
        base = self.base_of_shape(shape)
        context = await asyncio.to_thread(lambda: base.context_length)
        snapshot: dict[str, Any] = {"baseModel": base.name}
        if "/trainingShapes/" in shape:
            end = names.last(shape).rpartition("-")[2]
            account = shape.partition("/trainingShapes/")[0]
            served = f"{account}/deploymentShapes/ds-{names.last(base.name)}"
            snapshot |= {
                "maxSupportedContextLength": context, "nodeCount": 1,
                "trainerMode": _MODES.get(end, "POLICY_TRAINER"),
                "deploymentShapeVersion": f"{served}/versions/{_VERSION}",
            }  # fmt: skip
        else:
            snapshot |= {"maxContextLength": context, "enableAddons": True}
        return {
            "name": f"{shape}/versions/{_VERSION}", "createTime": _MADE, "validated": True,
            "latestValidated": True, "public": True, "snapshot": snapshot,
        }  # fmt: skip

    def base_of_shape(self, shape: str) -> BaseModel:
        """The base model that the id of a shape names.

        Raises:
            ServiceError: it names none.
        """
        key = names.last(shape.partition("/versions/")[0])
        found = [
            base
            for base in self._weights.models.values()
            if re.search(rf"(^|-){re.escape(names.last(base.name))}(-|$)", key)
        ]
        if not found:
            known = ", ".join(f"ts-{names.last(name)}" for name in self._weights.models)
            raise ServiceError.not_found(
                f"{shape}: a shape of this server has the name of a model in its own ({known}); it"
            )
        return max(found, key=lambda base: len(base.name))
