"""What the tests of the ray engine have done on its nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any


class Where:
    """Says where it is."""

    def ready(self) -> None:
        pass

    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


class Unable(Where):
    def ready(self) -> None:
        raise RuntimeError("no such model here")


class Dying(Where):
    def ready(self) -> None:
        os._exit(1)


async def pid_later(row: Any) -> float:
    await asyncio.sleep(0.01)
    return float(os.getpid())


def bomb_or_length(row: Any) -> float:
    """The length of the completion; a bomb ends the process that started the grading worker."""
    text = row.messages[-1].content
    if text == "bomb":
        # The worker's parent is its supervisor, and that one's the fork server.
        os.kill(_parent(_parent(os.getppid())), signal.SIGKILL)
        time.sleep(600)
    return float(len(text))


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
