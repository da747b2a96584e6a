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

from eval_protocol_rft.scoring.executors._channel import WorkerChannel
from eval_protocol_rft.scoring.executors._items import LOADING, Answer, Ended, Ready, Setup, send


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
        from eval_protocol_rft.scoring.executors._in_loop import answer_calls_in_loop

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
    from eval_protocol_rft.scoring import EvaluatorError
    from eval_protocol_rft.scoring.executors._call import Judge
    from eval_protocol_rft.scoring.executors._loading import EvaluatorNotFoundError, load_evaluator

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
