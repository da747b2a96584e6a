"""The worker process: loads the evaluator once, then answers calls until its channel closes.

Invariant: one answer per call, with its number, and in it one result per view, whatever the
evaluator does to the call. Only `pytest.exit`, by which its author asks for the end of the run, and
cancellation from outside pass. A sync evaluator's is sent before the next call is read, and what
its call does to the process is met by no other call: the worker ends then, and another takes its
place. Of an async one's, many calls run at a time in one event loop, and none waits for another
that does not end. When a worker dies, the calls that it died in are those without an answer, and
whose code ran stands where the supervisor sees it. A copy of this process that an async call forks
ends with the callback in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import locale
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVarTuple

import msgspec
import pytest
from eval_protocol.models import EvaluationRow
from pydantic import ValidationError

from eval_protocol_rft._text import end_copy_of
from eval_protocol_rft.record import Score
from eval_protocol_rft.sampling import Deadline
from eval_protocol_rft.scoring._evaluator import BoundCall, EvaluatorError, inner_evaluator
from eval_protocol_rft.scoring._results import Place, read_result, sort_answers, unscored
from eval_protocol_rft.scoring.executors import _loading, _messages
from eval_protocol_rft.scoring.executors._messages import LOADING, Ended, Setup, WorkerChannel, send

LAST_SECONDS = 1.0
"""How long a call that is late may take to clean up before it is answered for."""
SIGNS_PER_TIMEOUT = 4
"""So often in the time that one call has, the loop says that it turns."""

Outcome = tuple[tuple[Score, ...], bool]
"""Of a call: a result per view, and whether it is sound. It is not where something else than the
evaluator failed: what an earlier call did to this process (code of models replaces what is built
in) may be the reason."""

_Arguments = TypeVarTuple("_Arguments")
_CALL: contextvars.ContextVar[int] = contextvars.ContextVar("scoring_call", default=0)
"""Number of the call that a task or callback belongs to."""


def work(ours: socket.socket, running: memoryview) -> None:
    """Run a worker: read calls from `ours`, the views of one each, and write a `Message` each.

    Args:
        running: one number, which the supervisor sees: of the call whose code runs, as far as it
            is known.
    """
    channel = WorkerChannel(ours)
    # The other end is closed when there is no more to do, which may be before we are ready; and an
    # evaluator may have closed ours.
    with contextlib.suppress(EOFError, OSError):
        setup = msgspec.msgpack.decode(channel.receive()[1], type=Setup)
        channel.seal_with(setup.key)
        _reseed()
        call = _load(channel, setup)
        if call is not None:
            send(channel, LOADING, _messages.Ready())
            if call.evaluator.is_async:
                answer_calls_in_loop(channel, call, setup.timeout, running)
            else:
                try:
                    _answer_calls(channel, call)
                except (EOFError, OSError):
                    raise
                except Exception:  # noqa: BLE001 - what is needed to answer was replaced
                    with contextlib.suppress(Exception):
                        traceback.print_exc()
                    _end_now(1)


def _reseed() -> None:
    """Forked workers would share one state of numpy's global generator (Python's own is seeded
    anew at each fork)."""
    import numpy as np

    np.random.seed()


def _load(channel: WorkerChannel, setup: Setup) -> BoundCall | None:
    """The evaluator's call, or None after saying why there is none."""
    os.environ.clear()
    os.environb.update(setup.environ)
    for name in ("EP_NO_UPLOAD", "LITELLM_LOCAL_MODEL_COST_MAP"):
        os.environ.setdefault(name, "1" if name == "EP_NO_UPLOAD" else "True")
    sys.path[:] = map(os.fsdecode, setup.path)
    sys.argv[:] = map(os.fsdecode, setup.argv)
    spec = os.fsdecode(setup.spec)
    try:
        os.chdir(setup.cwd)
        loaded = _loading.load_evaluator(spec)
    except (_loading.EvaluatorNotFoundError, EvaluatorError, OSError) as error:
        send(channel, LOADING, Ended(f"a worker cannot load the evaluator: {error}"))
        return None
    if loaded.fingerprint != setup.fingerprint:
        send(channel, LOADING, Ended(f"{spec} was changed while it was graded: start again"))
        return None
    return _call_of(loaded)


