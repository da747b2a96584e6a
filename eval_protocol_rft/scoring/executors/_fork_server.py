"""The process that workers are forked from, and the supervisor between it and each of them.

Invariant: a worker has the packages that all need, and nothing of the caller's: no module, no
descriptor, no terminal. Its supervisor is a process that runs none of the user's code. However the
worker ends or hangs, and if the caller is killed, the supervisor ends it with all that it started.
On Linux orphans come to the nearest subreaper, so a child that left its session, or whose parents
ended, is found.

    caller ── server ── supervisor ── worker ── what the evaluator starts
       └──────── life ──────┘           │
       └──────── channel ───────────────┘

What workers print goes through the supervisor, so that no terminal takes it for commands.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import gc
import io
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from eval_protocol_rft._text import visible_lines

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans. Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Die when the parent does, however that ends. Linux only."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def end_descendants(group: int | None = None, spare: Collection[int] = ()) -> None:
    """Kill all descendants and wait for those that are ours.

    Args:
        group: a process group to end as well, for systems without /proc.
        spare: children that stay, with what they started.
    """
    while True:
        if group is not None:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        children = [pid for pid in _children(os.getpid()) if pid not in spare]
        for pid in [*children, *(p for child in children for p in _descendants(child))]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        # Their children come to us when they are gone.
        if not [pid for pid in children if _is_reaped(pid)]:
            return


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, 0)[0] == pid
    except ChildProcessError:
        return False


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, file.read_text().split())
    return children


SUPERVISOR = struct.Struct("<i")
"""What a supervisor tells the caller first: its process id."""
END = struct.Struct("<iQ")
"""And last: the worker's exit code, and the number of the call whose code ran; 0: not known."""
_CHUNK = 1 << 16


def main(*, decorated: bool = True) -> None:
    """Serve until the caller is gone. In a forked worker: work, and end as any program does.

    Args:
        decorated: whether the evaluators are `@evaluation_test`s, which takes half a second to
            import.
    """
    # What is registered first runs last: after whatever the evaluator has registered.
    atexit.register(_leave)
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    _preload(decorated)
    work = _serve(control)
    if work is not None:
        try:
            work()
        except BaseException:
            atexit.unregister(_leave)
            raise


