"""Async evaluators in a worker: many calls at a time, in one event loop.

Invariant: one answer per call, and no call waits for another that does not end. Whose code runs
stands where the guard sees it, so that it is known when the worker dies or hangs. A copy of this
process that a call forks ends with the callback in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVarTuple

import msgspec
import pytest

from eval_protocol_rft._text import end_copy_of
from eval_protocol_rft.sampling import Deadline
from eval_protocol_rft.scoring import unscored
from eval_protocol_rft.scoring.executors._call import Outcome
from eval_protocol_rft.scoring.executors._channel import WorkerChannel
from eval_protocol_rft.scoring.executors._items import LOADING, Alive, Answer, Ended, late, send

if TYPE_CHECKING:
    from eval_protocol_rft.scoring.executors._call import Judge

LAST_SECONDS = 1.0
"""How long a call that is late may take to clean up before it is answered for."""
SIGNS_PER_TIMEOUT = 4
"""So often in the time that one call has, the loop says that it turns."""

_Arguments = TypeVarTuple("_Arguments")
_CALL: contextvars.ContextVar[int] = contextvars.ContextVar("grading_call", default=0)
"""Number of the call that a task or callback belongs to."""


def answer_calls_in_loop(
    channel: WorkerChannel, judge: Judge, timeout: float | None, running: memoryview
) -> None:
    """Answer calls as they come until the channel closes; what runs then is cancelled."""
    with asyncio.Runner(loop_factory=lambda: _CallLoop(running)) as runner:
        runner.run(_Calls(channel, judge, timeout).run())


async def judge_in_time(
    judge: Judge, views: tuple[bytes, ...] | list[bytes], limit: float | None
) -> Outcome:
    """One call. Where it is late it is cancelled, and left behind if that does not end it.

    Raises:
        pytest.exit.Exception: the evaluator asked for the end of the run.
    """
    call = asyncio.ensure_future(judge.judge_async(views))
    try:
        async with Deadline(limit):  # a call that blocks the loop makes no other late
            await asyncio.wait({call})
    except TimeoutError:
        call.cancel()
        await asyncio.wait({call}, timeout=LAST_SECONDS)
        return Outcome((unscored(late(limit)),) * len(views))
    except asyncio.CancelledError:
        call.cancel()
        raise
    try:
        return call.result()
    except asyncio.CancelledError:
        return Outcome((unscored("the evaluator cancelled its own call"),) * len(views))


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

    def __init__(self, channel: WorkerChannel, judge: Judge, timeout: float | None) -> None:
        self._channel = channel
        self._judge = judge
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
            outcome = await judge_in_time(self._judge, views, self._timeout)
        except pytest.exit.Exception as error:
            send(self._channel, number, Ended(f"the evaluator ended the run: {error}"))
            return
        except asyncio.CancelledError:
            if self._is_over:
                raise
            # An evaluator cancels what is not its own: nobody else would answer for this call.
            os._exit(1)
        answer = Answer(outcome.results, time.monotonic() - began, outcome.is_sound)
        send(self._channel, number, answer, views=len(views))

    def _say_alive(self, seconds: float) -> None:
        if self._tasks:
            send(self._channel, LOADING, Alive())
        self._loop.call_later(seconds, self._say_alive, seconds)
