"""The local Fireworks, as tests start it."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop.service._app import FireworksService
from eval_protocol_rft.loop.service._weights import BaseModel
from tests.programs import Program, Zygote
from tests.serving import running
from tests.waiting import PATIENCE

BASE = "accounts/fireworks/models/arithmetic"
KEY = "fw-local-key"


@functools.cache
def arithmetic_base() -> BaseModel:
    """Of the whole test run: loading takes longer than a test."""
    folder = bundled_model_path("arithmetic")
    assert folder is not None
    return BaseModel("arithmetic", folder)


@dataclass
class RunningService:
    url: str
    service: FireworksService
    lines: list[str]
    """What it said."""

    def forget(self) -> None:
        """An account in which nothing was made yet."""
        for kind in ("datasets", "rlorTrainerJobs", "models", "deployments", "deployedModels"):
            for name in self.service.store.names(kind):
                self.service.store.delete(kind, name)
        self.lines.clear()


@contextlib.contextmanager
def fireworks_service(
    folder: Path, *, grpc: bool = False, around: Callable[[ASGIApp], ASGIApp] | None = None
) -> Iterator[RunningService]:
    """In a thread of this process, with its state in `folder`; `around` is a middleware."""
    lines: list[str] = []
    grpc_at = ("127.0.0.1", 0) if grpc else None
    service = FireworksService(folder, [arithmetic_base()], say=lines.append, grpc_at=grpc_at)
    if around is not None:
        service.app.add_middleware(around)  # type: ignore[arg-type]
    with running(service.app) as url:
        service.control.url = url
        yield RunningService(url, service, lines)


class ServiceProcess:
    """In a process of its own, which can be killed and started again at the same address."""

    def __init__(self, zygote: Zygote, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.programs: list[Program] = []
        """Each start."""
        self._zygote = zygote
        self._options = ("--port", str(port), "--state", str(folder), *options)

    def start(self) -> None:
        """Returns when it can be asked."""
        program = self._zygote.start("serve", "--fireworks", *self._options)
        self.programs.append(program)
        assert program.line().startswith("Fireworks on this machine"), program.said

    def kill(self) -> None:
        """As a power cut would, but for the disk."""
        self.programs[-1].kill()

    def killed_during(
        self, thread: threading.Thread, *, most: int, between: tuple[float, float], seed: int
    ) -> int:
        """Start it and `thread`, and kill it again and again while that runs; returns how often."""
        self.start()
        thread.start()
        rng = random.Random(seed)
        kills = 0
        while thread.is_alive() and kills < most:
            thread.join(rng.uniform(*between))
            self.kill()
            self.start()
            kills += 1
        thread.join(PATIENCE)
        self.kill()
        return kills

    @property
    def said(self) -> str:
        return "".join(program.said for program in self.programs)

    def __enter__(self) -> ServiceProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
