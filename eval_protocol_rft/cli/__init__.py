"""`ep-rft`: the command line. Thin: one module per command, which imports its work when it runs, so
that `--help` costs nothing, and turns that work's errors into one line and exit code 1.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

from eval_protocol_rft._text import visible_lines
from eval_protocol_rft.cli._common import say
from eval_protocol_rft.cli.convert import convert
from eval_protocol_rft.cli.datums import datums
from eval_protocol_rft.cli.doctor import doctor
from eval_protocol_rft.cli.filter import filter  # noqa: A004 - the command's name
from eval_protocol_rft.cli.generate import generate
from eval_protocol_rft.cli.report import report
from eval_protocol_rft.cli.score import score
from eval_protocol_rft.cli.serve import serve
from eval_protocol_rft.cli.show import show
from eval_protocol_rft.cli.stats import stats
from eval_protocol_rft.cli.train import train

app = typer.Typer(
    name="ep-rft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    generate,
    score,
    filter,
    stats,
    report,
    datums,
    convert,
    show,
    serve,
    doctor,
    train,
):
    app.command(help=command.__doc__)(command)


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
    # Warnings that are logged end up here, with what servers said in them.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible_lines(super().format(record))
