"""What a command says, and how it ends when something is wrong: one line on stderr, exit code 1.

Invariant: whatever models, servers and evaluators wrote, and whatever a file is called, no terminal
takes it for a command. Nothing here prints in another way.
"""

from __future__ import annotations

import re
from typing import NoReturn

import typer

from eval_protocol_rft.text import visible_lines


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
