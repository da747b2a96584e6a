"""The real client of the control plane, fast where it would wait, and killed where a test says."""

from __future__ import annotations

import re
from typing import Any

import fireworks
import httpx

from tests.service import KEY


class Killed(BaseException):
    """The process dies here. No handler of errors may take it for one."""


class DyingTransport(httpx.AsyncBaseTransport):
    """Dies at the `at`-th request: before it is sent, or after its answer came."""

    def __init__(self, at: int, *, answered: bool) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._left = at
        self._answered = answered

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._left -= 1
        if self._left == 0 and not self._answered:
            raise Killed
        response = await self._inner.handle_async_request(request)
        if self._left == 0:
            await response.aread()
            raise Killed
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class DyingAfterPost(httpx.AsyncBaseTransport):
    """Dies when the first POST to a collection was answered."""

    def __init__(self, collection: str) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._collection = collection

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if request.method == "POST" and request.url.path.endswith(f"/{self._collection}"):
            await response.aread()
            raise Killed
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class Faltering(httpx.AsyncBaseTransport):
    """Answers 503 three times to requests of a kind, once `after` of them went well."""

    def __init__(self, kind: str, *, after: int) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._kind = re.compile(kind)
        self._seen = -after

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._kind.match(f"{request.method} {request.url.path}"):
            self._seen += 1
            if 0 < self._seen <= 3:
                return httpx.Response(503, text="overloaded", request=request)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def client(url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> Any:
    """An `AsyncFireworks` that does not repeat requests: it repeats a 409 too."""
    return fireworks.AsyncFireworks(
        api_key=KEY,
        account_id="acc",
        base_url=url,
        max_retries=0,
        http_client=httpx.AsyncClient(transport=transport or httpx.AsyncHTTPTransport()),
    )
