"""What all commands share: how one speaks, how it ends when something is wrong (one line on stderr,
exit code 1) or when it is told to end, and what a command on rollouts takes: a rollout file, or
what a test of Eval Protocol wrote.

Invariant: whatever models, servers and evaluators wrote, and whatever a file is called, no terminal
takes it for a command; nothing here prints in another way. What is wrong with files and settings is
one line in every command; a traceback is left to mistakes of this package. SIGTERM and the end of
the terminal (SIGHUP) end a command as Ctrl-C does, so what it was about to store is stored. Where
standard streams are closed (`2>&-`, a service without any), nothing is read or shown, and no file
that a command opens gets the number of one of them, where whatever is printed would be written into
it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, ParamSpec

import typer

from eval_protocol_rft._durable import NO_ROOM
from eval_protocol_rft._text import visible_lines
from eval_protocol_rft.local import Placement


def open_closed_streams() -> None:
    """Put the null device in the place of each standard stream that is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[list[int]]:
    """Within, SIGTERM and SIGHUP do what Ctrl-C does; the last of the list is the one that came."""
    came: list[int] = [signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # So it is in a script's background job, which Ctrl-C is not meant for.
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    with contextlib.ExitStack() as restored:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Whoever starts a command with `nohup` wants it to go on.
            if signal.getsignal(number) is not signal.SIG_IGN:
                restored.callback(signal.signal, number, signal.signal(number, interrupt))
        yield came


P = ParamSpec("P")
Input = str | Path
"""What is only read: a path; or, as text, a URL."""
_ATTEMPTS = "eval_protocol_rft.attempts"
"""The logger of `sampling.observing`, which is not imported for `--help`."""


def check_placement(placement: Placement, *, here: bool, there: str) -> None:
    """Refuse to place what is not here.

    Args:
        placement: what was asked for.
        here: a model runs in this process.
        there: what runs it otherwise.
    """
    if placement != Placement() and not here:
        options = "--device, --dtype, --attention and --deterministic"
        fail(f"{options} are of a model in this process: {there} has its own")


def one_line(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, ending with one line on stderr and exit code 1 where its files or settings are
    wrong, and with one line where Ctrl-C, SIGTERM or SIGHUP ends it."""

    @functools.wraps(command)
    def run(*args: P.args, **named: P.kwargs) -> None:
        try:
            with _no_log_of_attempts(), _signals_interrupt() as came:
                command(*args, **named)
        except BrokenPipeError:
            raise  # whoever read our output has gone, which typer deals with
        except RecursionError:
            fail("a value in a file is nested too deep to be read")
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            fail(f"{where}{reason_of(error)}")
        except OverflowError as error:
            fail(f"a number in a file is larger or smaller than can be: {error}")
        except ValueError as error:
            fail(str(error))
        except KeyboardInterrupt as stop:
            # Commands that can go on say how: KeyboardInterrupt("; what to do").
            say(f"ep-rft: stopped{stop}", err=True)
            raise typer.Exit(128 + came[-1]) from None  # as a shell reports it
        except Exception as error:
            # Errors of this package say what is wrong, with or without a base class.
            if not type(error).__module__.startswith("eval_protocol_rft."):
                raise
            fail(str(error))

    return run


def reason_of(error: OSError) -> str:
    """Why a file could not be read or written, without its name."""
    advice = ". Make room, or write elsewhere" if error.errno in NO_ROOM else ""
    return f"{error.strerror or error}{advice}"


@contextlib.contextmanager
def _no_log_of_attempts() -> Iterator[None]:
    """What became of attempts is summed up at the end; as a log it would come line by line."""
    logger = logging.getLogger(_ATTEMPTS)
    before, nobody = logger.propagate, logging.NullHandler()
    logger.propagate = False
    logger.addHandler(nobody)
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(nobody)


def say(text: object, *, err: bool = False) -> None:
    """Print text, of others too. Where stderr's reader or terminal is gone, nobody is told."""
    try:
        typer.echo(visible_lines(str(text)), err=err)
    except OSError:
        if not err:
            raise


def say_json(data: bytes) -> None:
    """Print JSON. It escapes what is below 0x20 itself, but not the other control characters."""
    text = re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", data.decode())
    typer.echo(text)


def say_table(table: object) -> None:
    """Print what rich renders."""
    from rich.console import Console

    Console().print(table)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Say what is wrong and end."""
    say(f"ep-rft: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def rollout_file(given: Input, *, progress: bool = True) -> Iterator[Path]:
    """A rollout file, or that of an unfinished job: `given` itself; or a copy, which is gone
    afterwards, of what is behind a URL or compressed. Where it holds rows of Eval Protocol (JSON
    lines, or a folder of them, of which the newest counts), a rollout file of these.

    Raises:
        ReportError, JobError, SourceError: there is neither, or it is broken.
    """
    from eval_protocol_rft.data import METADATA_SUFFIX, called, convert, one_place
    from eval_protocol_rft.report import is_rollouts, newest_rows_file

    place = one_place(given)
    with place.here(METADATA_SUFFIX) as path:
        if is_rollouts(path) or (not path.exists() and path.suffix):
            yield path
            return
        rows = newest_rows_file(path)
        name = str(rows) if place.is_plain else place.shown
        with tempfile.TemporaryDirectory(prefix="ep-rft-") as folder:
            made = Path(folder) / f"{rows.stem}.parquet"
            summary = convert(
                rows, made, from_format="ep", drop_failed_rows=True, progress=progress
            )
            for note in summary.notes:
                say(f"ep-rft: {name}: {note}", err=True)
            with called(made, name):
                yield made
