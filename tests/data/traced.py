"""A child process that dies, or meets a full disk, at a chosen call of the system.

The kernel stops the child before each call that changes a disk (seccomp hands it to ptrace), so
what C libraries write is counted as what Python writes. There the tracer may let it go on, kill it,
let it write only the half and kill it, or let the call fail. What a cut of power leaves is played:
of each file, blocks that were written since its last sync may be as they were then, and names that
were made, replaced or deleted since their folder was synced may be as they were.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import shutil
import signal
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

needs_tracing = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="reads the registers of Linux on x86-64",
)
KILLED = 9
# Numbers of system calls on x86-64.
_WRITE, _OPEN, _FSYNC, _FDATASYNC, _TRUNCATE, _FTRUNCATE = 1, 2, 74, 75, 76, 77
_RENAME, _MKDIR, _RMDIR, _UNLINK, _PWRITE, _OPENAT, _MKDIRAT = 82, 83, 84, 87, 18, 257, 258
_UNLINKAT, _RENAMEAT, _PWRITEV, _RENAMEAT2, _FALLOCATE, _WRITEV = 263, 264, 296, 316, 285, 20
_CALLS = {
    _WRITE, _FSYNC, _FDATASYNC, _FTRUNCATE, _RENAME, _MKDIR, _RMDIR, _UNLINK, _PWRITE, _OPEN,
    _OPENAT, _MKDIRAT, _UNLINKAT, _RENAMEAT, _RENAMEAT2, _PWRITEV, _WRITEV, _FALLOCATE, _TRUNCATE,
}  # fmt: skip
_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
_TRACESECCOMP, _EXITKILL = 0x80, 0x100000
_SECCOMP_STOP = signal.SIGTRAP | 7 << 8
_REGISTERS = struct.Struct("27Q")
_RDX, _RAX, _RSI, _RDI, _ORIG_RAX = 12, 10, 13, 14, 15
"""Places among the registers: third argument, result, second, first, number of the call."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long

End = Literal["before", "half", "power"]
ENDS: tuple[End, ...] = ("before", "half", "power")


@dataclass
class Fate:
    """What is to happen in a child: it dies at call `death`, and call `full` finds no space."""

    end: End = "before"
    death: int | None = None
    full: int | None = None


