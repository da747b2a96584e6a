"""The worker process: loads the evaluator once, then answers calls until its channel closes.

Invariant: one answer per call, with its number. A sync evaluator's is sent before the next call is
read; of an async one's calls, many run at a time (see `in_loop`). When a worker dies, the calls
that it died in are those without an answer. What a call of a sync evaluator does to the process is
met by no other call: the worker ends then, and another takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import locale
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
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

    before = _Interpreter()
    while before.is_as_it_was():  # so it is at first, and no worker ends before it has run a call
        number, body = channel.receive()
        views = msgspec.msgpack.decode(body, type=list[bytes])
        began = time.monotonic()
        try:
            results, is_sound = judge.judge(views)
        except pytest.exit.Exception as error:
            send(channel, number, Ended(f"the evaluator ended the run: {error}"))
            return
        answer = Answer(results, time.monotonic() - began, is_sound)
        send(channel, number, answer, views=len(views))


_TAMPERED_WITH = (
    "builtins", "io", "json", "math", "os", "os.path", "pathlib", "random", "re", "resource",
    "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time",
)  # fmt: skip
"""Modules in which graders, and code of models that they run, replace functions. Sandboxes for such
code do that so that it can do no harm, and are meant for a process of its own."""


class _Interpreter:
    """What a call may not leave otherwise, or all later calls in this process are judged by it:
    functions, limits, the working folder, standard streams, variables of the environment. Adding
    something harms nobody, and raising a limit neither."""

    def __init__(self) -> None:
        self._functions = {
            name: {key: value for key, value in vars(module).items() if callable(value)}
            for name in _TAMPERED_WITH
            if (module := sys.modules.get(name)) is not None
        }
        self._limits = _limits()
        self._state = _state()
        self._environ = dict(os.environ)

    def is_as_it_was(self) -> bool:
        try:
            return (
                all(map(self._has_functions, self._functions))
                and all(map(_is_no_lower, _limits(), self._limits))
                and _state() == self._state
                and self._environ.items() <= os.environ.items()
            )
        except Exception:  # noqa: BLE001 - what it looks with is gone
            return False

    def _has_functions(self, name: str) -> bool:
        present = vars(sys.modules[name])
        return all(present.get(key) is value for key, value in self._functions[name].items())


def _limits() -> list[int]:
    soft = [resource.getrlimit(kind)[0] for kind in _RESOURCES]
    return [sys.getrecursionlimit(), *soft]


def _is_no_lower(limit: int, before: int) -> bool:
    return limit == before or limit == resource.RLIM_INFINITY or limit > before >= 0


_RESOURCES = (
    resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE,
    resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK,
)  # fmt: skip


def _state() -> list[Any]:
    streams = sys.stdin, sys.stdout, sys.stderr
    state: list[Any] = [(id(stream), getattr(stream, "closed", None)) for stream in streams]
    for ask in _ASKED:
        try:
            state.append(ask())
        except (OSError, locale.Error) as error:
            state.append(type(error))
    return state


_ASKED: tuple[Callable[[], Any], ...] = (
    os.getcwd,
    functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()),
    functools.partial(locale.setlocale, locale.LC_ALL),
    sys.getprofile,
    sys.gettrace,
)