def _call_of(loaded: _loading.LoadedEvaluator) -> BoundCall:
    """The call of an evaluator as `load_evaluator` gave it; its row or rows are put in later."""
    inner = inner_evaluator(loaded.function)
    return inner.bind(**{inner.parameter: None}, **loaded.kwargs)


def _score_views(call: BoundCall, views: Sequence[bytes]) -> Outcome:
    """Results of a sync evaluator, one per view."""
    try:
        rows = _rows(views)
        return _read(call, rows, call.attempt(_argument(call, rows))), True
    except pytest.exit.Exception:
        raise
    except BaseException as error:  # noqa: BLE001
        # Graders run code that models wrote: sys.exit() in it must not end the run.
        return _stopped(views, error)


async def _score_views_async(call: BoundCall, views: Sequence[bytes]) -> Outcome:
    """Results of an async evaluator, one per view."""
    try:
        rows = _rows(views)
        return _read(call, rows, await call.attempt_async(_argument(call, rows))), True
    except pytest.exit.Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        return _stopped(views, error)


def _argument(call: BoundCall, rows: list[EvaluationRow]) -> Any:
    return rows[0] if call.evaluator.parameter == "row" else rows


def _read(call: BoundCall, rows: list[EvaluationRow], returned: Any) -> tuple[Score, ...]:
    if call.evaluator.parameter == "row":
        return (read_result(returned),)
    # Rows of one completion each: the second half of a place only names it in messages.
    layout: dict[Place, EvaluationRow] = {
        (i, (row.execution_metadata.extra or {}).get("completion_index", i)): row
        for i, row in enumerate(rows)
    }
    results, _ = sort_answers(layout, returned)
    return tuple(results[i][0] for i in range(len(rows)))


def _rows(views: Sequence[bytes]) -> list[EvaluationRow]:
    return [EvaluationRow.model_validate_json(view) for view in views]


def _stopped(views: Sequence[bytes], error: BaseException) -> Outcome:
    """`str()` only of errors that are not the evaluator's: its own may raise there again."""
    if isinstance(error, ValidationError):
        text = f"the stored row cannot be read: {error}"
    elif isinstance(error, SystemExit):
        text = f"the evaluator called sys.exit ({error.code!r})"
    else:
        text = f"the evaluator raised {type(error).__name__}"
    # What an evaluator raises of these is a result of its call already.
    return (unscored(text),) * len(views), not isinstance(error, Exception)


def _answer_calls(channel: WorkerChannel, call: BoundCall) -> None:
    before = _Interpreter()
    while before.is_as_it_was():  # so it is at first: a worker runs one call at least
        number, body = channel.receive()
        views = msgspec.msgpack.decode(body, type=list[bytes])
        began = time.monotonic()
        try:
            results, is_sound = _score_views(call, views)
        except pytest.exit.Exception as error:
            send(channel, number, Ended(f"the evaluator ended the run: {error}"))
            return
        answer = _messages.Answer(results, time.monotonic() - began, is_sound)
        send(channel, number, answer, views=len(views))
    _end_now(0)


