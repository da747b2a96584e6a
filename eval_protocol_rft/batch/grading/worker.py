"""The worker process: loads the evaluator once, then answers calls until its pipe closes.

Invariant: one answer per call, sent before the next is read. So when a worker dies, the call that
it died in is the one without an answer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from eval_protocol_rft.record import CompletionResult


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to be like the process that asked for it."""

    spec: str
    fingerprint: str
    cwd: str
    environ: dict[str, str]


@dataclass(frozen=True, slots=True)
class Ready:
    """The evaluator is loaded; the first call may come."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call."""

    results: tuple[CompletionResult, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """No more answers will come from here, and why; the run should end."""

    reason: str


Message = Ready | Answer | Ended


def work(connection: Connection, setup: Setup) -> None:
    """Run a worker. It reads tuples of views from `connection` and writes `Message`s."""
    _leave_the_terminal()
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    os.chdir(setup.cwd)
    os.environ.update(setup.environ)
    from eval_protocol_rft.batch.grading import preload  # noqa: F401

    _reseed()
    # The other end is closed when there is no more to do, which may be before we are ready.
    with contextlib.suppress(EOFError, ConnectionError):
        judge = _load(connection, setup)
        if judge is not None:
            connection.send(Ready())
            _answer_calls(connection, judge)


def _leave_the_terminal() -> None:
    """A process group of our own: Ctrl-C goes to the parent alone, which ends us, and what the
    evaluator starts can be ended together with us."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with_parent() -> None:
    """A parent that was killed cannot end a worker whose evaluator hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _reseed() -> None:
    """Forked workers would share one state of numpy's global generator (Python's own is seeded
    anew at each fork)."""
    import numpy as np

    np.random.seed()


def _load(connection: Connection, setup: Setup) -> Any:
    """The judge, or None after saying why there is none."""
    from eval_protocol_rft.batch.grading.call import Judge
    from eval_protocol_rft.batch.grading.evaluators import EvaluatorNotFoundError, load_evaluator
    from eval_protocol_rft.scoring.evaluator import EvaluatorError

    try:
        loaded = load_evaluator(setup.spec)
    except (EvaluatorNotFoundError, EvaluatorError) as error:
        connection.send(Ended(f"a worker cannot load the evaluator: {error}"))
        return None
    if loaded.fingerprint != setup.fingerprint:
        connection.send(Ended(f"{setup.spec} was changed while it was grading: start again"))
        return None
    return Judge.of(loaded)


def _answer_calls(connection: Connection, judge: Any) -> None:
    import pytest

    while True:
        views = connection.recv()
        began = time.monotonic()
        try:
            results = judge.judge(views)
        except pytest.exit.Exception as error:
            connection.send(Ended(f"the evaluator ended the run: {error}"))
            return
        connection.send(Answer(results, time.monotonic() - began))
