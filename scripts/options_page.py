"""Writes docs/options.md: the options of every command, from their definitions.

python -m scripts.options_page
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal, get_args, get_origin

from eval_protocol_rft.cli import COMMANDS
from eval_protocol_rft.cli._flags import Setting, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
_HEAD = """\
# Options

Made from the definitions in Python by `python -m scripts.options_page`: what stands here, what
`--help` shows and what functions take is one and the same. Where an option has another name in
Python, it stands behind the flag.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(_section(name) for name in COMMANDS)])


def _section(name: str) -> str:
    command = COMMANDS[name]
    what = (inspect.getdoc(command) or "").partition("\n\n")[0].replace("\n", " ")
    lines = [_line(setting) for setting in settings_of(command)]
    return "\n".join(
        [
            f"## ep-rft {name}\n\n{what}\n",
            "| option | default | |",
            "| --- | --- | --- |",
            *lines,
            "",
        ]
    )


def _line(setting: Setting) -> str:
    option = setting.option
    names = ", ".join(f"`{name}`" for name in setting.names) or f"`{setting.metavar}`"
    longest = max(setting.names, key=len, default="").lstrip("-").replace("-", "_")
    in_python = setting.make is not None and longest != option.name and option.name != "quiet"
    choices = get_args(option.type) if get_origin(option.type) is Literal else ()
    known = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    cells = (
        names + (f" (`{option.name}`)" if in_python else ""),
        setting.default_text,
        setting.help + known + (f" Or `{setting.flag.env}`." if setting.flag.env else ""),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
