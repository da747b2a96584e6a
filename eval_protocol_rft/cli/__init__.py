"""`ep-rft`: the command line. Thin: a function per command. Its flags are the options of what it
calls (see `_flags`), made when it is called, so that `ep-rft --help` costs nothing; that work's
errors become one line and exit code 1.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from eval_protocol_rft._text import visible_lines
from eval_protocol_rft.cli._bulk_script import in_our_flags
from eval_protocol_rft.cli._common import fail, open_closed_streams, say
from eval_protocol_rft.cli._flags import for_typer, help_text
from eval_protocol_rft.cli._inspection import report, show, sql, stats
from eval_protocol_rft.cli._jobs import (
    buckets,
    convert,
    datums,
    filter,  # noqa: A004
    generate,
    score,
)
from eval_protocol_rft.cli._models import WRONG, doctor, gateway, serve, train
from eval_protocol_rft.cli._planning import plan

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        generate,
        score,
        filter,
        buckets,
        stats,
        sql,
        report,
        datums,
        convert,
        show,
        serve,
        gateway,
        doctor,
        plan,
        train,
    )
}


class _Commands(TyperGroup):
    """Makes the flags of the command that is called, and of no other: their definitions import
    what their room does."""

    def main(self, *args: Any, **named: Any) -> Any:
        open_closed_streams()
        return super().main(*args, **named)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            try:
                command = _with_flags(COMMANDS[name])
                rest = in_our_flags(rest) if name == generate.__name__ else rest
            except KeyboardInterrupt:
                fail("stopped", code=130)
        return name, command, rest


def _with_flags(command: Callable[..., None]) -> Any:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(for_typer(command, wrong=WRONG if command is doctor else 1))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="ep-rft",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, _command in COMMANDS.items():
    app.command(_name, help=help_text(_command))(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"ep-rft {metadata.version('eval-protocol-rft')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Token-exact reinforcement learning data from Eval Protocol evaluators."""
    # Eval Protocol imports litellm, which would look for a newer price list on the network.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    show = warnings.showwarning

    def show_if_useful(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        # Deprecations are of libraries, and nothing that who runs a command could mend. A filter
        # would not do: Eval Protocol puts its own before it.
        if not issubclass(category, DeprecationWarning):
            show(visible_lines(str(message)), category, *where, **more)

    warnings.showwarning = show_if_useful
    # Warnings that are logged end up here, with what servers said in them. As the root logger's
    # own: Eval Protocol would give it one that shows what every library has to say.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())
        logging.lastResort.addFilter(_is_useful)
        logging.getLogger().addHandler(logging.lastResort)


def _is_useful(record: logging.LogRecord) -> bool:
    return "is deprecated and ignored" not in record.getMessage()


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible_lines(super().format(record))
