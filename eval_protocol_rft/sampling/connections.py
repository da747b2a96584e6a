"""Which pooled connections may carry a request.

Invariant: a connection on which something came in unasked, or over which a reply came that was not
ours, is closed: HTTP/1.1 has nothing else to tell one request's reply from another's.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

import aiohttp


class UntrustedConnectionError(Exception):
    """Something came in on an idle connection. Nothing was sent, and it is out of the pool."""


class TracedResponse(aiohttp.ClientResponse):
    """A reply that knows its connection even after that has gone back to the pool."""

    came_over: asyncio.Transport | None = None


class TrustingRequest(aiohttp.ClientRequest):
    """A request that looks at its connection before it trusts it."""

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        if conn.protocol is not None and (
            conn.protocol.should_close or (_was_used(conn) and _says_something(conn.transport))
        ):
            conn.close()
            raise UntrustedConnectionError
        transport = conn.transport
        response = await super().send(conn)
        if isinstance(response, TracedResponse):
            response.came_over = transport
        return response


def distrust(response: aiohttp.ClientResponse) -> None:
    """Close the connection that `response` came over; a request that is on it already fails, and
    is made again."""
    if isinstance(response, TracedResponse) and response.came_over is not None:
        response.came_over.close()


def _was_used(conn: Any) -> bool:
    """Whether it carried a request before. A fresh one may have bytes waiting: the tickets of a
    TLS session."""
    used = getattr(conn.protocol, "ep_rft_used", False)
    conn.protocol.ep_rft_used = True
    return used


def _says_something(transport: asyncio.Transport | None) -> bool:
    """Whether something waits in the kernel that the event loop has not seen yet."""
    if transport is None:
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))
