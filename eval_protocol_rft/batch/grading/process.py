"""A worker process as the pool sees it, and the fork server that makes it fast to replace.

Invariant: a worker that was ended is gone when `bury` returns, with what its evaluator started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver, resource_tracker

from eval_protocol_rft.batch.grading.items import GradingItem
from eval_protocol_rft.batch.grading.worker import Message, Setup, work


class WorkerProcess:
    """A worker and the item that it has. `start_fork_server` comes first."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, setup), name="grading-worker")
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.item: GradingItem | None = None
        self.began = 0.0
        """When it got its item, on the monotonic clock."""

    def give(self, item: GradingItem) -> bool:
        """Hand over an item; False where the worker is dead already."""
        try:
            self.connection.send(item.views)
        except OSError:
            return False
        self.item, self.began = item, time.monotonic()
        return True

    def read(self) -> Message | None:
        """What it says; None where it will say nothing more."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """Ask the system to end it and whatever its evaluator started; `bury` comes next."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:
                # Too young to have a group of its own.
                self.process.kill()

    def bury(self) -> int | None:
        """Wait until it is gone, and free what it held here; its exit code."""
        self.process.join()
        code = self.process.exitcode
        self.connection.close()
        self.process.close()
        return code


def start_fork_server() -> None:
    """Start the process that workers are forked from, with Eval Protocol in it, so that replacing
    a worker does not cost importing that. It and its children inherit that SIGINT is blocked:
    Ctrl-C while they import must not print their tracebacks."""
    forkserver.set_forkserver_preload(["eval_protocol_rft.batch.grading.preload"])
    # The fork server starts it otherwise, and starting it unblocks SIGINT.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_words(code: int | None) -> str:
    """An exit code in words; a negative one is the signal that ended the process."""
    name = ""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = f", {signal.Signals(-code).name}"
    return f"exit code {code}{name}"