def run_in_child(work: Callable[[], int], folder: Path, fate: Fate | None) -> tuple[int, int]:
    """Run `work` in a child under `fate`, where calls are counted that change what is in `folder`;
    with None as any program.

    Returns:
        The exit status, negative for a signal, and how many calls there were.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(120)
            if fate is not None:
                _be_traced()
            code = work()
        except BaseException:  # noqa: BLE001 - the child ends here
            traceback.print_exc()
        finally:
            # Nothing of the parent's may run here, not even after an error.
            os._exit(code)
    if fate is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0
    return _Tracer(child, folder, fate).run()


def _be_traced() -> None:
    """Let the parent see each of the calls before it is made."""
    checked(_libc.ptrace(_TRACEME, 0, None, None))
    os.kill(os.getpid(), signal.SIGSTOP)
    numbers = sorted(_CALLS)
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the number of the call
    for i, number in enumerate(numbers):  # is it this one? then jump to the end
        program.append(struct.pack("HBBI", 0x15, len(numbers) - i, 0, number))
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow it
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FF00000))  # let the tracer see it
    text = ctypes.create_string_buffer(b"".join(program))
    filters = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(text))
    buffer = ctypes.create_string_buffer(filters)
    checked(_libc.prctl(38, 1, 0, 0, 0))  # no new privileges
    checked(_libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(buffer)), 0, 0))  # the filter


def checked(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass
class Disk:
    """What is on a disk whose power may be cut."""

    folder: Path
    rng: random.Random
    synced: dict[int, bytes] = field(default_factory=dict)
    """Of a file, by its inode, what it held when it was synced last."""
    names: dict[Path, dict[str, int]] = field(default_factory=dict)
    """Of a folder, the names that it had when it was synced last, and their inodes."""
    links: Path = field(init=False)
    """Where every inode that there was is kept."""

    def __post_init__(self) -> None:
        self.links = self.folder.with_name(f"{self.folder.name}.inodes")
        shutil.rmtree(self.links, ignore_errors=True)
        self.links.mkdir()
        for path in [self.folder, *self.folder.rglob("*")]:
            self.sync(path)

    def look(self) -> None:
        """Keep what is there, before a name may go."""
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                kept = self.links / str(path.stat().st_ino)
                if not kept.exists():
                    os.link(path, kept)

    def sync(self, path: Path) -> None:
        """All of a file, or the names in a folder, are on the disk."""
        if path.is_dir():
            self.names[path] = {each.name: each.stat().st_ino for each in path.iterdir()}
        elif path.is_file():
            self.synced[path.stat().st_ino] = path.read_bytes()
        self.look()

    def lose(self) -> None:
        """Cut power."""
        self.look()
        for kept in self.links.iterdir():
            kept.write_bytes(self._left(kept.read_bytes(), self.synced.get(int(kept.name), b"")))
        self._restore(self.folder)
        for path in list(self.folder.rglob("*")):
            if path.is_file():  # no name of two is left for one file
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)

    def _left(self, now: bytes, synced: bytes) -> bytes:
        """Of what was written since the last sync, some blocks are there and some are not."""
        if now == synced or self.rng.random() < 0.5:
            return synced
        size = self.rng.choice([len(now), len(synced)])
        blocks = []
        for start in range(0, size, 512):
            block = self.rng.choice([now, synced])[start : start + 512]
            blocks.append(block.ljust(min(512, size - start), b"\0"))
        return b"".join(blocks)

    def _restore(self, folder: Path) -> None:
        known = self.names.get(folder, {})
        there = {each.name: each.stat().st_ino for each in folder.iterdir()}
        for name in sorted({*known, *there}):
            path = folder / name
            if known.get(name) != there.get(name):
                self._give_back(path, known.get(name))
            if path.is_dir():
                self._restore(path)

    def _give_back(self, path: Path, inode: int | None) -> None:
        kept = self.links / str(inode)
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        if inode is not None and kept.exists():
            os.link(kept, path)
        elif inode is not None:
            path.mkdir()


class _Tracer:
    def __init__(self, child: int, folder: Path, fate: Fate) -> None:
        self._child = child
        self._folder = str(folder)
        self._fate = fate
        self._disk = Disk(folder, random.Random(fate.death)) if fate.end == "power" else None
        self._calls = 0

    def run(self) -> tuple[int, int]:
        self._wait()
        self._trace(_SETOPTIONS, _TRACESECCOMP | _EXITKILL)
        signalled = 0
        while True:
            self._trace(_CONT, signalled)
            status = self._wait()
            if status is None:
                if self._disk is not None:
                    self._disk.lose()
                return self._status, self._calls
            signalled = 0
            if status >> 8 == _SECCOMP_STOP:
                self._before_call()
            else:
                signalled = os.WSTOPSIG(status)

    def _wait(self) -> int | None:
        _, status = os.waitpid(self._child, 0x40000000)
        if os.WIFSTOPPED(status):
            return status
        self._status = os.waitstatus_to_exitcode(status)
        return None

    def _trace(self, request: int, data: int) -> None:
        if _libc.ptrace(request, self._child, None, data) == -1:
            number = ctypes.get_errno()
            if number != errno.ESRCH:  # it was killed; `_wait` says so
                raise OSError(number, os.strerror(number))

    def _before_call(self) -> None:
        buffer = ctypes.create_string_buffer(_REGISTERS.size)
        checked(_libc.ptrace(_GETREGS, self._child, None, buffer))
        registers = list(_REGISTERS.unpack(buffer.raw))
        path = self._path(registers)
        if path is None:
            return
        number, call = registers[_ORIG_RAX], self._calls
        self._calls += 1
        if call == self._fate.death:
            self._die(registers)
        elif call == self._fate.full:
            registers[_ORIG_RAX] = 2**64 - 1  # no call at all
            registers[_RAX] = 2**64 - errno.ENOSPC
            self._set(registers)
        elif self._disk is not None:
            self._disk.look()
            if number in (_FSYNC, _FDATASYNC):
                self._disk.sync(Path(path))

    def _path(self, registers: list[int]) -> str | None:
        """What the call is about, if it is in the folder and changes something."""
        number, first = registers[_ORIG_RAX], registers[_RDI]
        if number in (_OPEN, _OPENAT):
            flags = registers[_RSI if number == _OPEN else _RDX]
            if not flags & (os.O_CREAT | os.O_TRUNC):
                return None
        if number in _OF_DESCRIPTORS:
            try:
                path = os.readlink(f"/proc/{self._child}/fd/{first}").removesuffix(" (deleted)")
            except OSError:
                return None
        else:
            path = self._text(registers[_RSI] if number in _AT else first)
        inside = path == self._folder or path.startswith(f"{self._folder}/")
        return path if inside else None

    def _text(self, address: int) -> str:
        with open(f"/proc/{self._child}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return os.fsdecode(memory.read(4096).partition(b"\0")[0])

    def _set(self, registers: list[int]) -> None:
        buffer = ctypes.create_string_buffer(_REGISTERS.pack(*registers), _REGISTERS.size)
        checked(_libc.ptrace(_SETREGS, self._child, None, buffer))

    def _die(self, registers: list[int]) -> None:
        if self._fate.end == "half" and registers[_ORIG_RAX] in (_WRITE, _PWRITE):
            registers[_RDX] = random.Random(self._calls).randrange(registers[_RDX] + 1)
            self._set(registers)
            self._trace(_SYSCALL, 0)
            self._wait()
        os.kill(self._child, signal.SIGKILL)


_OF_DESCRIPTORS = (
    *(_WRITE, _PWRITE, _WRITEV, _PWRITEV),
    *(_FSYNC, _FDATASYNC, _FTRUNCATE, _FALLOCATE),
)
_AT = (_OPENAT, _MKDIRAT, _UNLINKAT, _RENAMEAT, _RENAMEAT2)
