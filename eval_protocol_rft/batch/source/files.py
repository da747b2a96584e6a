"""Files as a data set sees them: their content as one number, and whether they changed.

Invariant: a fingerprint depends on bytes alone, never on a file's name or time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it was when it was opened."""

    path: Path
    size: int
    """Bytes."""
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The file as it is now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def holds(self) -> bool:
        """Whether the file is there and has not been written to since."""
        return self.path.exists() and FileState.of(self.path) == self


def file_fingerprint(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_fingerprint(paths: Sequence[Path]) -> str:
    """Hex SHA-256 of one file's bytes, or of the SHA-256s of several in their order."""
    if len(paths) == 1:
        return file_fingerprint(paths[0])
    whole = hashlib.sha256()
    for path in paths:
        whole.update(bytes.fromhex(file_fingerprint(path)))
    return whole.hexdigest()
