"""The local Fireworks with what can go wrong around it: answers that are late, lost or missing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from eval_protocol_rft.loop.service._app import FireworksService
from tests.service import RunningService, arithmetic_base
from tests.serving import running

ACCOUNT = "accounts/acc"


@dataclass
class Faults:
    """What the next requests meet, and what was asked."""

    unseen: set[str] = field(default_factory=set)
    """Paths that the next look does not find."""
    held: threading.Event = field(default_factory=threading.Event)
    """Completions that are asked for meanwhile never end."""
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each completion that has begun to wait."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request to the control plane."""


class FaultyApp:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app, self._faults = app, faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, faults = scope["path"], self._faults
        if path.startswith("/v1/accounts/"):
            faults.log.append((scope["method"], path))
        if path in faults.unseen:
            faults.unseen.discard(path)
            gone = {"code": 5, "message": f"{path} not found", "details": []}
            await JSONResponse(gone, status_code=404)(scope, receive, send)
        elif path.endswith("/completions") and faults.held.is_set():
            faults.waiting.release()
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            await self._app(scope, receive, send)


@dataclass
class FaultyService(RunningService):
    """A running service, its state, and its faults."""

    faults: Faults

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return self.service.store.list(kind)

    def ids(self, kind: str) -> list[str]:
        return [row["name"].rpartition("/")[2] for row in self.rows(kind)]

    def change(self, kind: str, key: str, **values: Any) -> None:
        """As if the service had changed a resource by itself, or somebody else had made it."""
        name = f"{ACCOUNT}/{kind}/{key}"
        row = self.service.store.get(kind, name) or {"name": name}
        self.service.store.put(kind, name, {**row, **values})

    def forget(self) -> None:
        super().forget()
        self.faults.log.clear()
        self.faults.unseen.clear()


@contextlib.contextmanager
def faulty_service(folder: Path) -> Iterator[FaultyService]:
    faults = Faults()
    lines: list[str] = []
    service = FireworksService(folder, [arithmetic_base()], say=lines.append)
    service.app.add_middleware(FaultyApp, faults=faults)
    with running(service.app) as url:
        yield FaultyService(url, service, lines, faults)
