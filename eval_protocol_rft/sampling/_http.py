"""`HttpSampler`: one request, one reply. Transport only.

Invariant: one call of `sample` is one HTTP request. It retries nothing, follows no redirect, and
whatever goes wrong leaves as a `SamplingError` in which no secret appears. No reply, whatever a
server sends, takes more memory than its request could explain, and a body that was not read to its
end is never returned.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import aiohttp

from eval_protocol_rft._text import well_formed
from eval_protocol_rft.sampling import _endpoint, _types
from eval_protocol_rft.sampling._clock import Deadline, loop_clock
from eval_protocol_rft.sampling._connections import (
    KEEPALIVE_SECONDS,
    NO_CLOCKS,
    TrustingConnector,
    distrust,
    last_connection,
    require_looked_at,
)
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._event_stream import EventStream
from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._limits import RunStoppedError
from eval_protocol_rft.sampling._replies import short, status_error
from eval_protocol_rft.sampling._types import (
    Completion,
    ContractError,
    SamplingError,
    SamplingParams,
)

STREAM_FROM_TOKENS = 4096
"""From this max_tokens on replies are streamed: such a generation takes minutes, in which a server
that hangs, or died behind a gateway or tunnel that did not, looks like one that is busy (TCP's
probes see the next hop alone), and in which gateways cut silent connections."""
STALL_SECONDS = 30.0
"""A stream that has begun and is silent for so long is dead. Servers pause for seconds at most."""
LONGEST_NAP = 0.5
"""Seconds for which a stream is not read, so that its next events are read at once: alone, each
costs ten times as much (30 microseconds) to be received as to be understood."""
_NAP_SHARE = 0.02
"""Of a stream's age: what is short does not wait."""
_SHORTEST_NAP = 0.01
ERROR_BYTES = 1 << 16
_AFTER_DONE_SECONDS = 0.5
"""How long to wait for the end of a finished stream, so that its connection can be used again."""
_BASE_BYTES = 1 << 20
_BYTES_PER_TOKEN = 4096
"""An event per token, with text, both logprobs and some alternatives, takes some 500."""
_BYTES_PER_PROMPT_TOKEN = 64
_UNBOUNDED_TOKENS = 1 << 17
"""Where max_tokens is left to the server."""


def streams(params: SamplingParams) -> bool:
    """Whether to ask for a stream: as the user said, or where the generation may be long."""
    if params.stream is not None:
        return params.stream
    return params.max_tokens is None or params.max_tokens >= STREAM_FROM_TOKENS


def reply_limit(prompt: _types.TokenIds, params: SamplingParams) -> int:
    """Most bytes that a reply can have that was asked for."""
    tokens = params.max_tokens or _UNBOUNDED_TOKENS
    return _BASE_BYTES + _BYTES_PER_TOKEN * tokens + _BYTES_PER_PROMPT_TOKEN * len(prompt)


async def read_body(response: aiohttp.ClientResponse, *, limit: int) -> bytes:
    """A whole body; an error's is cut at `limit`, it is only shown.

    Raises:
        ContractError: a reply of status 200 is longer than `limit` bytes, decompressed.
        aiohttp.ClientError, OSError, TimeoutError: it did not arrive whole.
    """
    parts: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            if response.status != 200:
                break
            raise _too_long(limit)
    return b"".join(parts)


async def read_stream(response: aiohttp.ClientResponse, *, limit: int) -> EventStream:
    """A whole event stream, up to its `[DONE]`, or what arrived before it ended otherwise.

    Raises:
        SamplingError: of kind `timeout`, it had begun, and then nothing came for `STALL_SECONDS`.
        ContractError: it is longer than `limit` bytes, or no event stream.
        aiohttp.ClientError, OSError, TimeoutError: it broke off.
    """
    stream = EventStream()
    # Before the first event the request may be waiting in the server's queue.
    silence = Deadline(None)
    began = 0.0
    try:
        async with silence:
            while chunk := await response.content.readany():
                began = began or loop_clock().now()
                if stream.size + len(chunk) > limit:
                    raise _too_long(limit)
                if stream.feed(chunk):
                    break
                silence.restart(STALL_SECONDS)
                await _let_pile_up(loop_clock().now() - began)
    except TimeoutError:
        if not silence.expired():
            raise
        raise SamplingError(
            f"the stream stalled for {STALL_SECONDS:g} s after {stream.size} bytes", kind="timeout"
        ) from None
    return stream


