"""Work that runs only for as long as somebody waits for it.

Invariant: when the client goes away or the server stops, the work is cancelled, and its end is
awaited before anything else is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from eval_protocol_rft.sampling.types import UnavailableError

_T = TypeVar("_T")


async def while_wanted(
    work: Coroutine[Any, Any, _T], *, http: Request, stopping: asyncio.Event
) -> _T:
    """Run `work` for a request whose body was read.

    Raises:
        ClientDisconnect: the client closed the connection first.
        UnavailableError: `stopping` was set first.
    """
    working = asyncio.ensure_future(work)
    watching = [
        asyncio.ensure_future(_client_leaves(http)),
        asyncio.ensure_future(_server_stops(stopping)),
    ]
    try:
        done, _ = await asyncio.wait([working, *watching], return_when=asyncio.FIRST_COMPLETED)
        return await (working if working in done else done.pop())
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _client_leaves(http: Request) -> NoReturn:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _server_stops(stopping: asyncio.Event) -> NoReturn:
    await stopping.wait()
    raise UnavailableError("the server is shutting down")
