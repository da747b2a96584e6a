"""How a command ends when something is wrong: one line on stderr, exit code 1."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Say what is wrong and end."""
    typer.echo(f"ep-rft: {message}", err=True)
    raise typer.Exit(1)
