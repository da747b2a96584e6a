"""Trainer jobs: those in service mode, which clients train through, and fine-tuning steps, which
train by themselves; and the promotion of what they saved.

Invariant: a job has one name for ever. A deleted one stays as `JOB_STATE_DELETED`, as long as its
checkpoints can be promoted, and no other takes its name. A job in service mode is RUNNING in the
answer that makes it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import Weights
from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control import _models as models
from eval_protocol_rft.loop.service.control import _resources as resources
from eval_protocol_rft.loop.service.control._models import Models
from eval_protocol_rft.loop.service.control._resources import Call, RouteTable

KIND = "rlorTrainerJobs"
RUNNING, PENDING, COMPLETED = "JOB_STATE_RUNNING", "JOB_STATE_PENDING", "JOB_STATE_COMPLETED"
CANCELLED, DELETED = "JOB_STATE_CANCELLED", "JOB_STATE_DELETED"
_RESUMABLE = ("JOB_STATE_FAILED", CANCELLED, "JOB_STATE_PAUSED")
_OUTPUT = frozenset(
    {"name", "createTime", "updateTime", "createdBy", "state", "status", "completedTime",
     "jobProgress"}
)  # fmt: skip
METHODS = ("METHOD_UNSPECIFIED", "GRPO", "DAPO", "GSPO_TOKEN")
_NOT_NEGATIVE = (
    "epochs", "batchSize", "batchSizeSamples", "maxContextLength", "gradientAccumulationSteps",
    "learningRate", "learningRateWarmupSteps", "optimizerWeightDecay",
)  # fmt: skip
"""Of a step; 0 is what nobody gave."""
_CHECKPOINT_FIELDS = ("name", "createTime", "updateTime", "checkpointType", "promotable")


class Steps(Protocol):
    """Who carries out fine-tuning steps."""

    def start(self, name: str) -> None:
        """Begin the job of that name, which is PENDING."""
        ...

    def stop(self, name: str) -> None:
        """Give it up, where it is under way."""
        ...


class Jobs:
    """`rlorTrainerJobs`, their checkpoints, and promotion."""

    def __init__(
        self,
        store: Store,
        weights: Weights,
        catalogue: Models,
        steps: Steps,
        drop_job: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._weights = weights
        self._models = catalogue
        self._steps = steps
        self._drop_job = drop_job
        self._say = say

    @property
    def routes(self) -> RouteTable:
        one = f"accounts/*/{KIND}/*"
        return (
            ("GET", f"accounts/*/{KIND}", self.list_jobs),
            ("POST", f"accounts/*/{KIND}", self.create),
            ("GET", one, self.get),
            ("DELETE", one, self.delete),
            ("POST", f"{one}:resume", self.resume),
            ("POST", f"{one}:cancel", self.cancel),
            ("POST", f"{one}:executeTrainStep", self.execute),
            ("GET", f"{one}/checkpoints", self.checkpoints),
            ("POST", f"{one}/checkpoints/*:promote", self.promote),
            ("POST", "accounts/*/checkpoints/*:promote", self.promote),
        )

    async def list_jobs(self, call: Call) -> dict[str, Any]:
        rows = [row for row in self._store.list(KIND, f"{call.name}/") if row["state"] != DELETED]
        return resources.page(rows, call.query, KIND, fields.JOB)

    async def get(self, call: Call) -> dict[str, Any]:
        return resources.view(self._row(call.name))

    async def create(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.JOB, "rlorTrainerJob")
        serves = body.get("serviceMode", False)
        made_up = f"{'training-api-service' if serves else 'rlor'}-{secrets.token_hex(4)}"
        key = resources.check_id(
            call.query.get("rlorTrainerJobId") or names.last(body.get("name", "")) or made_up,
            "rlorTrainerJobId",
        )
        name = f"{call.name}/{key}"
        job = {k: v for k, v in body.items() if k not in _OUTPUT}
        job.get("wandbConfig", {}).pop("apiKey", None)  # a secret, and nobody here needs it
        config = job.setdefault("trainingConfig", {})
        if config.get("loraRank", 0) < 0:
            raise ServiceError(f"trainingConfig.loraRank is {config['loraRank']}: at least 0")
        if serves and "maxContextLength" not in config:
            base = self._weights.base(self._service_job(call, config)["_base"])
            config["maxContextLength"] = await asyncio.to_thread(lambda: base.context_length)
        # From here on nothing else happens: the model that is found is there when it is on record.
        job |= self._service_job(call, config) if serves else self._step(job, config, key)
        if self._store.get(KIND, name) is not None:
            raise resources.exists(name)
        job |= {"name": name, "createTime": names.now(), "updateTime": names.now()}
        self._store.put(KIND, name, job)
        trained = names.last(config.get("baseModel") or config["warmStartFrom"])
        rank = config.get("loraRank")
        how = f"LoRA of rank {rank}" if rank else "all parameters"
        if serves and job.get("forwardOnly"):
            how = "forward only"
        self._say(
            f"job {key}: {job['state'].removeprefix('JOB_STATE_')}, {trained}, {how}"
            + ("" if serves else f", on {names.last(job['dataset'])}")
        )
        if not serves:
            self._steps.start(name)
        return resources.view(job)

    async def delete(self, call: Call) -> dict[str, Any]:
        row = self._row(call.name)
        if row["state"] == DELETED:
            return {}
        for deployment in self._store.list("deployments"):
            if (
                deployment.get("hotLoadTrainerJob") == call.name
                and deployment["state"] != "DELETED"
            ):
                self._say(
                    f"job {names.last(call.name)}: deleted, and deployment "
                    f"{names.last(deployment['name'])} gets no further snapshots"
                )
                break
        else:
            self._say(f"job {names.last(call.name)}: deleted")
        self._put(row, DELETED)
        if row.get("serviceMode"):
            self._drop_job(names.last(call.name))
        else:
            self._steps.stop(call.name)
        return {}

    async def cancel(self, call: Call) -> dict[str, Any]:
        fields.read_fields(call.body, {"name": str}, "the request")
        row = self._row(call.name)
        if row["state"] not in (PENDING, RUNNING):
            raise resources.wrong_state(
                f"{call.name} is {row['state']}: there is no more to cancel"
            )
        self._put(row, CANCELLED)
        self._steps.stop(call.name)
        self._say(f"job {names.last(call.name)}: CANCELLED")
        return {}

    async def resume(self, call: Call) -> dict[str, Any]:
        fields.read_fields(call.body, {"name": str}, "the request")
        row = self._row(call.name)
        serves = row.get("serviceMode", False)
        if row["state"] not in (*_RESUMABLE, *((COMPLETED,) if serves else ())):
            raise resources.wrong_state(f"{call.name} is {row['state']}: it cannot be resumed")
        row.pop("status", None)
        row.pop("completedTime", None)
        if not serves:
            row |= self._step(row, row["trainingConfig"], names.last(call.name))
        self._put(row, RUNNING if serves else PENDING)
        self._say(f"job {names.last(call.name)}: {row['state'].removeprefix('JOB_STATE_')} again")
        if not serves:
            self._steps.start(call.name)
        return resources.view(row)

    async def execute(self, call: Call) -> dict[str, Any]:
        self._row(call.name)
        raise ServiceError(
            f"{call.name}: this server has no keep-alive jobs: make a job for every step",
            code=Code.UNIMPLEMENTED,
        )

    # What was saved

    async def checkpoints(self, call: Call) -> dict[str, Any]:
        rows = [
            {k: v for k, v in row.items() if k != "weights"}
            for row in self._store.list("checkpoints", f"{call.name}/")
        ]
        if not rows:
            self._row(call.parent)
        allowed = dict.fromkeys(_CHECKPOINT_FIELDS, str)
        return resources.page(rows, call.query, "checkpoints", allowed)

    async def promote(self, call: Call) -> dict[str, Any]:
        body = fields.read_fields(call.body, fields.PROMOTION, "the request")
        output = _output(fields.need(body, "outputModel", "the request"), "output_model")
        name = call.name
        if f"/{KIND}/" not in name:
            trainer = names.full_name(fields.need(body, "trainerJobId", "the request"), KIND)
            name = f"{trainer}/checkpoints/{names.last(call.name)}"
        rows = (name, names.state_row(name))
        checkpoint = next(filter(None, (self._store.get("checkpoints", row) for row in rows)), None)
        if checkpoint is None:
            raise ServiceError.not_found(name)
        kind = checkpoint["checkpointType"]
        if not checkpoint.get("promotable"):
            raise resources.wrong_state(
                f"{name} is a {kind}, which cannot be promoted: save weights for the sampler "
                "(save_weights_for_sampler) and promote those"
            )
        base = checkpoint["_base"]
        if body.get("baseModel") and self._models.find(body["baseModel"])["_base"] != base:
            raise ServiceError(f"{name} is of {base}, not {body['baseModel']}")
        row = await self._models.made(
            output,
            weights=checkpoint["weights"],
            base=base,
            lora_rank=checkpoint["_rank"] if kind.endswith("_LORA") else 0,
            _checkpoint=name,
        )
        there = self._store.get("models", output)
        if there is not None:
            if there.get("_checkpoint") != name:
                raise resources.exists(output)
            return {"model": resources.view(there)}  # asked again, the answer was lost
        self._store.put("models", output, row)
        self._say(f"model {names.last(output)}: READY, {names.last(name)} promoted")
        return {"model": resources.view(row)}

    # What a job is made of

    def _service_job(self, call: Call, config: dict[str, Any]) -> Resource:
        model = self._models.find(fields.need(config, "baseModel", "trainingConfig"))
        if shape := call.query.get("trainingShape"):
            base = self._models.base_of_shape(shape)
            if base.name != model["_base"]:
                raise ServiceError(
                    f"trainingShape {shape} is of {base.name}, and trainingConfig.baseModel is "
                    f"{model['name']}"
                )
        return {"state": RUNNING, "_base": model["_base"], "_weights": model["_weights"]}

    def _step(self, job: Resource, config: dict[str, Any], key: str) -> Resource:
        """Check what a fine-tuning step is asked for, and complete it."""
        if job.get("keepAlive"):
            raise ServiceError(
                "keepAlive: this server has no keep-alive jobs", code=Code.UNIMPLEMENTED
            )
        dataset = names.full_name(fields.need(job, "dataset", "rlorTrainerJob"), "datasets")
        self._check_dataset(dataset)
        given = [name for name in ("baseModel", "warmStartFrom") if config.get(name)]
        if len(given) != 1:
            raise ServiceError(
                "trainingConfig needs one of baseModel and warmStartFrom, and has "
                f"{' and '.join(given) or 'none'}"
            )
        start = self._models.find(config[given[0]])
        rank = config.get("loraRank") or start.get("peftDetails", {}).get("r", 0)
        self._check_start(start, rank, warm=given == ["warmStartFrom"])
        fields.one_of(
            job.get("lossConfig", {}).get("method", METHODS[0]), METHODS, "lossConfig.method"
        )
        if job.get("lossConfig", {}).get("klBeta", 0.0) < 0:
            raise ServiceError("lossConfig.klBeta must be at least 0")
        for field in _NOT_NEGATIVE:
            if config.get(field, 0) < 0:
                raise ServiceError(f"trainingConfig.{field} is {config[field]}: at least 0")
        read_weights(job.get("rewardWeights", []))
        output = _output(config.get("outputModel") or key, "trainingConfig.outputModel")
        if self._store.get("models", output) is not None:
            raise resources.exists(output)
        for other in self._store.list(KIND):
            under_way = other["state"] in (PENDING, RUNNING)
            if under_way and other["trainingConfig"].get("outputModel") == output:
                raise resources.exists(f"{output} is in the making by {other['name']}: it")
        config |= {"outputModel": output, "loraRank": rank}
        return {
            "dataset": dataset, "state": PENDING, "_base": start["_base"],
            "_weights": start["_weights"],
        }  # fmt: skip

    def _check_dataset(self, name: str) -> None:
        row = self._store.get("datasets", name)
        if row is None:
            raise ServiceError.not_found(name)
        if row["state"] != "READY":
            raise resources.wrong_state(f"{name} is {row['state']}: upload and validate it first")
        if row["format"] != "RL":
            raise ServiceError(
                f"{name} is of format {row['format']}, and a reinforcement step trains on RL rows: "
                '{"samples": [{"messages": [...], "evals": {...}}]}'
            )

    def _check_start(self, start: Resource, rank: int, *, warm: bool) -> None:
        if warm and start["kind"] != models.ADDON:
            raise ServiceError(
                f"warmStartFrom {start['name']} is a {start['kind']}, no adapter: name it as "
                "baseModel"
            )
        own = start.get("peftDetails", {}).get("r")
        if own not in (None, rank):
            raise ServiceError(
                f"trainingConfig.loraRank is {rank}, and the adapter {start['name']} has rank {own}"
            )

    def _row(self, name: str) -> Resource:
        row = self._store.get(KIND, name)
        if row is None:
            raise ServiceError.not_found(name)
        return row

    def _put(self, row: Resource, state: str) -> None:
        row |= {"state": state, "updateTime": names.now()}
        self._store.put(KIND, row["name"], row)


def _output(given: str, what: str) -> str:
    """The whole name of a model that is to be made.

    Raises:
        ServiceError: it is none of this account's.
    """
    output = names.full_name(given, "models")
    if output != names.full_name(names.last(output), "models"):
        raise ServiceError(f"{what} is {given!r}: it must be a model of {names.ACCOUNT}")
    resources.check_id(names.last(output), what)
    return output


def read_weights(reward_weights: list[Any]) -> dict[str, float]:
    """`["score=1.0"]` as weights by name; empty where nobody gave any.

    Raises:
        ServiceError: an entry is no `<name>=<weight>`.
    """
    weights: dict[str, float] = {}
    for entry in reward_weights:
        name, equals, number = str(entry).partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise ServiceError(f"rewardWeights has {entry!r}: it must be <reward name>=<weight>")
    return weights
