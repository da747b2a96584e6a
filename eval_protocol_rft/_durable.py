"""Files that survive a crash: whole or not at all, and on disk when we say so.

Invariant: after `write_whole` or `DurableFile.sync` returns, a power cut loses nothing of it. A
crash in between leaves the old file under its name, or none. A file that is replaced keeps its mode
and, where this process may give it, its owner; a link goes on leading to the file it led to.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing ends with where the disk, or what one user or one file may have of it, is full."""
_CREATE = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class DurableFile:
    """A file written from its current end on, by one writer."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Open `path`, make it where it is not, and cut it to its first `keep` bytes.

        Raises:
            OSError: it cannot be opened; or it is a link, and what that leads to is not ours.
        """
        self.path = path
        self._descriptor = os.open(path, _CREATE, 0o666)
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
def replacing(path: str | os.PathLike[str]) -> Iterator[DurableFile]:
    """A new file that takes the place of `path` once it is whole and on disk, or never does. For a
    library that writes files itself, its `path` is an empty file to write to.

    Raises:
        OSError: the file cannot be written, or `path` is there and no regular file.
    """
    target = link_target(Path(path))
    replaced = _replaced(target)
    _clear_leftovers(target)
    unfinished = target.with_name(f"{_unfinished_prefix(target)}{os.getpid()}.tmp")
    # A process of this number, now gone, may have left one: in a container, always.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)
    try:
        with DurableFile(unfinished) as file:
            if replaced is not None:
                # Before anything is in it: what only its owner may read is never for all to read.
                os.chmod(unfinished, 0o600)
            yield file
            file.sync()
        if replaced is not None:
            _make_alike(unfinished, replaced)
        os.replace(unfinished, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            error.filename = os.fspath(path)
        raise
    sync_folder(target.parent)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Put `data` in the place of `path`."""
    with replacing(path) as file:
        file.write(data)


def check_replaceable(path: Path) -> None:
    """See that `replacing(path)` will be able to end, before work is put into what it is to write.
    A file is made beside it for this, and deleted.

    Raises:
        OSError: it will not.
    """
    target = link_target(path)
    replaced = _replaced(target)
    unfinished = target.with_name(f"{_unfinished_prefix(target)}{os.getpid()}.tmp")
    DurableFile(unfinished).close()
    os.unlink(unfinished)
    folder = os.stat(target.parent)
    others = replaced is not None and os.getuid() not in (0, folder.st_uid, replaced.st_uid)
    if others and folder.st_mode & stat.S_ISVTX:
        raise PermissionError(
            errno.EPERM, "another user's file, in a folder where only they may replace it", target
        )


def link_target(path: Path) -> Path:
    """The file that writing to `path` is to change: where a link leads, else `path` itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced(target: Path) -> os.stat_result | None:
    """What is there of the file that is to be replaced."""
    try:
        state = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "a device or a pipe, not a file that can be replaced", target)
    return state


def _make_alike(path: Path, replaced: os.stat_result) -> None:
    state = os.stat(path)
    if (state.st_uid, state.st_gid) != (replaced.st_uid, replaced.st_gid):
        with contextlib.suppress(PermissionError):
            os.chown(path, replaced.st_uid, replaced.st_gid)
    os.chmod(path, stat.S_IMODE(replaced.st_mode))


def _unfinished_prefix(target: Path) -> str:
    """How the names begin of what is to take the place of `target`; a process id and `.tmp` follow.
    Of a name so long that these have no room, it has a hash."""
    prefix = f".{target.name}."
    if len(os.fsencode(prefix)) + len("4194304.tmp") > os.pathconf(target.parent, "PC_NAME_MAX"):
        prefix = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}."
    return prefix


def _clear_leftovers(target: Path) -> None:
    """Delete what processes that are gone left of `target`: each may be as large as the file."""
    for stray in target.parent.glob(f"{glob.escape(_unfinished_prefix(target))}*.tmp"):
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
