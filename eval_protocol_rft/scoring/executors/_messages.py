"""What a caller and its workers say to each other: items in, results out, as sealed frames.

Invariant: what `Frames.take` gives was sent by the worker itself, for a call that it has. Whatever
else was written there (a forked evaluator that comes back, code that writes into every descriptor)
is `RubbishError`. Nothing is unpickled, and nothing is read beyond its limit.

Light, so that naming it costs no import.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.record import Score

_HEAD = struct.Struct("<QQ16s")
"""Number of the call, length of the body, and the seal of both."""
_HIGHEST_DESCRIPTOR = 4096
LOADING = 0
"""The number of the call that says what to load; others follow."""


class ScoringError(EvalProtocolRftError, RuntimeError):
    """Scoring cannot go on: not one item's fault, and the message says whose."""


class RubbishError(EvalProtocolRftError, ValueError):
    """Someone else wrote into the channel."""


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """One call of the evaluator."""

    key: Any
    """Opaque; given back with the results. It does not leave this process."""
    views: tuple[bytes, ...]
    """JSON of one EvaluationRow per completion: exactly one for a pointwise evaluator, else the
    completions to be scored in one call."""


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """What became of one item."""

    key: Any
    results: tuple[Score, ...]
    """One per view, in the order of the views."""
    seconds: float
    """How long the call took; until it was given up where it did not end by itself."""


def all_unscored(item: ScoringItem, error: str, seconds: float) -> ScoredItem:
    """The item, with no score and the same reason for each of its views."""
    return ScoredItem(item.key, (Score(error=error),) * len(item.views), seconds)


def late(limit: float | None) -> str:
    """What is said of an item that took longer than `limit` seconds."""
    return f"no result within {limit:g} s"


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to be like the process that asked for it: bytes as the system has them,
    for paths and the environment need not be UTF-8."""

    key: bytes = b""
    """Seals its answers."""
    timeout: float | None
    """Seconds for a call of an async evaluator. Of a sync one the caller keeps the time."""
    spec: bytes
    fingerprint: str
    cwd: bytes
    environ: dict[bytes, bytes]
    path: list[bytes]
    argv: list[bytes]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The evaluator is loaded; the first call may come."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What became of one call."""

    results: tuple[Score, ...]
    seconds: float
    is_sound: bool = True
    """False: the worker itself failed at the call, not the evaluator. An earlier call may have
    broken what the worker is made of."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The event loop of an async evaluator turns."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """No more answers will come from here, and why; the run should end."""

    reason: str


Message = Ready | Answer | Alive | Ended


def longest_answer(views: int) -> int:
    """Bytes that an answer for so many completions may have."""
    return (64 << 20) + (64 << 10) * views


def send(channel: WorkerChannel, number: int, message: Message, *, views: int = 1) -> None:
    """Send a message about the call of that number."""
    try:
        body = msgspec.json.encode(message)
        problem = f"is {len(body)} bytes long" if len(body) > longest_answer(views) else None
    except (TypeError, ValueError, RecursionError) as error:
        body, problem = b"", f"cannot be written as JSON: {type(error).__name__}"
    if problem is not None:
        result = Score(error=f"what the evaluator said {problem}")
        body = msgspec.json.encode(Answer((result,) * views, 0.0))
    channel.send(number, body)


def frame(key: bytes, number: int, body: bytes) -> bytes:
    return _HEAD.pack(number, len(body), _seal(key, number, body)) + body


def _seal(key: bytes, number: int, body: bytes) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little") + body, key=key, digest_size=16).digest()


class Frames:
    """Bytes in, frames out."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self, longest: Callable[[int], int]) -> tuple[int, bytes] | None:
        """The number of the first frame and its body, once all of it is there.

        Args:
            longest: how long the body of a frame of that number may be; below 0: there is none.

        Raises:
            RubbishError: what is there is no such frame.
        """
        if len(self._buffer) < _HEAD.size:
            return None
        number, length, seal = _HEAD.unpack_from(self._buffer)
        if length > longest(number):
            raise RubbishError
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_HEAD.size : end])
        if _seal(self._key, number, body) != seal:
            raise RubbishError
        del self._buffer[:end]
        return number, body


class WorkerChannel:
    """The worker's end. It is this process's alone: a fork closes it, another program never gets
    it, and its number is none that a loop over descriptors begins with."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = _out_of_the_way(ours)
        self._pid = os.getpid()
        status = os.fstat(self._socket.fileno())
        self._identity = status.st_dev, status.st_ino
        os.register_at_fork(after_in_child=self._socket.close)
        self._key = b""

    def receive(self) -> tuple[int, bytes]:
        """The next call.

        Raises:
            EOFError: there are no more.
        """
        self._end_if_not_ours()
        number, length, _ = _HEAD.unpack(self._exactly(_HEAD.size))
        return number, self._exactly(length)

    def seal_with(self, key: bytes) -> None:
        self._key = key

    def send(self, number: int, body: bytes) -> None:
        self._end_if_not_ours()
        self._socket.sendall(frame(self._key, number, body))

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(data)

    def _end_if_not_ours(self) -> None:
        """A copy of the worker that came back from an evaluator must not answer for it, and a
        worker whose evaluator closed the channel cannot."""
        try:
            status = os.fstat(self._socket.fileno())
            ours = self._pid == os.getpid() and self._identity == (status.st_dev, status.st_ino)
            os.set_blocking(self._socket.fileno(), True)
        except OSError:
            ours = False
        if not ours:
            os._exit(0)


def _out_of_the_way(ours: socket.socket) -> socket.socket:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    top = (
        _HIGHEST_DESCRIPTOR if limit == resource.RLIM_INFINITY else min(limit, _HIGHEST_DESCRIPTOR)
    )
    lowest = random.randrange(top // 2, top - 8) if top >= 64 else 3  # noqa: S311
    moved = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest)
    ours.close()
    return socket.socket(fileno=moved)
