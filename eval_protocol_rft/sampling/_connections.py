"""Connections: looked at before they are given out, probed while they are silent, closed where they
are not to be trusted.

Invariant: a connection on which something came in unasked, or over which a reply came that was not
ours, is closed: HTTP/1.1 has nothing else to tell one request's reply from another's. Of aiohttp
this needs `BaseConnector.connect`, which gives out a connection for each request, and of a
connection's protocol `should_close`, which also says whether something came in unasked.
"""

from __future__ import annotations

import asyncio
import select
import socket
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import aiohttp

from eval_protocol_rft.sampling._clock import Deadline

if TYPE_CHECKING:
    from aiohttp.connector import Connection

KEEPALIVE_SECONDS = 4.0
"""uvicorn, and so vLLM and SGLang, closes an idle connection after 5 s, under the next request."""
NO_CLOCKS = aiohttp.ClientTimeout(total=None, sock_connect=None)
"""aiohttp's run on while the loop is blocked; ours are `Deadline`s."""
CONNECT_SECONDS = 30.0
"""To connect, with what TLS and a proxy need to say first."""

last_connection: ContextVar[asyncio.Transport | None] = ContextVar("last_connection", default=None)
"""What the newest request of this task goes over. A reply forgets its connection at its end."""


class TrustingConnector(aiohttp.TCPConnector):
    """Looks at a connection before it gives it out; the clock of connecting is the loop's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        """Carried a request before."""

    async def connect(self, *request: Any, **more: Any) -> Connection:
        """A connection, from the pool or new, on which nothing has come in unasked.

        Raises:
            TimeoutError: there was none within `CONNECT_SECONDS`.
            aiohttp.ClientConnectionError: it could not be made, or the server spoke first.
        """
        while True:
            async with Deadline(CONNECT_SECONDS):
                connection = await super().connect(*request, **more)
            transport, protocol = connection.transport, connection.protocol
            was_used = transport in self._known
            spoke = protocol is not None and protocol.should_close
            if not spoke and not (was_used and _says_something(transport)):
                if transport is not None:
                    if not was_used:
                        _probe_while_silent(transport)
                    self._known.add(transport)
                last_connection.set(transport)
                return connection
            connection.close()
            if not was_used:
                raise aiohttp.ClientConnectionError(
                    "the server disconnected, or said something, before it was asked"
                )


TCP_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence before TCP asks whether the other end is there, seconds between its questions,
and how many of them may stay unanswered: a connection whose other end is gone fails in 30 s."""


def _probe_while_silent(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_PROBES.items():
        # macOS calls the first one TCP_KEEPALIVE.
        option = getattr(socket, name, getattr(socket, "TCP_KEEPALIVE", None))
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def require_looked_at() -> None:
    """Check that this task's newest reply came over a connection that was looked at.

    Raises:
        RuntimeError: aiohttp gives connections out elsewhere; no reply can be trusted then.
    """
    if last_connection.get() is None:
        raise RuntimeError(
            f"aiohttp {aiohttp.__version__} does not give out connections by "
            "BaseConnector.connect, so replies cannot be told apart: install an older one, and "
            "please report it to the authors of eval-protocol-rft"
        )


def distrust(transport: asyncio.Transport | None) -> None:
    """Close the connection that a reply came over; a request that is on it already fails, and is
    made again."""
    if transport is not None:
        transport.close()


def _says_something(transport: asyncio.Transport | None) -> bool:
    """Whether something waits in the kernel that the event loop has not seen yet. Not for a new
    connection, where it may be what resumes a TLS session later."""
    if transport is None:
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))
