"""Where a command may write.

Invariant: what a command reads is never what it writes, and nothing is replaced unless asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class TargetError(ValueError):
    """A place that must not be written to."""


def check_target(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    suffixes: Sequence[str],
    overwrite: bool,
) -> Path:
    """`output` as a path, if it may be written to.

    Raises:
        TargetError: it is the source, is there already, is in no folder, or has another extension.
    """
    path = Path(output)
    if path.suffix not in suffixes:
        raise TargetError(f"{path}: what to write there? Its name must end in {_listed(suffixes)}")
    if _same(path, Path(source)):
        raise TargetError(f"{path}: that is the file to be read; write to another one")
    if path.exists() and not overwrite:
        raise TargetError(
            f"{path} is there already; write elsewhere, or say --overwrite (overwrite=True)"
        )
    if not path.parent.is_dir():
        raise TargetError(f"{path.parent}: no such folder")
    return path


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _listed(suffixes: Sequence[str]) -> str:
    *others, last = suffixes
    return f"{', '.join(others)} or {last}" if others else last