def _leave() -> None:
    """End with exit code 0 and nothing held back by open files, without taking the interpreter
    apart: after a fork this copies every page that it touches, for more than a second where much
    was imported."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        _write_out_files()
    os._exit(0)


_ENDING = (tempfile._TemporaryFileWrapper, zipfile.ZipFile, tarfile.TarFile)
"""What does something at its end and is no `BufferedIOBase`."""


def _write_out_files() -> None:
    """Of what was opened since the fork. Text goes first; then what has something to do at its end
    (temporary files to remove, archives and compressed files to end); then the rest, which these
    write into. No other is closed: a thread that waits to read from it would hold its lock."""
    objects = gc.get_objects()
    kinds = set(map(type, objects))
    texts = {kind for kind in kinds if issubclass(kind, io.TextIOBase)}
    buffers = {kind for kind in kinds if issubclass(kind, io.BufferedIOBase)}
    plain = {kind for kind in buffers if kind.__module__ == "_io"}
    ending = {kind for kind in kinds if issubclass(kind, _ENDING)} | buffers - plain
    for some, finish in ((texts, "flush"), (ending, "close"), (plain, "flush")):
        for file in (each for each in objects if type(each) in some):
            with contextlib.suppress(Exception):
                if isinstance(file, _ENDING) or file.writable():
                    getattr(file, finish)()


def _preload(decorated: bool) -> None:
    """Import, at once for every worker that is forked from here, what all need. The environment is
    set first, because importing Eval Protocol reads it. The user's module is not among them: one
    that starts threads or opens a device when imported must do so after the fork."""
    os.environ.setdefault("EP_NO_UPLOAD", "1")
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    # Recorded, not shown: deprecations inside libraries, which would be printed for every run.
    with warnings.catch_warnings(record=True):
        import eval_protocol_rft.scoring.executors._worker  # noqa: F401

        if decorated:
            from eval_protocol.pytest import evaluation_test  # noqa: F401
    # A worker's garbage collector would copy the pages of all this when it looks at it.
    gc.freeze()


def _serve(control: socket.socket) -> Callable[[], None] | None:
    adopt_orphans()
    caller = _Caller()
    supervisors: set[int] = set()
    with _Events(control, caller.fileno) as events:
        while True:
            ready = events.wait()
            if events.died in ready:
                for pid, _ in _reap():
                    supervisors.discard(pid)
                # A supervisor that was killed leaves us what its worker started.
                end_descendants(spare=supervisors)
            if caller.fileno in ready:
                return None
            if control in ready:
                message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
                if not message:
                    return None
                life, channel = (socket.socket(fileno=fd) for fd in descriptors)
                supervisor = os.fork()
                if supervisor == 0:
                    control.close()
                    events.close()
                    return _supervise(life, channel, caller)
                supervisors.add(supervisor)
                life.close()
                channel.close()


def _supervise(life: socket.socket, channel: socket.socket, caller: _Caller) -> Callable[[], None]:
    """Fork the worker, and return what it does; in the supervisor itself this never returns."""
    adopt_orphans()
    supervisor = os.getpid()
    (out, out_theirs), (err, err_theirs) = os.pipe(), os.pipe()
    running = memoryview(mmap.mmap(-1, 8)).cast("Q")
    worker = os.fork()
    if worker == 0:
        os.setsid()
        end_with_parent(supervisor)
        life.close()
        caller.close()
        os.dup2(out_theirs, 1)
        os.dup2(err_theirs, 2)
        for descriptor in (out, err, out_theirs, err_theirs):
            os.close(descriptor)
        return lambda: _work(channel, running)
    # Whatever goes wrong here, a supervisor never becomes a second server.
    code = -signal.SIGKILL
    try:
        channel.close()
        os.close(out_theirs)
        os.close(err_theirs)
        code = _watch(worker, life, caller, [_Relay(out, 1), _Relay(err, 2)])
        life.setblocking(True)
        life.sendall(END.pack(code, running[0]))
    finally:
        os._exit(0)


def _watch(worker: int, life: socket.socket, caller: _Caller, relays: list[_Relay]) -> int:
    """Until the worker is dead or is to be; its exit code. All that it started is dead then."""
    code: int | None = None
    with _Events(life, caller.fileno, *relays) as events:
        life.sendall(SUPERVISOR.pack(os.getpid()))
        while code is None:
            ready = events.wait()
            for relay in relays:
                if relay in ready and not relay.pass_on():
                    events.forget(relay)
            if events.died in ready:
                code = dict(_reap()).get(worker)
            if code is None and (life in ready or caller.fileno in ready):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    end_descendants(group=worker)
    for relay in relays:
        os.set_blocking(relay.fileno(), False)
        while relay.pass_on():
            pass
    return code


def _work(channel: socket.socket, running: memoryview) -> None:
    from eval_protocol_rft.scoring.executors._worker import work

    # Where memory runs out, it is this process's fault before it is the caller's.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.stdout = sys.__stdout__ = _printing_to(1)  # type: ignore[misc,assignment]
    sys.stderr = sys.__stderr__ = _printing_to(2)  # type: ignore[misc,assignment]
    work(channel, running)


def _printing_to(descriptor: int) -> TextIO:
    """Lines as they come: a worker that is killed has no time to print the rest."""
    return open(
        descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )


def _reap() -> list[tuple[int, int]]:
    """Children that are dead, with their exit codes."""
    dead = []
    with contextlib.suppress(ChildProcessError):
        while (waited := os.waitpid(-1, os.WNOHANG))[0]:
            dead.append((waited[0], os.waitstatus_to_exitcode(waited[1])))
    return dead


class _Caller:
    """Readable once the caller is dead: its children may hold its ends of our sockets open."""

    def __init__(self) -> None:
        self.fileno = -1
        with contextlib.suppress(AttributeError, OSError):
            self.fileno = os.pidfd_open(os.getppid())

    def close(self) -> None:
        if self.fileno >= 0:
            os.close(self.fileno)


class _Relay:
    """What a worker prints, on its way to a descriptor of ours."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def fileno(self) -> int:
        return self._source

    def pass_on(self) -> bool:
        """Pass on what is there; whether there may be more."""
        try:
            data = os.read(self._source, _CHUNK)
        except BlockingIOError:
            return False
        # A progress bar begins its line again with a carriage return.
        text = self._decoder.decode(data).replace("\r\n", "\n").replace("\r", "\n")
        rest = visible_lines(text).encode()
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._target, rest) :]
        return bool(data)


class _Events:
    """Waits for descriptors, and for the death of children."""

    def __init__(self, *sources: Any) -> None:
        self.died, self._signals = socket.socketpair()
        for end in (self.died, self._signals):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for source in (self.died, *sources):
            if source != -1:
                self._selector.register(source, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        # For those that died before.
        self._signals.send(b"\0")

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> set[Any]:
        ready = {key.fileobj for key, _ in self._selector.select()}
        if self.died in ready:
            with contextlib.suppress(BlockingIOError):
                while self.died.recv(_CHUNK):
                    pass
        return ready

    def forget(self, source: Any) -> None:
        self._selector.unregister(source)

    def close(self) -> None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        self.died.close()
        self._signals.close()
