"""Calls of a user's code that may block, raise or never return.

Invariant: the event loop never waits for such a call longer than its time, and a call that hangs
keeps no other one from running: it has a thread of its own, which is left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from eval_protocol_rft.environments.environment import EnvironmentFaultError

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


class _Threads:
    """Daemon threads that are used again once their call returns. There is no bound: as many are
    needed as calls hang, and a bound would make others wait for them."""

    def __init__(self) -> None:
        self._idle: deque[_Thread] = deque()

    async def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        try:
            thread = self._idle.pop()
        except IndexError:
            thread = _Thread(self._idle)
            thread.start()
        thread.work.put((function, arguments, loop, future))
        return await future


class _Thread(threading.Thread):
    def __init__(self, idle: deque[_Thread]) -> None:
        super().__init__(name="environment", daemon=True)
        self.work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = idle

    def run(self) -> None:
        while True:
            function, arguments, loop, future = self.work.get()
            try:
                outcome, error = function(*arguments), None
            except BaseException as raised:  # noqa: BLE001 - the caller has it
                outcome, error = None, raised
            self._idle.append(self)
            try:
                loop.call_soon_threadsafe(_answer, future, outcome, error)
            except RuntimeError:
                # A closed loop has no one left who waits.
                if not loop.is_closed():
                    raise
            del function, arguments, loop, future, outcome, error


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
