"""What a person sees of a long run: a bar on a terminal, a line now and then in a log.

Invariant: progress is of what is stored, and goes to stderr.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eval_protocol_rft.text import visible

_LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal."""


class Reporter(Protocol):
    """Told how far a run is. Used as a context manager around it."""

    def __enter__(self) -> Reporter: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        """`done` of the total are finished; `detail` says more, and is worth a line if `now`."""
        ...


def reporter(
    what: str,
    total: int,
    *,
    done: int = 0,
    show: bool | None = None,
    every: float = _LINE_EVERY,
) -> Reporter:
    """The fitting reporter.

    Args:
        what: what is being done: "generate".
        total: how much there is to do.
        done: how much of it was done before.
        every: seconds between lines.
        show: False for none; None for what stderr can show; True for lines where it is no terminal.
    """
    if show is False:
        return _Silent()
    if sys.stderr.isatty():
        return _Bar(what, total, done)
    return _Lines(what, total, every) if show else _Silent()


class _Silent:
    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        pass


class _Bar(_Silent):
    def __init__(self, what: str, total: int, done: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(what, total=total, completed=done, detail="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        self._progress.update(self._task, completed=done, detail=visible(detail))


class _Lines(_Silent):
    def __init__(self, what: str, total: int, every: float) -> None:
        self._what = what
        self._total = total
        self._every = every
        self._last = time.monotonic()

    def update(self, done: int, *, detail: str, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._last >= self._every:
            self._last = moment
            line = f"{self._what}: {done}/{self._total}  {visible(detail)}"
            print(line, file=sys.stderr, flush=True)
