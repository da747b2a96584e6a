"""One request and the hands that answer it: everything that a fault can do to a reply.

Invariant: `whole` becomes true only when a true reply, rightly framed, was given to the socket to
its last byte.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import random
import socket
import struct
import termios
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.hostile.replies import DONE, Dialect, chunks_of, dumps, event, truth_of, whole_reply

Headers = Iterable[tuple[str, str]]

LAST_CHUNK = b"0\r\n\r\n"


class ClientGoneError(Exception):
    """The client closed its end: nothing more can be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, read whole."""

    connection: int
    """Number of the connection that it came over, from 0."""
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    """Names in lower case."""
    prompt: tuple[int, ...]
    seed: int
    """The request's own, or one of the server's that no other request has."""
    attempt: int
    """1 for the first request with this prompt and seed, 2 for the next, ..."""

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


def head(status: int, headers: Headers = (), *, reason: str = "Whatever") -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """One chunk of `Transfer-Encoding: chunked`."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Exchange:
    """Answers one request. Writing to a client that has gone raises `ClientGoneError`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        request: Request | None,
        dialect: Dialect,
        rng: random.Random,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._request = request
        self.rng = rng
        """Seeded by what was asked, so that a run can be repeated."""
        self.reply: Any = None
        """The whole reply as JSON; a fault may change it before it is sent."""
        self.keep_open = True
        """Whether the connection serves another request afterwards."""
        self.whole = False
        self.written_at = 0.0
        """When the last piece was given to the socket, on the monotonic clock."""
        self.surplus = False
        """A reply that nobody asked for was sent on a connection that stays open."""
        self.sent = 0
        """Bytes given to the socket."""
        self._dialect: Dialect = dialect
        if request is not None:
            self.reply = self.reply_with_seed(request.seed)

    @property
    def request(self) -> Request:
        assert self._request is not None, "this fault strikes before a request is read"
        return self._request

    def reply_with_seed(self, seed: int) -> Any:
        """The whole true reply to this prompt with a seed."""
        request = self.request
        return whole_reply(
            request.body,
            truth_of(request.prompt, seed, request.body.get("max_tokens")),
            name=f"cmpl-{seed}-{request.attempt}",
            dialect=self._dialect,
        )

    def pieces(self) -> list[bytes]:
        """The reply's body: its events where a stream was asked for, else all in one."""
        if not self.request.streamed:
            return [dumps(self.reply)]
        return [*map(event, self.chunks()), DONE]

    def chunks(self) -> list[Any]:
        """The reply as the chunks of a stream."""
        options = self.request.body.get("stream_options") or {}
        counts = self._dialect == "fireworks" or options.get("include_usage", False)
        return chunks_of(self.reply, counts=counts)

    def kind_header(self) -> tuple[str, str]:
        kind = "text/event-stream" if self.request.streamed else "application/json"
        return ("Content-Type", kind)

    async def honest(self) -> None:
        """The true reply, as a good server sends it."""
        await self.answer(self.pieces())
        self.whole = True

    async def answer(
        self, pieces: list[bytes], *, status: int = 200, headers: Headers = ()
    ) -> None:
        """A well-framed reply: a stream in chunks, anything else with its length."""
        headers = [self.kind_header(), *headers]
        if self.request.streamed and status == 200:
            await self.write(head(status, [*headers, ("Transfer-Encoding", "chunked")]))
            for piece in filter(None, pieces):  # an empty chunk would be the last
                await self.write(chunk(piece))
            await self.write(LAST_CHUNK)
        else:
            body = b"".join(pieces)
            await self.write(head(status, [*headers, ("Content-Length", str(len(body)))]) + body)

    async def write(self, data: bytes) -> None:
        if self._writer.transport.is_closing():
            raise ClientGoneError
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise ClientGoneError from None
        self.sent += len(data)
        self.written_at = time.monotonic()

    async def drip(self, data: bytes, *, pause: float, size: int = 1) -> None:
        """A little at a time."""
        for at in range(0, len(data), size):
            await self.write(data[at : at + size])
            await asyncio.sleep(pause)

    async def stall(self) -> None:
        """Say nothing more until the client has gone."""
        self.keep_open = False
        try:
            while await self._reader.read(1 << 16):
                pass
        except OSError:
            pass

    def client_is_silent(self) -> bool:
        """Nothing of a next request has arrived, not even in the kernel."""
        waiting = array.array("i", [0])
        connection = self._writer.get_extra_info("socket")
        fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
        # Streams have no other way to look without taking.
        return not waiting[0] and not self._reader._buffer

    def close(self) -> None:
        """End in good order, whatever was or was not sent."""
        self.keep_open = False
        self._writer.close()

    def half_close(self) -> None:
        """Send the end of our stream and leave the other direction open."""
        self.keep_open = False
        try:
            self._writer.write_eof()
        except OSError:
            raise ClientGoneError from None

    def reset(self) -> None:
        """Answer with RST: what the kernel still held is lost, too."""
        self.keep_open = False
        connection: socket.socket = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
