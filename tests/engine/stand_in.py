"""A program that is started, talked to and stopped as vLLM is, but in a second.

`install(folder)` puts a package called `vllm` there; with the folder on PYTHONPATH an interpreter
has it. As vLLM, it takes `vllm serve`'s command line, imports the middleware that is named there,
and starts a process of its own that outlives it and does not hear SIGTERM. What it does after that
the variable `STAND_IN` says: `bare` names its model and nothing more, `serve` is `ep-rft serve`,
`broken` fails as vLLM does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def install(folder: Path) -> None:
    """Put it there."""
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stand_in_main.py"), package / "main.py")


def environment(folder: Path, pids: Path, mode: str) -> Mapping[str, str]:
    """What a process has it by."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return {"PYTHONPATH": paths, "STAND_IN": mode, "STAND_IN_PIDS": str(pids)}


def processes(pids: Path) -> list[int]:
    """Numbers of all that were started: the server's and its core's, in turns."""
    return [int(number) for number in pids.read_text().split()] if pids.exists() else []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def command_line(pid: int) -> str:
    """What others see of it."""
    return Path(f"/proc/{pid}/cmdline").read_text()
