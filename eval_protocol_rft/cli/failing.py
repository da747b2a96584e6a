"""What a command says, and how it ends when something is wrong: one line on stderr, exit code 1.

Invariant: whatever models, servers and evaluators wrote, and whatever a file is called, no terminal
takes it for a command. Nothing here prints in another way. What is wrong with files and settings is
one line in every command; a traceback is left to mistakes of this package.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import NoReturn, ParamSpec

import typer

from eval_protocol_rft.cli.stopping import sigterm_interrupts
from eval_protocol_rft.durable import NO_ROOM
from eval_protocol_rft.text import visible_lines

P = ParamSpec("P")
_ATTEMPTS = "eval_protocol_rft.attempts"
"""The logger of `sampling.observing`, which is not imported for `--help`."""


def one_line(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, ending with one line on stderr and exit code 1 where its files or settings are
    wrong, and with one line where Ctrl-C or SIGTERM ends it."""

    @functools.wraps(command)
    def run(*args: P.args, **named: P.kwargs) -> None:
        try:
            with _no_log_of_attempts(), sigterm_interrupts() as stopped:
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
        except KeyboardInterrupt:
            say("ep-rft: stopped", err=True)
            raise typer.Exit(stopped.exit_code) from None
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
    """Print text, of others too."""
    typer.echo(visible_lines(str(text)), err=err)


def say_json(data: bytes) -> None:
    """Print JSON. It escapes what is below 0x20 itself, but not the other control characters."""
    text = re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", data.decode())
    typer.echo(text)


def fail(message: str) -> NoReturn:
    """Say what is wrong and end."""
    say(f"ep-rft: {message}", err=True)
    raise typer.Exit(1)
