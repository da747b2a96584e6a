"""The one clock by which sampling waits: it stands still while the event loop is blocked.

Invariant: no deadline passes while data that has arrived waits to be read. Evaluators run on the
loop that samples (Eval Protocol calls them there), and one that takes minutes leaves replies in the
kernel. By the wall clock those are late, and would be thrown away and paid for twice. So

1. time counts only while the loop turns: of a pass that takes longer than `LONGEST_PASS` no more
   than that counts;
2. a deadline that has come is judged after `LAST_LOOKS` further passes, each of which reads what
   has arrived;
3. whoever lets data pile up in the kernel, to read it at once, does so in a `nap`, from which every
   deadline that has come wakes all before it is judged.

A clock belongs to a loop, and runs while something waits by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType

TICK_SECONDS = 0.05
"""Between looks at how long the loop's passes take; each costs some microseconds."""
LONGEST_PASS = 0.1
"""Seconds of one pass that count at most."""
LAST_LOOKS = 64
"""Passes of the loop between the end of a deadline and its judgement. One reads 256 KiB of a
connection at most, and asyncio's readers take turns with whom they read for, so in these any socket
is read empty: Linux keeps at most 6 MiB for one. On a loop that is free they take milliseconds."""


class LoopClock:
    """Seconds for which one event loop was free; they begin at its `time()`, and so are never
    ahead of it."""

    def __init__(self) -> None:
        self._counted = self._seen = time.monotonic()
        self._users = 0
        self._tick_handle: asyncio.TimerHandle | None = None
        self._naps: set[asyncio.Future[None]] = set()
        self._judgements = 0
        """Alarms that have come due and look for the last time."""

    def now(self) -> float:
        """Seconds that count by now."""
        return self._counted + min(time.monotonic() - self._seen, LONGEST_PASS)

    @contextlib.contextmanager
    def runs(self) -> Iterator[None]:
        """Count time for as long as the block runs. While nobody does, the clock stands still."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """Run until `release()` was called as often."""
        self._users += 1
        if self._tick_handle is None:
            self._tick()

    def release(self) -> None:
        """One `hold()` less."""
        self._users -= 1
        if not self._users and self._tick_handle is not None:
            self._tick_handle.cancel()
            self._tick_handle = None

    async def nap(self, seconds: float) -> None:
        """Read nothing for `seconds`, or until an alarm is due."""
        if self._judgements:
            return
        woken = asyncio.get_running_loop().create_future()
        handle = woken.get_loop().call_later(seconds, _wake, woken)
        self._naps.add(woken)
        try:
            await woken
        finally:
            handle.cancel()
            self._naps.discard(woken)

    def begin_judgement(self) -> None:
        """Nobody naps until as many `end_judgement()`."""
        self._judgements += 1
        for woken in self._naps:
            _wake(woken)

    def end_judgement(self) -> None:
        self._judgements -= 1

    def _tick(self) -> None:
        seen = time.monotonic()
        self._counted += min(seen - self._seen, LONGEST_PASS)
        self._seen = seen
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)


def _wake(napping: asyncio.Future[None]) -> None:
    if not napping.done():
        napping.set_result(None)


_CLOCKS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopClock] = (
    weakref.WeakKeyDictionary()
)


def loop_clock() -> LoopClock:
    """The clock of the running event loop."""
    loop = asyncio.get_running_loop()
    clock = _CLOCKS.get(loop)
    if clock is None:
        clock = _CLOCKS[loop] = LoopClock()
    return clock


def sampling_time() -> float:
    """Now, by the running loop's clock; `time.monotonic()` where no loop runs."""
    try:
        return loop_clock().now()
    except RuntimeError:
        return time.monotonic()


class Alarm:
    """Calls back once `seconds` of the loop's clock have passed and what had arrived was read."""

    def __init__(self, seconds: float, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = loop_clock()
        self._callback = callback
        self._handle: asyncio.Handle | None = None
        self._looks = 0
        self._clock.hold()
        self._at = self._clock.now() + seconds
        self._wait()

    def restart(self, seconds: float) -> None:
        """Ring `seconds` from now. Costs next to nothing where that is later than before."""
        if self._handle is None:
            return  # it has rung
        self._at = self._clock.now() + seconds
        if self._at < self._wakes or self._looks:
            self._handle.cancel()
            self._wait()

    def cancel(self) -> None:
        """Never ring."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._stop_looking()
            self._clock.release()

    def _wait(self) -> None:
        self._stop_looking()
        self._wakes = self._at
        seconds = max(0.0, self._at - self._clock.now())
        self._handle = self._loop.call_later(seconds, self._due)

    def _due(self) -> None:
        if self._clock.now() < self._at:
            self._wait()
        elif self._looks < LAST_LOOKS:
            if not self._looks:
                self._clock.begin_judgement()
            self._looks += 1
            self._handle = self._loop.call_soon(self._due)
        else:
            self.cancel()
            self._callback()

    def _stop_looking(self) -> None:
        if self._looks:
            self._looks = 0
            self._clock.end_judgement()


class Deadline:
    """`asyncio.timeout` by the loop's clock.

    ```python
    async with Deadline(30) as limit:  # TimeoutError, and limit.expired()
        ...
    ```
    """

    def __init__(self, seconds: float | None) -> None:
        """`seconds`: None for no deadline until `restart`."""
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._alarm: Alarm | None = None

    async def __aenter__(self) -> Deadline:
        await self._timeout.__aenter__()
        if self._seconds is not None:
            self.restart(self._seconds)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        await self._timeout.__aexit__(kind, error, traceback)

    def restart(self, seconds: float) -> None:
        """`seconds` from now, whatever it was before."""
        if self._alarm is None:
            self._alarm = Alarm(seconds, self._expire)
        else:
            self._alarm.restart(seconds)

    def stop(self) -> None:
        """No deadline any more: what was waited for is there."""
        if self._alarm is not None:
            self._alarm.cancel()

    def expired(self) -> bool:
        """Whether it is what ended the block."""
        return self._timeout.expired()

    def _expire(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())
