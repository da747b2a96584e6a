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
    """`joint_fingerprint` of files."""
    return joint_fingerprint([file_fingerprint(path) for path in paths])


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """One file's own fingerprint, or hex SHA-256 of those of several in their order."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    whole = hashlib.sha256()
    for fingerprint in fingerprints:
        whole.update(bytes.fromhex(fingerprint))
    return whole.hexdigest()
