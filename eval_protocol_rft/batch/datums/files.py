"""Training batches as numbered files.

Invariant: after a run the files of a name are those of that run alone: `NAME-00000.npz`, and so on
without a gap. They appear when all of them are whole, or not at all.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from eval_protocol_rft.batch.target import TargetError
from eval_protocol_rft.durable import sync_folder
from eval_protocol_rft.training.batch import TrainingBatch
from eval_protocol_rft.training.export import files


def numbered_path(path: Path, number: int) -> Path:
    """`datums.npz` -> `datums-00003.npz`."""
    return path.with_name(f"{path.stem}-{number:05d}{path.suffix}")


def check_numbered(path: Path, *, overwrite: bool) -> None:
    """Refuse to mix with the files of an earlier run.

    Raises:
        TargetError: some are there.
    """
    first = numbered_path(path, 0)
    if first.exists() and not overwrite:
        raise TargetError(
            f"{first} is there already, of an earlier run; write elsewhere, or say --overwrite "
            "(overwrite=True)"
        )


def write_numbered(path: Path, batches: Iterable[TrainingBatch]) -> list[Path]:
    """Write a file per batch, and remove those that an earlier run has left beyond them."""
    written: list[Path] = []
    # All of them beside, then all of them in: a run that is stopped leaves those of the one before.
    with tempfile.TemporaryDirectory(prefix=f".{path.stem[:64]}-", dir=path.parent) as folder:
        for number, batch in enumerate(batches):
            written.append(numbered_path(path, number))
            write_batch(Path(folder) / written[-1].name, batch)
        for target in written:
            if target.exists():
                shutil.copymode(target, Path(folder) / target.name)
            os.replace(Path(folder) / target.name, target)
    sync_folder(path.parent)
    # An earlier run's have no gap: what comes after one is somebody else's.
    for number in itertools.count(len(written)):
        left = numbered_path(path, number)
        if not left.exists():
            break
        left.unlink()
    return written


def write_batch(path: Path, batch: TrainingBatch) -> None:
    """Write one batch in the format of the extension, `.npz` or `.safetensors`."""
    save = files.save_npz if path.suffix == ".npz" else files.save_safetensors
    save(batch, path)
