"""The local Fireworks, as tests start it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop.service._app import FireworksService
from eval_protocol_rft.loop.service._weights import BaseModel
from tests.serving import running

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


@contextlib.contextmanager
def fireworks_service(folder: Path) -> Iterator[RunningService]:
    """In a thread of this process, with its state in `folder`."""
    lines: list[str] = []
    service = FireworksService(folder, [arithmetic_base()], say=lines.append)
    with running(service.app) as url:
        yield RunningService(url, service, lines)
