"""Files that survive a crash: whole or not at all, and on disk when we say so.

Invariant: after `write_whole` or `DurableFile.sync` returns, a power cut loses nothing of it. A
crash in between leaves the old file under its name, or none.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType


class DurableFile:
    """A file written from its current end on, by one writer."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Open `path`, make it where it is not, and cut it to its first `keep` bytes."""
        self.path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, keep)
        self._end = keep

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`, or, where that fails (a full disk), none of it."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self._end + done)
        except OSError:
            self.cut(self._end)
            raise
        self._end += done
        return done

    def cut(self, end: int) -> None:
        """Go on from byte `end`; what lay behind it is gone, or will be written over."""
        self._end = end
        # The next write goes to `end` even where the disk refuses this.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, end)

    def tell(self) -> int:
        return self._end

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        os.fsync(self._descriptor)

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[DurableFile]:
    """A new file that takes the place of `path` once it is whole and on disk, or never does."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _clear_leftovers(path)
    try:
        with DurableFile(unfinished) as file:
            yield file
            file.sync()
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Put `data` in the place of `path`."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_leftovers(path: Path) -> None:
    """Delete what processes that are gone left of `path`: each may be as large as the file."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = stray.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stray)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
