"""A deployment of several replicas that takes snapshots, one replica after the other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.emulator.training_api import TrainingApi
from tests.emulator.weights import Serving


@dataclass
class HotLoads:
    """`hot_load/v1/models/hot_load`. New weights are served once the last replica holds them."""

    training: TrainingApi
    serving: Serving
    lags: tuple[int, ...] = (0,)
    """Per replica: how many looks go by until it holds a snapshot."""
    failing: bool = False
    """The next snapshot fails on the last replica."""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers and body of each."""
    held: list[str | None] = field(default_factory=list)
    """Per replica."""
    _target: tuple[str, str] | None = None
    """Deployment and identity of what is being loaded."""
    _looks: int = 0

    def routes(self) -> list[Route]:
        path = "/hot_load/v1/models/hot_load"
        return [
            Route(path, self._load, methods=["POST"]),
            Route(path, self._status, methods=["GET"]),
        ]

    async def _load(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.requests.append((dict(request.headers), body))
        self.held = self.held or [None] * len(self.lags)
        identity, delta = body["identity"], body.get("incremental_snapshot_metadata")
        kind, _ = self.training.snapshots[identity]
        if (kind == "delta") != (delta is not None):
            return _refusal(f"{identity} is a {kind} and its metadata {delta}")
        if delta and {delta["previous_snapshot_identity"]} != set(self.held):
            return _refusal(f"the deployment holds {self.held}")
        self._target, self._looks = (request.headers["fireworks-deployment"], identity), 0
        return JSONResponse({})

    async def _status(self, request: Request) -> Response:
        if self._target is None:
            return JSONResponse({"replicas": []})
        deployment, identity = self._target
        replicas = []
        for i, lag in enumerate(self.lags):
            stage = "done" if self._looks >= lag else "loading"
            if self.failing and i == len(self.lags) - 1:
                stage = "error"
            if stage == "done":
                self.held[i] = identity
            replicas.append(
                {
                    "current_snapshot_identity": self.held[i],
                    "readiness": stage != "loading",
                    "loading_state": {"stage": stage, "target_snapshot_identity": identity},
                }
            )
        self._looks += 1
        if set(self.held) == {identity}:
            _, module = self.training.snapshots[identity]
            self.serving.put(deployment, module, version=identity)
        return JSONResponse({"replicas": replicas})


def _refusal(message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=400)
