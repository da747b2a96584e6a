"""The worker process: loads the evaluator once, then answers calls until its channel closes.

Invariant: one answer per call, with its number. A sync evaluator's is sent before the next call is
read; of an async one's calls, many run at a time (see `in_loop`). When a worker dies, the calls
that it died in are those without an answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from typing import Any

import msgspec

from eval_protocol_rft.batch.grading.channel import WorkerChannel
from eval_protocol_rft.record import CompletionResult

LOADING = 0
"""The number of the call that says what to load; others follow."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to be like the process that asked for it: bytes as the system has them,
    for paths and the environment need not be UTF-8."""

    key: bytes = b""
    """Seals its answers."""
    timeout: float | None
    """Seconds for a call of an async evaluator. Of a sync one the caller keeps the time."""
    spec: bytes
    fingerprint: str
    cwd: bytes
    environ: dict[bytes, bytes]
    path: list[bytes]
    argv: list[bytes]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The evaluator is loaded; the first call may come."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What became of one call."""

    results: tuple[CompletionResult, ...]
    seconds: float


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The event loop of an async evaluator turns."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """No more answers will come from here, and why; the run should end."""

    reason: str


Message = Ready | Answer | Alive | Ended


def longest_answer(views: int) -> int:
    """Bytes that an answer for so many completions may have."""
    return (64 << 20) + (64 << 10) * views


def work(ours: socket.socket, running: memoryview) -> None:
    """Run a worker: read calls from `ours`, the views of one each, and write a `Message` each.

    Args:
        running: one number, seen by the guard: of the call whose code runs, as far as it is known.
    """
    channel = WorkerChannel(ours)
    # The other end is closed when there is no more to do, which may be before we are ready; and an
    # evaluator may have closed ours.
    with contextlib.suppress(EOFError, OSError):
        setup = msgspec.msgpack.decode(channel.receive()[1], type=Setup)
        channel.seal_with(setup.key)
        _reseed()
        judge = _load(channel, setup)
        from eval_protocol_rft.batch.grading.in_loop import answer_calls_in_loop

        if judge is not None:
            send(channel, LOADING, Ready())
            if judge.call.evaluator.is_async:
                answer_calls_in_loop(channel, judge, setup.timeout, running)
            else:
                _answer_calls(channel, judge)


def _reseed() -> None:
    """Forked workers would share one state of numpy's global generator (Python's own is seeded
    anew at each fork)."""
    import numpy as np

    np.random.seed()


def _load(channel: WorkerChannel, setup: Setup) -> Any:
    """The judge, or None after saying why there is none."""
    from eval_protocol_rft.batch.grading.call import Judge
    from eval_protocol_rft.batch.grading.evaluators import EvaluatorNotFoundError, load_evaluator
    from eval_protocol_rft.scoring.evaluator import EvaluatorError

    os.environ.clear()
    os.environb.update(setup.environ)
    for name in ("EP_NO_UPLOAD", "LITELLM_LOCAL_MODEL_COST_MAP"):
        os.environ.setdefault(name, "1" if name == "EP_NO_UPLOAD" else "True")
    sys.path[:] = map(os.fsdecode, setup.path)
    sys.argv[:] = map(os.fsdecode, setup.argv)
    spec = os.fsdecode(setup.spec)
    try:
        os.chdir(setup.cwd)
        loaded = load_evaluator(spec)
    except (EvaluatorNotFoundError, EvaluatorError, OSError) as error:
        send(channel, LOADING, Ended(f"a worker cannot load the evaluator: {error}"))
        return None
    if loaded.fingerprint != setup.fingerprint:
        send(channel, LOADING, Ended(f"{spec} was changed while it was graded: start again"))
        return None
    return Judge.of(loaded)


def _answer_calls(channel: WorkerChannel, judge: Any) -> None:
    import pytest

    while True:
        number, body = channel.receive()
        views = msgspec.msgpack.decode(body, type=list[bytes])
        began = time.monotonic()
        try:
            results = judge.judge(views)
        except pytest.exit.Exception as error:
            send(channel, number, Ended(f"the evaluator ended the run: {error}"))
            return
        send(channel, number, Answer(results, time.monotonic() - began), views=len(views))


def send(channel: WorkerChannel, number: int, message: Message, *, views: int = 1) -> None:
    """Send a message about the call of that number."""
    try:
        body = msgspec.json.encode(message)
        problem = f"is {len(body)} bytes long" if len(body) > longest_answer(views) else None
    except (TypeError, ValueError, RecursionError) as error:
        body, problem = b"", f"cannot be written as JSON: {type(error).__name__}"
    if problem is not None:
        result = CompletionResult(score=None, error=f"what the evaluator said {problem}")
        body = msgspec.json.encode(Answer((result,) * views, 0.0))
    channel.send(number, body)
