"""What trainer jobs leave on disk: snapshots to sample from, and states to go on training from.

Invariant: a row of the store names files that are there, whole. A state is loaded into a model of
its own kind, or not at all. Rows: `snapshots` for hot loads, `checkpoints` as the control plane
lists them; their names begin with the job's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._names import ACCOUNT, now, state_row
from eval_protocol_rft.loop.service._store import Resource, Store
from eval_protocol_rft.loop.service._weights import Weights

if TYPE_CHECKING:
    from eval_protocol_rft.loop.service.training._model_in_training import ModelInTraining

JOBS = "rlorTrainerJobs"
CROSS_JOB = "cross_job://"
"""Begins the path of another job's state: `cross_job://JOB/NAME`."""
TRAINING_STATE = "CHECKPOINT_TYPE_TRAINING"
_DELTAS = 3
"""Delta snapshots of a job that stay on disk, beside those that something serves."""
_USERS = ("deployments", "deployedModels", "models", JOBS, "checkpoints")
"""Kinds whose rows name a set of weights, beside `snapshots`."""

Made = Sequence[tuple[str, str, Resource]]
"""Rows to put into the store: kind, name, value."""


def job_name(job: str) -> str:
    return f"{ACCOUNT}/{JOBS}/{job}"


def checkpoint_name(job: str, checkpoint: str) -> str:
    return f"{job_name(job)}/checkpoints/{checkpoint}"


def snapshot_name(job: str, identity: str) -> str:
    return f"{job_name(job)}/snapshots/{identity}"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose checkpoints they are."""

    job: str
    base: str
    """Name of the base model."""
    rank: int
    """Of its LoRA adapters; 0: all parameters are trained."""


class Checkpoints:
    """Of all jobs. Saving and loading block: for the thread of training."""

    def __init__(self, store: Store, weights: Weights) -> None:
        self._store = store
        self._weights = weights
        self._folder = store.folder / "training"
        self._folder.mkdir(exist_ok=True)
        for unfinished in self._folder.glob("*.part"):
            unfinished.unlink()
        weights.delete_all_but(self._in_use((*_USERS, "snapshots")))

    def save_snapshot(
        self,
        owner: Owner,
        trained: ModelInTraining,
        identity: str,
        kind: Literal["base", "delta", "merged_base"],
    ) -> Made:
        """Weights to sample from. A delta is for hot loads alone; others can be promoted."""
        weights = self._weights.save(trained.weights(), base=owner.base)
        created = {"createTime": now(), "weights": weights, "_rank": owner.rank}
        of_sampler = "delta" if kind == "delta" else "base"
        row = {"identity": identity, "checkpointType": of_sampler, **created}
        made = [("snapshots", snapshot_name(owner.job, identity), row)]
        if kind != "delta":
            name = checkpoint_name(owner.job, identity)
            is_adapter = owner.rank > 0 and kind == "base"
            listed = {
                "name": name,
                "checkpointType": "CHECKPOINT_TYPE_INFERENCE_" + ("LORA" if is_adapter else "BASE"),
                "promotable": True,
                "_base": owner.base,
                **created,
            }
            made.append(("checkpoints", name, listed))
        return made

    def save_state(self, owner: Owner, trained: ModelInTraining, checkpoint: str) -> Made:
        """All that training goes on from."""
        name = checkpoint_name(owner.job, checkpoint)
        trained.save(self._state_path(owner.job, checkpoint))
        row = {
            "name": name,
            "createTime": now(),
            "checkpointType": TRAINING_STATE,
            "promotable": False,
            "_base": owner.base,
            "_rank": owner.rank,
        }
        return [("checkpoints", state_row(name), row)]

    def load_state(
        self, owner: Owner, trained: ModelInTraining, path: str, *, optimizer: bool
    ) -> None:
        """Take over a state of this job, or of another one (`cross_job://JOB/NAME`).

        Raises:
            ServiceError: there is none, or it is of another model.
        """
        job, checkpoint = owner.job, path
        if path.startswith(CROSS_JOB):
            job, _, checkpoint = path.removeprefix(CROSS_JOB).partition("/")
        file = self._state_path(job, checkpoint.rpartition("/")[2])
        if not file.exists():
            raise ServiceError.not_found(f"a state of training {path!r}")
        trained.load(file, optimizer=optimizer)

    def states(self, job: str) -> list[str]:
        """Names that `load_state` takes."""
        rows = self._store.list("checkpoints", checkpoint_name(job, ""))
        return [
            row["name"].rpartition("/")[2]
            for row in rows
            if row["checkpointType"] == TRAINING_STATE
        ]

    def running_state_path(self, model: str) -> Path:
        """Where a model in training is kept between restarts."""
        return self._folder / f"{_as_file(model)}.pt"

    def _state_path(self, job: str, checkpoint: str) -> Path:
        return self._folder / f"{_as_file(job)}.{_as_file(checkpoint)}.state.pt"

    def free_deltas(self, job: str) -> None:
        """Delete deltas that newer ones replaced and nothing serves: one comes with every step."""
        rows = self._store.list("snapshots", snapshot_name(job, ""))
        old = [row for row in rows if row["checkpointType"] == "delta"][:-_DELTAS]
        used = self._in_use() if old else set()
        for row in old:
            if row["weights"] in used:
                continue
            self._store.delete("snapshots", snapshot_name(job, row["identity"]))
            # Nobody finds it any more; who found it before has it on record by now, or will not.
            with self._store.change():
                if row["weights"] not in self._in_use():
                    self._weights.delete(row["weights"])

    def _in_use(self, kinds: Sequence[str] = _USERS) -> set[str]:
        rows = [row for kind in kinds for row in self._store.list(kind)]
        return {row[key] for row in rows for key in ("weights", "_weights") if row.get(key)}


def _as_file(name: str) -> str:
    """A file's name of its own for every name: readable, and short enough for any disk."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