def _end_now(code: int) -> None:
    """The next call may be here: a way out by exit handlers and other threads could be long."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    _EXIT(code)


_EXIT = os._exit


def answer_calls_in_loop(
    channel: WorkerChannel, evaluator: BoundCall, timeout: float | None, running: memoryview
) -> None:
    """Answer calls as they come until the channel closes; what runs then is cancelled."""
    with asyncio.Runner(loop_factory=lambda: _CallLoop(running)) as runner:
        runner.run(_Calls(channel, evaluator, timeout).run())


async def _score_in_time(
    evaluator: BoundCall, views: tuple[bytes, ...] | list[bytes], limit: float | None
) -> Outcome:
    """One call. Where it is late it is cancelled, and left behind if that does not end it.

    Raises:
        pytest.exit.Exception: the evaluator asked for the end of the run.
    """
    call = asyncio.ensure_future(_score_views_async(evaluator, views))
    try:
        async with Deadline(limit):  # a call that blocks the loop makes no other late
            await asyncio.wait({call})
    except TimeoutError:
        call.cancel()
        await asyncio.wait({call}, timeout=LAST_SECONDS)
        return (unscored(_messages.late(limit)),) * len(views), True
    except asyncio.CancelledError:
        call.cancel()
        raise
    try:
        return call.result()
    except asyncio.CancelledError:
        return (unscored("the evaluator cancelled its own call"),) * len(views), True


class _CallLoop(asyncio.SelectorEventLoop):
    """An event loop that notes whose code it runs."""

    def __init__(self, running: memoryview) -> None:
        super().__init__()
        self._running_call = running
        self._owner = os.getpid()

    def call_soon(
        self,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        return super().call_soon(self._noted, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._noted, callback, *args, context=context)

    def _noted(self, callback: Callable[[*_Arguments], object], *args: *_Arguments) -> None:
        self._running_call[0] = _CALL.get()
        try:
            callback(*args)
        finally:
            end_copy_of(self._owner)
            self._running_call[0] = 0


class _Calls:
    """The calls in flight."""

    def __init__(self, channel: WorkerChannel, evaluator: BoundCall, timeout: float | None) -> None:
        self._channel = channel
        self._evaluator = evaluator
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def run(self) -> None:
        """Until there are no more."""
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        threading.Thread(target=self._receive, name="calls", daemon=True).start()
        if self._timeout is not None:
            self._say_alive(self._timeout / SIGNS_PER_TIMEOUT)
        try:
            await self._end.wait()
        finally:
            self._is_over = True

    def _receive(self) -> None:
        """In a thread: the loop may be blocked, and the channel closed meanwhile."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            while True:
                try:
                    number, body = self._channel.receive()
                except (EOFError, OSError):
                    self._loop.call_soon_threadsafe(self._end.set)
                    return
                views = msgspec.msgpack.decode(body, type=list[bytes])
                self._loop.call_soon_threadsafe(self._begin, number, views)

    def _begin(self, number: int, views: list[bytes]) -> None:
        context = contextvars.copy_context()
        context.run(_CALL.set, number)
        task = self._loop.create_task(self._answer(number, views), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, views: list[bytes]) -> None:
        began = time.monotonic()
        try:
            results, is_sound = await _score_in_time(self._evaluator, views, self._timeout)
        except pytest.exit.Exception as error:
            send(self._channel, number, Ended(f"the evaluator ended the run: {error}"))
            return
        except asyncio.CancelledError:
            if self._is_over:
                raise
            # An evaluator cancels what is not its own: nobody else would answer for this call.
            os._exit(1)
        answer = _messages.Answer(results, time.monotonic() - began, is_sound)
        send(self._channel, number, answer, views=len(views))

    def _say_alive(self, seconds: float) -> None:
        if self._tasks:
            send(self._channel, LOADING, _messages.Alive())
        self._loop.call_later(seconds, self._say_alive, seconds)


_TAMPERED_WITH = (
    "builtins", "io", "json", "math", "os", "os.path", "pathlib", "random", "re", "resource",
    "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time",
)  # fmt: skip
"""Modules in which graders, and code of models that they run, replace functions. Sandboxes for such
code do that so that it can do no harm, and are meant for a process of its own."""


class _Interpreter:
    """What a call may not leave otherwise, or all later calls in this process are scored by it:
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
