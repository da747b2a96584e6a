"""What a person sees of a long run: a bar on a terminal, a line now and then in a log.

Invariant: progress is of what is stored, or of what is read where a file is only read, and goes to
stderr. Where that cannot be written to (its reader or the terminal has gone), the work goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TextIO, TypeVar, cast

from rich import progress
from rich.console import Console

from eval_protocol_rft._text import visible

T = TypeVar("T", bound=Sized)
_LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal."""
_TOLD_EVERY = 1.0
"""Seconds between two looks at how far it is."""
_SHOWN_AFTER = 1.0
"""Seconds that a file may be read without a bar: most are read sooner."""


class Reporter:
    """Told how far a run is. Used as a context manager around it. This one says nothing."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        """`done` of the total are finished; `detail` says more, and is worth a line if `now`."""


def reporter(
    what: str,
    total: int | None,
    *,
    done: int = 0,
    show: bool | None = None,
    every: float = _LINE_EVERY,
    stays: bool = True,
    opening: str = "",
) -> Reporter:
    """The fitting reporter.

    Args:
        what: what is being done: "generate".
        total: how much there is to do; None where nobody knows.
        done: how much of it was done before.
        opening: a line that is said at once, where anything is.
        every: seconds between lines.
        show: False for none; None for what stderr can show; True for lines where it is no terminal.
        stays: leave the bar on the terminal at the end.
    """
    on_terminal = sys.stderr.isatty()
    if show is False or not (show or on_terminal):
        return Reporter()
    if opening:
        _say(opening)
    return _Bar(what, total, done, stays) if on_terminal else _Lines(what, total, every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Something that a service makes, and that is waited for."""

    what: str
    """For people: "deployment my-run"."""
    state: str
    """As the service spells it."""
    seconds: float
    """Since it was first looked at."""
    done: bool = False
    """It is there; otherwise there will be more looks at it."""

    def __str__(self) -> str:
        return f"waiting for {self.what}: {self.state}"


OnWait = Callable[[Waiting], None]


class Waits:
    """Shows what is waited for: a line that lives on a terminal, elsewhere a line per change. Used
    as a context manager, and called with each `Waiting`. This one says nothing."""

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, waiting: Waiting) -> None:
        pass


def waits(show: bool | None = None) -> Waits:
    """The fitting one; `show` as for `reporter`."""
    on_terminal = sys.stderr.isatty()
    if show is False or not (show or on_terminal):
        return Waits()
    return _LiveWaits() if on_terminal else _WaitLines()


class Reading:
    """Progress of a file that is read, in one or several passes. Used as a context manager."""

    def __init__(
        self, what: str, total: Callable[[], int | None], *, show: bool | None = None
    ) -> None:
        """
        Args:
            what: what is being done: "stats".
            total: says how much there is to read, which is asked once reading has taken a second.
            show: as for `reporter`.
        """
        self._what = what
        self._total = total
        self._show = show
        self._began = time.monotonic()
        self._passes = 0
        self._reporter: Reporter | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        if self._reporter is not None:
            self._reporter.__exit__(*error)

    def __call__(self, items: Iterable[T], size: Callable[[T], int] = len) -> Iterator[T]:
        """The same items; each is read once the next one is asked for.

        Args:
            items: what a pass over the file gives, such as tables.
            size: how much of the total an item is.
        """
        self._passes += 1
        detail = f"pass {self._passes}" if self._passes > 1 else ""
        done = 0
        for item in items:
            yield item
            done += size(item)
            self._update(done, detail)

    def _update(self, done: int, detail: str) -> None:
        if self._reporter is None:
            if self._show is False or time.monotonic() - self._began < _SHOWN_AFTER:
                return
            shown = reporter(self._what, self._total(), show=self._show, stays=False)
            self._reporter = shown.__enter__()
        self._reporter.update(done, detail=detail)


@contextlib.asynccontextmanager
async def repeating(tell: Callable[[], None]) -> AsyncIterator[None]:
    """Within, call `tell` now and then: also while nothing comes in, a person wants to know how far
    it is, and a server may be away for long."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(_TOLD_EVERY)
            tell()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()


class _Bar(Reporter):
    def __init__(self, what: str, total: int | None, done: int, stays: bool) -> None:
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn(what),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[detail]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(file=cast("TextIO", _Stderr())),
            transient=not stays,
        )
        self._task = self._progress.add_task(what, total=total, completed=done, detail="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        self._progress.update(self._task, completed=done, detail=visible(detail))


class _Lines(Reporter):
    def __init__(self, what: str, total: int | None, every: float) -> None:
        self._what = what
        self._total = total
        self._every = every
        self._last = time.monotonic()

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._last >= self._every:
            self._last = moment
            of = "" if self._total is None else f"/{self._total}"
            _say(f"{self._what}: {done}{of}  {detail}")


class _LiveWaits(Waits):
    def __init__(self) -> None:
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.TextColumn("since {task.fields[since]},"),
            progress.TimeElapsedColumn(),
            console=Console(file=cast("TextIO", _Stderr())),
            transient=True,
        )
        self._tasks: dict[str, progress.TaskID] = {}

    def __enter__(self) -> Waits:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, waiting: Waiting) -> None:
        text, task = visible(str(waiting)), self._tasks.get(waiting.what)
        if waiting.done:
            if task is not None:
                self._progress.remove_task(self._tasks.pop(waiting.what))
            self._progress.console.print(visible(_there(waiting)), markup=False, highlight=False)
        elif task is None:
            self._tasks[waiting.what] = self._progress.add_task(text, total=None, since=_clock())
        else:
            self._progress.update(task, description=text)


class _WaitLines(Waits):
    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def __call__(self, waiting: Waiting) -> None:
        if waiting.done:
            self._states.pop(waiting.what, None)
            _say(_there(waiting))
        elif self._states.get(waiting.what) != waiting.state:
            self._states[waiting.what] = waiting.state
            since = f", for {_duration(waiting.seconds)}" if waiting.seconds >= 1 else ""
            _say(f"{_clock()} {waiting}{since}")


def _there(waiting: Waiting) -> str:
    return f"{_clock()} {waiting.what}: {waiting.state}, after {_duration(waiting.seconds)}"


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _say(line: str) -> None:
    print(visible(line).rstrip(), file=_Stderr(), flush=True)


class _Stderr(io.TextIOBase):
    """What is stderr now; what cannot be written there is lost."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]  # of a base that cannot set it
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
