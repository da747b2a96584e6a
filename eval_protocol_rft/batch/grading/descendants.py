"""Ending whatever a process started, wherever it went.

Invariant: after `end_descendants` this process has no child but those it spares. On Linux orphans
come to the nearest subreaper, so a child that left its session, or whose parents ended, is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans. Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Die when the parent does, however that ends. Linux only."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def end_descendants(group: int | None = None, spare: Collection[int] = ()) -> None:
    """Kill all descendants and wait for those that are ours.

    Args:
        group: a process group to end as well, for systems without /proc.
        spare: children that stay, with what they started.
    """
    while True:
        if group is not None:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        children = [pid for pid in _children(os.getpid()) if pid not in spare]
        for pid in [*children, *(p for child in children for p in _descendants(child))]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        # Their children come to us when they are gone.
        if not [pid for pid in children if _is_reaped(pid)]:
            return


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, 0)[0] == pid
    except ChildProcessError:
        return False


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found
