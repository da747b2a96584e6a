"""A proxy in front of the local Fireworks that kills its process at chosen requests, and starts it
again: the client sees a connection that breaks, as it would of a machine that lost its power."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from tests.service import ServiceProcess
from tests.waiting import PATIENCE

_IDS = re.compile(
    r"(rlorTrainerJobs/acc|rlorTrainerJobs|deployments|checkpoints|datasets|models|deployedModels"
    r"|trainingShapes|versions)/(?!acc/)[^/:]+"
)
_HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding"}


def kind_of(method: str, path: str) -> str:
    """A request without the names in its path."""
    path = _IDS.sub(r"\1/*", path)
    return f"{method} {path}"


@dataclass
class Plan:
    """Which requests kill the server: the first of every kind, before it reaches the server and,
    at its second, after it was answered there; and others at random.

    Args:
        of_every_kind: as said.
        share: of all other requests.
        most: kills in all.
    """

    of_every_kind: bool = True
    share: float = 0.0
    most: int = 10**6
    seed: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    _seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def moment(self, kind: str) -> str | None:
        """`before` or `after` for a request that kills."""
        self._seen[kind] += 1
        if self.kills.total() >= self.most:
            return None
        chosen = None
        if self.of_every_kind and self._seen[kind] <= 2:
            chosen = ("before", "after")[self._seen[kind] - 1]
        elif self._random.random() < self.share:
            chosen = self._random.choice(("before", "after"))
        if chosen is not None:
            self.kills[kind] += 1
        return chosen


class KillingProxy:
    """Forwards requests to `server`; `url` is where clients find it."""

    def __init__(self, server: ServiceProcess, plan: Plan) -> None:
        self._server = server
        self._plan = plan
        self._restarting = threading.Lock()
        self.url = ""

    async def run(self, ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, shutdown_timeout=1, logger=logging.getLogger("proxy"))
        logging.getLogger("proxy").disabled = True  # connections break on purpose
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            ready.set()
            await stop.wait()
            await runner.cleanup()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        moment = self._plan.moment(kind_of(request.method, request.path))
        if moment == "before":
            await self._kill(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        try:
            async with self._session.request(
                request.method,
                self._server.url + request.path_qs,
                headers=headers,
                data=body,
                allow_redirects=False,
                auto_decompress=False,
            ) as answer:
                content = await answer.read()
        except aiohttp.ClientError:
            await self._break(request)
        if moment == "after":
            await self._kill(request)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
        if encoding := answer.headers.get("content-encoding"):
            kept["content-encoding"] = encoding
        return web.Response(status=answer.status, body=content, headers=kept)

    async def _kill(self, request: web.Request) -> None:
        await asyncio.to_thread(self._restart)
        await self._break(request)

    def _restart(self) -> None:
        with self._restarting:
            self._server.kill()
            self._server.start()

    async def _break(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()
        await asyncio.sleep(0)
        raise ConnectionResetError


@contextmanager
def killing_proxy(server: ServiceProcess, plan: Plan) -> Iterator[KillingProxy]:
    """Running in a thread of its own."""
    proxy = KillingProxy(server, plan)
    ready, loops = threading.Event(), []

    async def main() -> None:
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        await proxy.run(ready, stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield proxy
    finally:
        loop, stop = loops[0]
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)