async def _let_pile_up(age: float) -> None:
    """Leave what comes next in the kernel for a while. `age`: seconds since the stream began."""
    transport, seconds = last_connection.get(), min(age * _NAP_SHARE, LONGEST_NAP)
    if transport is None or seconds < _SHORTEST_NAP:
        return
    transport.pause_reading()
    try:
        await loop_clock().nap(seconds)
    finally:
        transport.resume_reading()


async def read_to_the_end(response: aiohttp.ClientResponse) -> None:
    """Take what follows `[DONE]`, which is nothing but the end of the body. Never fails."""
    try:
        async with Deadline(_AFTER_DONE_SECONDS):
            while await response.content.readany():
                pass
    except (TimeoutError, aiohttp.ClientError, OSError):
        response.close()


def _too_long(limit: int) -> ContractError:
    return ContractError(f"the reply is longer than {limit} bytes, more than was asked for")


_QUEUE_HEADERS = ("fireworks-prefill-queue-duration", "fireworks-generation-queue-duration")
_LONGEST_REQUEST_ID = 256
_LONGEST_UNREADABLE = 120
"""Characters of what is no HTTP that an error shows."""
_REQUEST_ID_HEADERS = ("x-request-id", "x-fireworks-request-id", "cf-ray")


class HttpSampler:
    """Samples from one endpoint's `/completions`. Belongs to the event loop that first uses it."""

    knows_logprobs = False
    """Whether what `logprobs_mode` says of the server needs no check."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._url = f"{endpoint.base_url}/completions"
        self._tells_affinity = not _endpoint.has_own_affinity(endpoint.headers)
        self._session: aiohttp.ClientSession | None = None
        self._closing: AsyncGenerator[None] | None = None
        self._proxy: str | None = None
        self._secrets = endpoint.secrets

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """Make one request; see `Sampler.sample`.

        Raises:
            SamplingError: of kind `refused` or `unavailable`, the server answered with an error;
                `connection` or `timeout`, no whole answer arrived.
            ContractError: the answer is not exact token data.
        """
        prompt = (
            prompt_ids if isinstance(prompt_ids, _types.TokenIds) else _types.TokenIds(prompt_ids)
        )
        try:
            return await self._attempt(prompt, params, seed)
        except SamplingError as error:
            # Secrets first: what is cut short could leave the first half of one.
            error.args = tuple(short(self._without_secrets(str(arg))) for arg in error.args)
            # What it came from may hold the request with its headers, and so the key.
            error.__cause__ = error.__context__ = None
            raise

    async def aclose(self) -> None:
        if self._closing is not None:
            closing, self._closing = self._closing, None
            await closing.aclose()

    async def _attempt(
        self, prompt: _types.TokenIds, params: SamplingParams, seed: int | None
    ) -> Completion:
        if self._session is None:
            self._proxy = _endpoint.proxy_for(self._url)
            self._secrets = (*self._endpoint.secrets, *_endpoint.proxy_passwords(self._proxy))
            self._open()
            self._closing = self._until_the_end()
            await anext(self._closing)
        assert self._session is not None  # noqa: S101 - narrows the type
        streamed = streams(params)
        affinity = _endpoint.affinity_of(prompt, params) if self._tells_affinity else None
        limit = Deadline(params.timeout)
        last_connection.set(None)
        try:
            async with (
                limit,
                self._session.post(
                    self._url,
                    data=_endpoint.request_body(
                        prompt,
                        params,
                        seed,
                        stream=streamed,
                        is_fireworks=self._endpoint.is_fireworks,
                        prompt_cache_key=affinity if self._endpoint.is_fireworks else None,
                    ),
                    headers={_endpoint.AFFINITY_HEADER: affinity} if affinity else None,
                    timeout=NO_CLOCKS,
                    allow_redirects=False,
                    proxy=self._proxy,
                ) as response,
            ):
                require_looked_at()
                if response.status != 200:
                    body = await read_body(response, limit=ERROR_BYTES)
                elif streamed:
                    stream = await read_stream(response, limit=reply_limit(prompt, params))
                    # The reply is there: what is left concerns its connection alone.
                    limit.stop()
                    await read_to_the_end(response)
                else:
                    body = await read_body(response, limit=reply_limit(prompt, params))
        except aiohttp.ClientHttpProxyError as error:
            raise _proxy_error(error) from None
        except aiohttp.ConnectionTimeoutError as error:
            raise SamplingError(f"{self._url}: {error_text(error)}", kind="connection") from None
        except TimeoutError as error:
            if limit.expired():
                raise SamplingError(
                    f"{self._url}: no whole reply within {params.timeout:g} s", kind="timeout"
                ) from None
            raise SamplingError(f"{self._url}: {error_text(error)}", kind="connection") from None
        except aiohttp.InvalidURL:
            raise _types.RefusedError(f"{self._url} is not a URL") from None
        # OSError: a reset socket can surface unwrapped.
        except (aiohttp.ClientError, OSError) as error:
            raise SamplingError(f"{self._url}: {error_text(error)}", kind="connection") from None
        if response.status != 200:
            # Before the message is shortened, which could leave the first half of a secret.
            text = self._without_secrets(body.decode("utf-8", errors="replace"))
            raise status_error(
                response.status, text.encode(), response.headers, now=datetime.now(UTC)
            )
        request_id = _request_id(response)
        try:
            [completion] = (
                decode_stream(stream, prompt, params, request_id=request_id)
                if streamed
                else decode_reply(body, prompt, params, request_id=request_id)
            )
        except ContractError:
            # It may be the reply to another request: then ours is still to come over this
            # connection, and whoever asked next would take it for theirs.
            distrust(last_connection.get())
            raise
        queued = _queue_seconds(response)
        return completion if queued is None else replace(completion, queue_seconds=queued)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def _until_the_end(self) -> AsyncGenerator[None]:
        """Closes the session when it is closed itself: by `aclose`, or by the event loop, which
        ends what is left of such generators before it ends. Recipes close nothing, and aiohttp
        prints a page about each session that is left open."""
        try:
            yield
        finally:
            session, self._session = self._session, None
            if session is not None:
                await session.close()

    def _open(self) -> None:
        # The caller bounds requests in flight; a second bound here would only hide the first.
        connector = TrustingConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={
                "content-type": "application/json",
                **_endpoint.endpoint_headers(self._endpoint),
            },
            cookie_jar=aiohttp.DummyCookieJar(),
        )


_REACH_PAUSES = (1.0, 2.0)
"""Seconds between tries: enough for a server that starts anew."""
_REACH_SECONDS = 10.0
"""To connect."""


async def reach(endpoint: Endpoint) -> None:
    """See that something is there, whatever it says and however long it takes, before a run waits
    for a server that never was.

    Raises:
        RunStoppedError: nobody can be connected with.
    """
    url = f"{endpoint.base_url}/models"
    clocks = aiohttp.ClientTimeout(total=None, sock_connect=_REACH_SECONDS, sock_read=1.0)
    async with aiohttp.ClientSession(
        headers=_endpoint.endpoint_headers(endpoint), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        for pause in (*_REACH_PAUSES, None):
            try:
                async with session.get(
                    url, timeout=clocks, allow_redirects=False, proxy=_endpoint.proxy_for(url)
                ):
                    return
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                if pause is None:
                    raise RunStoppedError(
                        f"no connection to {endpoint.place}: {error_text(error)}. See that the "
                        "server is running, and that this is its address"
                    ) from None
                await asyncio.sleep(pause)
            except (aiohttp.ClientError, OSError):
                return  # somebody is there


def _proxy_error(error: aiohttp.ClientHttpProxyError) -> SamplingError:
    """The proxy did not connect us."""
    refusal = status_error(error.status, b"", error.headers or {}, now=datetime.now(UTC))
    message = f"the proxy answered {error.status} {error.message}"
    refusal.args = (message,)
    return refusal


def error_text(error: Exception) -> str:
    """What aiohttp says went wrong, without the parts of a reply that some of its errors carry."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "ServerDisconnectedError: the server disconnected before its reply was whole"
    if isinstance(error, aiohttp.ClientResponseError):
        # Its status, 400, is aiohttp's word for bytes that it cannot read; the server said none.
        said = " ".join(error.message.split())
        return f"the reply cannot be read as HTTP: {said[:_LONGEST_UNREADABLE]}"
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _queue_seconds(response: aiohttp.ClientResponse) -> float | None:
    """Seconds in the server's queues before prefill and decoding, by Fireworks' headers."""
    values = [response.headers.get(name) for name in _QUEUE_HEADERS]
    try:
        seconds = [float(value) for value in values if value is not None]
    except ValueError:
        return None
    return sum(seconds) if seconds and all(0 <= value < math.inf for value in seconds) else None


def _request_id(response: aiohttp.ClientResponse) -> str | None:
    names = (name for name in _REQUEST_ID_HEADERS if name in response.headers)
    text = next((response.headers[name] for name in names), None)
    # aiohttp decodes bytes that are no UTF-8 to halves of surrogate pairs.
    return text and well_formed(text)[:_LONGEST_REQUEST_ID]
