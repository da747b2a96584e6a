"""Calls of a user's code that may block, raise or never return.

Invariant: the event loop never waits for such a call longer than its time, and a call that hangs
keeps no other one from running for longer than `PATIENCE_SECONDS`: its thread is left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from eval_protocol_rft.environments.environment import EnvironmentFaultError

PATIENCE_SECONDS = 0.002
"""Longer than most calls take, and little beside those that block."""

_SHOWN = 2000
"""Characters of an error's text that go on record."""


async def call(function: Callable[..., Any], *arguments: Any, what: str, seconds: float) -> Any:
    """What `function` returns, awaited if need be.

    Raises:
        EnvironmentFaultError: it raised, or took longer than `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            if inspect.iscoroutinefunction(function):
                return await function(*arguments)
            found = await _THREADS.run(function, arguments)
            return await found if inspect.isawaitable(found) else found
    except TimeoutError as error:
        raise EnvironmentFaultError(f"{what} took longer than {seconds:g} s") from error
    except Exception as error:
        said = f"{what} raised {type(error).__name__}: {error}"
        if len(said) > _SHOWN:
            said = f"{said[:_SHOWN]}... ({len(said)} characters)"
        raise EnvironmentFaultError(said) from error


class _Call:
    __slots__ = ("arguments", "function", "future", "loop", "started")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.started = False

    def make(self) -> None:
        """In a thread."""
        self.started = True
        if self.future.done():
            return  # nobody waits any more
        try:
            outcome, error = self.function(*self.arguments), None
        except BaseException as raised:  # noqa: BLE001 - the caller has it
            outcome, error = None, raised
        try:
            self.loop.call_soon_threadsafe(_answer, self.future, outcome, error)
        except RuntimeError:
            # A closed loop has no one left who waits.
            if not self.loop.is_closed():
                raise


class _Threads:
    """Daemon threads that are used again. One makes all calls that wait, for waking a thread costs
    more than most calls; where a call has waited for `PATIENCE_SECONDS` another one takes over.
    There is no bound: as many are needed as calls hang, and a bound would make others wait."""

    def __init__(self) -> None:
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._working = 0
        self._idle = 0

    async def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        call = _Call(function, arguments)
        with self._lock:
            self._waiting.append(call)
            is_worked_on = self._working > 0
            if not is_worked_on:
                self._put_to_work()
        if is_worked_on:
            call.loop.call_later(PATIENCE_SECONDS, self._hurry, call)
        return await call.future

    def _hurry(self, call: _Call) -> None:
        if not call.started:
            with self._lock:
                self._put_to_work()

    def _put_to_work(self) -> None:
        """One thread more; with the lock."""
        self._working += 1
        if self._idle:
            self._idle -= 1
            self._wake.release()
        else:
            threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                call = self._waiting.popleft() if self._waiting else None
                if call is None:
                    self._working -= 1
                    self._idle += 1
            if call is None:
                self._wake.acquire()
            else:
                call.make()
                del call


def _answer(future: asyncio.Future[Any], outcome: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(outcome)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


_THREADS = _Threads()
