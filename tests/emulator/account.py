"""The resources of one account's control plane. What weights are is the trainer's business."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.emulator.weights import Serving

ACCOUNT = "accounts/acc"
BASE_MODEL = "accounts/fireworks/models/arithmetic"


class Refused(Exception):  # noqa: N818
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def name_of(kind: str, key: str) -> str:
    return f"{ACCOUNT}/{kind}/{key}"


@dataclass
class Account:
    """Things are made at once and said to be made later: each look takes them one state on.

    `train(weights, rows, body)` makes the weights of a job's model.
    """

    serving: Serving
    base_weights: Any
    train: Callable[[Any, list[dict[str, Any]], dict[str, Any]], Any]
    failing: dict[int, str] = field(default_factory=dict)
    """How many-th job -> the state in which it ends, with no model."""
    unseen: set[str] = field(default_factory=set)
    """Keys that are there, and that the next look does not find."""
    weights: dict[str, Any] = field(default_factory=dict)
    """By name of the model."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    deployments: dict[str, dict[str, Any]] = field(default_factory=dict)
    deployed: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: list[list[dict[str, Any]]] = field(default_factory=list)
    """The rows of every training that took place."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """An account in which nothing was made yet."""
        for things in (self.datasets, self.jobs, self.models, self.deployments, self.deployed):
            things.clear()
        for name in self.serving.names:
            self.serving.drop(name)
        self.trained.clear()
        self.failing.clear()
        self.unseen.clear()
        self.weights.clear()
        self.weights[BASE_MODEL] = self.base_weights

    # Data sets

    def create_dataset(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        wanted = {"userUploaded", "exampleCount", "format", "displayName"}
        if set(body["dataset"]) != wanted or body["dataset"]["format"] != "RL":
            raise Refused(400, f"a data set of {body['dataset']}")
        return self._create(self.datasets, "datasets", key, {**body["dataset"], "rows": None})

    def upload(self, key: str, data: bytes) -> dict[str, Any]:
        dataset = self._get(self.datasets, key)
        dataset["rows"] = [json.loads(line) for line in data.splitlines()]
        if str(len(dataset["rows"])) != dataset["exampleCount"]:
            raise Refused(400, f"{len(dataset['rows'])} rows, not {dataset['exampleCount']}")
        return {}

    def get_dataset(self, key: str) -> dict[str, Any]:
        dataset = self._get(self.datasets, key)
        answer = self._view(dataset, "UPLOADING", "READY", done=dataset["rows"] is not None)
        return {**answer, "rows": None}

    def delete_dataset(self, key: str) -> dict[str, Any]:
        self._get(self.datasets, key)
        del self.datasets[key]
        return {}

    # Jobs and models

    def create_job(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        if key not in self.jobs:
            dataset = self._get(self.datasets, body["dataset"].rpartition("/")[2])
            if dataset.get("state") != "READY":
                raise Refused(400, f"{body['dataset']} is not READY")
            config = body["trainingConfig"]
            if len({"baseModel", "warmStartFrom"} & set(config)) != 1:
                raise Refused(400, "one of baseModel and warmStartFrom")
            if body["rewardWeights"] != ["score=1.0"]:
                raise Refused(400, f"rewardWeights are {body['rewardWeights']}")
            body = {**body, "rows": dataset["rows"]}
        return {**self._create(self.jobs, "rlorTrainerJobs", key, body), "rows": None}

    def get_job(self, key: str) -> dict[str, Any]:
        job = self._get(self.jobs, key)
        if job["state"] == "RUNNING":
            self._finish(job)
        elif job["state"] == "CREATING":
            job["state"] = "RUNNING"
        return {**job, "state": f"JOB_STATE_{job['state']}", "rows": None}

    def _finish(self, job: dict[str, Any]) -> None:
        end = self.failing.get(list(self.jobs.values()).index(job))
        job["state"] = end or "COMPLETED"
        if end:
            job["status"] = {"code": "INTERNAL", "message": "out of memory on node 3"}
            return
        config = job["trainingConfig"]
        start = config.get("baseModel") or config["warmStartFrom"]
        self.trained.append(job["rows"])
        self.weights[config["outputModel"]] = self.train(self.weights[start], job["rows"], job)
        self._create(self.models, "models", config["outputModel"].rpartition("/")[2], {})

    def get_model(self, key: str) -> dict[str, Any]:
        return self._view(self._get(self.models, key), "UPLOADING", "READY")

    # Deployments

    def create_deployment(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        if not body.get("enableAddons"):
            raise Refused(400, "no adapters on this deployment")
        return self._create(self.deployments, "deployments", key, body)

    def get_deployment(self, key: str) -> dict[str, Any]:
        deployment = self._get(self.deployments, key)
        answer = self._view(deployment, "CREATING", "READY")
        if answer["state"] == "READY" and answer["name"] not in self.serving.names:
            base = deployment["baseModel"]
            self.serving.put(answer["name"], self.weights[base], version=base)
        return answer

    def load_adapter(self, body: dict[str, Any], *, replace: bool) -> dict[str, Any]:
        if not replace:
            raise Refused(400, "there is room for one adapter: replaceMergedAddon")
        if any(
            (d["model"], d["deployment"]) == (body["model"], body["deployment"])
            for d in self.deployed.values()
        ):
            raise Refused(400, f"{body['model']} is deployed already")
        for old in self.deployed.values():
            self.serving.drop(f"{old['model']}#{old['deployment']}")
        self.deployed.clear()
        key = f"adapter-{len(self.jobs)}"
        return self._create(self.deployed, "deployedModels", key, body, state="DEPLOYING")

    def get_adapter(self, key: str) -> dict[str, Any]:
        found = self._get(self.deployed, key)
        answer = self._view(found, "DEPLOYING", "DEPLOYED")
        if answer["state"] == "DEPLOYED":
            name = f"{found['model']}#{found['deployment']}"
            self.serving.put(name, self.weights[found["model"]], version=found["model"])
        return answer

    # All of them

    def _create(
        self,
        kind: dict[str, dict[str, Any]],
        plural: str,
        key: str,
        body: dict[str, Any],
        state: str = "CREATING",
    ) -> dict[str, Any]:
        if key in kind:
            raise Refused(409, f"{name_of(plural, key)} exists already")
        kind[key] = {**body, "name": name_of(plural, key), "state": state, "looks": 0}
        return kind[key]

    def _get(self, kind: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
        if key not in kind or key in self.unseen:
            self.unseen.discard(key)
            raise Refused(404, f"{key} not found")
        return kind[key]

    def _view(
        self, thing: dict[str, Any], before: str, after: str, *, done: bool = True
    ) -> dict[str, Any]:
        """Not ready at the first look, ready from the second on."""
        thing["looks"] += done
        thing["state"] = after if thing["looks"] > 1 else before
        return thing
