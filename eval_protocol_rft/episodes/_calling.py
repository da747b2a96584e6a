"""Calls of a user's code that may block, raise or never return.

Invariant: the event loop never waits for such a call longer than its time, and a call that hangs
keeps no other one from running for longer than `PATIENCE_SECONDS`: its thread is left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._text import end_copy_of, text_of
from eval_protocol_rft.sampling import Deadline

PATIENCE_SECONDS = 0.002
"""Longer than most calls take, and little beside those that block."""

_SHOWN = 2000
"""Characters of an error's text that go on record."""


class EnvironmentFaultError(EvalProtocolRftError, RuntimeError):
    """The environment raised, hung, or answered what is no step. Its episode is a failure."""


async def call(
    function: Callable[..., Any],
    *arguments: Any,
    what: str,
    seconds: float,
    too_late: Callable[[Any], None] | None = None,
) -> Any:
    """What `function` returns, awaited if need be.

    Args:
        function, arguments: what to call; where it is not async, in a thread.
        what: how errors name it.
        seconds: it may take.
        too_late: called in a thread with what a function that is not async returned when nobody
            waited for it any more.

    Raises:
        EnvironmentFaultError: it raised, or took longer than `seconds`.
    """
    limit = Deadline(seconds)
    try:
        async with limit:
            if inspect.iscoroutinefunction(function):
                return await _awaited(function(*arguments))
            result = await _THREADS.run(function, arguments, too_late)
            return await _awaited(result) if inspect.isawaitable(result) else result
    except Exception as error:
        if limit.expired():
            raise EnvironmentFaultError(f"{what} took longer than {seconds:g} s") from error
        message = f"{what} raised {type(error).__name__}: {text_of(error)}"
        if len(message) > _SHOWN:
            message = f"{message[:_SHOWN]}... ({len(message)} characters)"
        raise EnvironmentFaultError(message) from error


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, which ends by itself. Whoever is cancelled meanwhile waits for it all the same,
    and is cancelled then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def _awaited(pending: Awaitable[Any]) -> Any:
    try:
        return await pending
    except (asyncio.CancelledError, SystemExit) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # the caller is cancelled, or its time is up
        raise _no_exit(error) from error


def _no_exit(error: BaseException) -> Exception:
    """What would end the caller, as an error that does not."""
    return RuntimeError(f"{type(error).__name__}: {text_of(error)}")


class _Call:
    __slots__ = (
        "arguments", "function", "future", "is_abandoned", "is_running", "is_started", "loop",
        "too_late",
    )  # fmt: skip

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        too_late: Callable[[Any], None] | None,
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.too_late = too_late
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.is_started = False
        self.is_running = False
        self.is_abandoned = False
        """Nobody waited for it any more while it ran: its thread may hang."""

    def make(self) -> None:
        """In a thread."""
        if self.future.done():
            return  # nobody waits any more
        process = os.getpid()
        try:
            outcome, error = self.function(*self.arguments), None
        except BaseException as raised:  # noqa: BLE001 - the caller has it
            outcome, error = None, raised
        end_copy_of(process)
        try:
            self.loop.call_soon_threadsafe(_answer, self, outcome, error)
        except RuntimeError:
            # A closed loop has no one left who waits.
            if not self.loop.is_closed():
                raise
            self.leave(outcome, error)

    def leave(self, outcome: Any, error: BaseException | None) -> None:
        """Nobody waited for it any more."""
        if self.too_late is not None and error is None:
            threading.Thread(target=self.too_late, args=(outcome,), daemon=True).start()


class _Threads:
    """Daemon threads that are used again. One makes all calls that wait, for waking a thread costs
    more than most calls; where a call has waited for `PATIENCE_SECONDS` another one takes over.
    There is no bound: as many are needed as calls hang, and a bound would make others wait."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: after a fork there are no threads."""
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._working = 0
        """Threads that will take what waits; not those with a call that is abandoned."""
        self._idle = 0

    async def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        too_late: Callable[[Any], None] | None = None,
    ) -> Any:
        call = _Call(function, arguments, too_late)
        with self._lock:
            is_worked_on = self._working > 0
            if not is_worked_on:
                self._put_to_work()
            self._waiting.append(call)
        if is_worked_on:
            call.loop.call_later(PATIENCE_SECONDS, self._hurry, call)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._abandon(call)
            raise

    def _hurry(self, call: _Call) -> None:
        with self._lock:
            if not (call.is_started or call.future.done()):
                self._put_to_work()

    def _abandon(self, call: _Call) -> None:
        with self._lock:
            if call.is_running:
                call.is_abandoned = True
                self._working -= 1

    def _put_to_work(self) -> None:
        """One thread more; with the lock, which a new thread waits for."""
        if self._idle:
            self._idle -= 1
            self._wake.release()
        else:
            threading.Thread(target=self._work, name="environment", daemon=True).start()
        self._working += 1

    def _work(self) -> None:
        made: _Call | None = None
        while True:
            with self._lock:
                if made is not None:
                    made.is_running = False
                    self._working += made.is_abandoned
                made = call = self._waiting.popleft() if self._waiting else None
                if call is None:
                    self._working -= 1
                    self._idle += 1
                else:
                    call.is_started = call.is_running = True
            if call is None:
                self._wake.acquire()
            else:
                call.make()


def _answer(call: _Call, outcome: Any, error: BaseException | None) -> None:
    future = call.future
    if future.done():
        call.leave(outcome, error)
    elif error is None:
        future.set_result(outcome)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:
        future.set_exception(_no_exit(error))


_THREADS = _Threads()


def _forget() -> None:
    _THREADS.forget()


if hasattr(os, "register_at_fork"):  # not everywhere
    os.register_at_fork(after_in_child=_forget)
