"""A worker process as the pool sees it, and the fork server that makes it fast to replace.

Invariant: a worker that was ended is gone when `bury` returns, with what its evaluator started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import msgspec

from eval_protocol_rft.scoring.executors import _messages
from eval_protocol_rft.scoring.executors._fork_server import END, SUPERVISOR
from eval_protocol_rft.scoring.executors._messages import LOADING, Message, longest_answer

_CHUNK = 1 << 20
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
_BURIAL_SECONDS = 5.0
"""How long a supervisor may take to end a worker before it is ended itself."""


@dataclass(slots=True)
class Call:
    """An item on its way to a result."""

    item: _messages.ScoringItem
    losses: int = 0
    """Workers that died, or hung, with it."""
    began: float = 0.0
    """When a worker got it, on the monotonic clock."""


class WorkerProcess:
    """A worker and the calls that it has."""

    def __init__(self, setup: _messages.Setup) -> None:
        key = secrets.token_bytes(32)
        self.channel, channel_theirs = socket.socketpair()
        self.life, life_theirs = socket.socketpair()
        try:
            _SERVER.fork_worker(life_theirs, channel_theirs)
        finally:
            channel_theirs.close()
            life_theirs.close()
        self.channel.setblocking(False)
        self.life.setblocking(False)
        self.is_ready = False
        self.calls: dict[int, Call] = {}
        """By number."""
        self.given = 0
        """Calls that it has or had."""
        self.is_alone = False
        """Whether it is to have no other call beside the one that it has."""
        self.seen = 0.0
        """When it last said something, or got a call while it had none, on the monotonic clock."""
        self._frames = _messages.Frames(key)
        self._reports = bytearray()
        """By the supervisor."""
        self._is_buried = False
        """The supervisor is gone, and so is the worker."""
        self._has_ended = False
        """Nothing more will come through the channel."""
        body = msgspec.msgpack.encode(msgspec.structs.replace(setup, key=key))
        self._unsent = bytearray(_messages.frame(b"", LOADING, body))
        self.send()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def is_fresh(self) -> bool:
        """It has run nothing that may have left something behind."""
        return not self.given

    def is_first(self, number: int) -> bool:
        """Whether it had run nothing before that call, and runs nothing beside it."""
        return number == 1 == self.given

    def give(self, call: Call) -> None:
        """Hand over a call."""
        call.began = time.monotonic()
        if not self.calls:
            self.seen = call.began
        self.given += 1
        self.calls[self.given] = call
        self._unsent += _messages.frame(b"", self.given, msgspec.msgpack.encode(call.item.views))
        self.send()

    def send(self) -> None:
        """Send what it takes now; a worker that hangs takes nothing."""
        try:
            while self._unsent:
                count = self.channel.send(self._unsent[:_CHUNK])
                del self._unsent[:count]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # it is dead, as reading will tell

    def read(self) -> tuple[int, Message] | None:
        """What it says next, and of which call; None: nothing yet, or nothing more, which `is_over`
        tells apart.

        Raises:
            RubbishError: someone wrote into its channel.
        """
        self._listen()
        with contextlib.suppress(BlockingIOError):
            while not self._has_ended:
                data = self._received()
                self._frames.feed(data)
                self._has_ended = not data
        received = self._frames.take(self._longest)
        if received is None:
            return None
        number, body = received
        try:
            message = _DECODER.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _messages.RubbishError from error
        self.seen = time.monotonic()
        return number, message

    def _longest(self, number: int) -> int:
        """Bytes that it may say of a call; of one that it does not have, nothing."""
        if number == LOADING:
            return longest_answer(1)
        return longest_answer(len(self.calls[number].item.views)) if number in self.calls else -1

    def _received(self) -> bytes:
        try:
            return self.channel.recv(_CHUNK)
        except BlockingIOError:
            raise
        except OSError:
            return b""

    @property
    def is_over(self) -> bool:
        return self._has_ended

    def _listen(self) -> None:
        """Read what the supervisor says; a supervisor that is gone has ended its worker."""
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = self.life.recv(64)
                except ConnectionError:
                    data = b""
                self._reports += data
                if not data or len(self._reports) >= SUPERVISOR.size + END.size:
                    self._is_buried = True
                    return

    def let_go(self) -> None:
        """There is no more to do: let it end by itself."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Have its supervisor end it and whatever its evaluator started; `bury` comes next."""
        with contextlib.suppress(OSError):
            self.life.shutdown(socket.SHUT_WR)

    def bury(self) -> tuple[int | None, int]:
        """Wait until it is gone, and free what it held here.

        Returns:
            Its exit code, and the number of the call whose code ran then; 0: not known.
        """
        self._listen()
        # Told nothing, there is no process yet: it will find that we are gone.
        if self._reports and not self.wait(_BURIAL_SECONDS):
            (supervisor,) = SUPERVISOR.unpack_from(self._reports)
            for number in (signal.SIGCONT, signal.SIGKILL):
                with contextlib.suppress(OSError):
                    os.kill(supervisor, number)
            self.wait(_BURIAL_SECONDS)
        self.channel.close()
        self.life.close()
        if len(self._reports) < SUPERVISOR.size + END.size:
            return None, 0
        code, running = END.unpack_from(self._reports, SUPERVISOR.size)
        return code, running

    def wait(self, seconds: float) -> bool:
        """Whether it is gone within so many seconds."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.life, selectors.EVENT_READ)
            while not self._is_buried:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                selector.select(left)
                self._listen()
        return True


class _ForkServer:
    """The one of this process; started when the first worker is needed, and again if it dies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork_worker(self, life: socket.socket, channel: socket.socket) -> None:
        """Have a worker forked that has these ends.

        Raises:
            ScoringError: no fork server can be started.
        """
        with self._lock:
            for _ in range(2):
                if self._process is None or self._process.poll() is not None:
                    self._start()
                assert self._control is not None  # noqa: S101 - narrows the type
                try:
                    socket.send_fds(self._control, [b"w"], [life.fileno(), channel.fileno()])
                    return
                except OSError:
                    self.stop()
        raise _messages.ScoringError(
            "the process that grading workers are forked from dies at once"
        )

    def _start(self) -> None:
        self.stop()
        self._control, theirs = socket.socketpair()
        # The evaluator was loaded here before: what it took of Eval Protocol, every worker will.
        decorated = "eval_protocol.pytest.evaluation_test" in sys.modules
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from eval_protocol_rft.scoring.executors._fork_server import main; "
            f"main(decorated={decorated})"
        )
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # A session of its own: Ctrl-C is for us alone, and workers have no terminal.
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, *flags, "-c", code], stdin=theirs.fileno(), start_new_session=True
        )
        theirs.close()

    def stop(self) -> None:
        """It ends when it finds that nobody is there."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        self._control = self._process = None

    def forget(self) -> None:
        """After a fork it is the parent's."""
        if self._control is not None:
            self._control.close()
        self._lock = threading.Lock()
        self._control = self._process = None


_SERVER = _ForkServer()
atexit.register(_SERVER.stop)
os.register_at_fork(after_in_child=_SERVER.forget)


def in_words(code: int | None) -> str:
    """An exit code in words; a negative one is the signal that ended the process."""
    if code is None:
        return "with the process that guards it"
    name = ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = f", {signal.Signals(-code).name}"
    return f"exit code {code}{name}"
