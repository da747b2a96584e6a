"""New weights into a running deployment: `/hot_load/v1/models/hot_load`.

Invariant: when the request is answered, the deployment serves the snapshot, and will after a
restart. A snapshot is one of the trainer job that the deployment belongs to, and a delta goes on
top of no other snapshot than the one it was made from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import ServiceError
from eval_protocol_rft.loop.service._store import Resource, Store

_PATH = "/hot_load/v1/models/hot_load"
_FIELDS = ("identity", "reset_prompt_cache", "incremental_snapshot_metadata")
_DELTA_FIELDS = ("previous_snapshot_identity", "compression_format", "checksum_format")


class Served(Protocol):
    """What is done to the models that are served."""

    async def load(self, deployment: str, weights: str, *, version: str | None) -> None:
        """Go on with a set of weights, between two tokens, under the name of a snapshot; on disk
        when this returns (`_weights`, `_version`)."""
        ...

    def drop(self, name: str) -> None:
        """Free what a deployment or an adapter has in memory; it is gone."""
        ...


class _RefusalError(EvalProtocolRftError):
    """An answer in inference's form of errors."""

    def __init__(self, message: str, *, status: int = 400, code: str = "INVALID") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HotLoads:
    """The endpoint, GET and POST."""

    def __init__(self, store: Store, served: Served, *, say: Callable[[str], None]) -> None:
        self._store = store
        self._served = served
        self._say = say
        self._loading = asyncio.Lock()
        """What a row says last is what is loaded last."""

    def routes(self) -> list[Route]:
        return [Route(_PATH, self._answer, methods=["GET", "POST"])]

    async def _answer(self, http: Request) -> Response:
        try:
            if http.method == "GET":
                return JSONResponse(_status(self._deployment(http.headers)))
            body = _read(await http.body())
            async with self._loading:
                await self._load(self._deployment(http.headers), body)
        except _RefusalError as refusal:
            error = {
                "object": "error", "type": "invalid_request_error", "code": refusal.code,
                "message": str(refusal),
            }  # fmt: skip
            return JSONResponse({"error": error}, status_code=refusal.status)
        return JSONResponse({})

    def _deployment(self, headers: Mapping[str, str]) -> Resource:
        name = headers.get("fireworks-deployment", "")
        if not name:
            raise _RefusalError("the header fireworks-deployment names no deployment")
        row = self._store.get("deployments", names.full_name(name, "deployments"))
        if row is None or row["state"] == "DELETED":
            raise _RefusalError(f"{name} not found", status=404, code="NOT_FOUND")
        if not (row.get("enableHotLoad") or row.get("hotLoadTrainerJob")):
            raise _RefusalError(f"{name} takes no snapshots: make it with enableHotLoad=true")
        model = headers.get("fireworks-model", "")
        served = (row["baseModel"], row["baseModel"].removesuffix("-fp8"), row["name"])
        if model and model.removesuffix("-fp8") not in (*served, *map(names.last, served)):
            raise _RefusalError(f"{name} serves {row['baseModel']}, not {model}")
        return row

    async def _load(self, deployment: Resource, body: Mapping[str, Any]) -> None:
        name, identity = deployment["name"], body["identity"]
        snapshot = self._snapshot(deployment, identity)
        self._check_previous(deployment, snapshot, body.get("incremental_snapshot_metadata"))
        try:
            await self._served.load(name, snapshot["weights"], version=identity)
        except ServiceError as error:
            raise _RefusalError(str(error), status=error.status) from error
        self._say(f"deployment {names.last(name)}: serves snapshot {identity}")

    def _snapshot(self, deployment: Resource, identity: str) -> Resource:
        """A snapshot of one of the trainers whose bucket the deployment reads."""
        jobs = [deployment.get("hotLoadTrainerJob")] + [
            job["name"]
            for job in self._store.list("rlorTrainerJobs")
            if names.full_name(job.get("hotLoadDeploymentId") or "-", "deployments")
            == deployment["name"]
        ]
        for job in filter(None, jobs):
            snapshot = self._store.get("snapshots", f"{job}/snapshots/{identity}")
            if snapshot is not None:
                return snapshot
        where = " or ".join(filter(None, jobs)) or "any trainer: it belongs to none"
        raise _RefusalError(
            f"there is no snapshot {identity!r} of {where}", status=404, code="NOT_FOUND"
        )

    def _check_previous(
        self, deployment: Resource, snapshot: Resource, delta: Mapping[str, Any] | None
    ) -> None:
        identity, held = snapshot["identity"], deployment.get("_version")
        if held == identity:
            return  # asked again, its answer was lost
        if (snapshot["checkpointType"] == "delta") != (delta is not None):
            wanted = "must" if delta is None else "must not"
            raise _RefusalError(
                f"snapshot {identity} is a {snapshot['checkpointType']}, and its request {wanted} "
                "have incremental_snapshot_metadata"
            )
        if delta is None:
            return
        previous = delta["previous_snapshot_identity"]
        if previous != held or snapshot.get("previous") not in (None, previous):
            raise _RefusalError(
                f"snapshot {identity} is a delta to {snapshot.get('previous') or previous}, the "
                f"request says to {previous}, and the deployment holds {held or 'none'}: load a "
                "base snapshot first"
            )


def _read(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _RefusalError("the body is no JSON") from None
    _check_object(body, _FIELDS, "")
    if not isinstance(body.get("identity"), str) or not body["identity"]:
        raise _RefusalError("identity must be text, not empty, field: 'identity'")
    delta = body.get("incremental_snapshot_metadata")
    if delta is not None:
        _check_object(delta, _DELTA_FIELDS, "incremental_snapshot_metadata.")
        if not isinstance(delta.get("previous_snapshot_identity"), str):
            raise _RefusalError(
                "a delta needs field: 'incremental_snapshot_metadata.previous_snapshot_identity'"
            )
    return dict(body)


def _check_object(value: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise _RefusalError(f"{where.rstrip('.') or 'the body'} must be an object")
    for name in value:
        if name not in names:
            raise _RefusalError(f"Extra inputs are not permitted, field: '{where}{name}'")


def _status(deployment: Resource) -> dict[str, Any]:
    """What every replica says; there is one, and it is never in between."""
    identity = deployment.get("_version")
    stage: dict[str, Any] = {"stage": "done", "target_snapshot_identity": identity}
    return {
        "replicas": [
            {
                "current_snapshot_identity": identity,
                "readiness": True,
                "loading_state": stage,
                "loaded_adapters": [{"identity": identity, "status": "loaded"}] if identity else [],
            }
        ]
    }
