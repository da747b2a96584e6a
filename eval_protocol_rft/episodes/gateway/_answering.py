"""An answer over HTTP: whole, as events, or as an error in the shape of its protocol.

Invariant: a stream never just ends: it is whole, or its last event is an error. Errors before the
first byte are statuses of HTTP, which clients try again as they see fit. An answer counts as had
once all of it was written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from http import HTTPStatus
from types import ModuleType

import msgspec
from aiohttp import web

from eval_protocol_rft._text import text_of
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply
from eval_protocol_rft.episodes.gateway._pending import PendingCall
from eval_protocol_rft.episodes.gateway._protocol import keep_alive

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 10.0
"""Between the comments of a stream whose answer is still being sampled."""
_WRITE_BYTES = 16_384
"""Of events that are written at once."""


async def answer(
    request: web.Request, api: ModuleType, call: ModelCall, pending: PendingCall
) -> web.StreamResponse:
    """Write the answer of a call as its request wants it.

    Raises:
        CallError: there is none, and nothing was written.
    """
    with pending.fetched():
        if call.stream:
            return await _stream(request, api, call, pending)
        reply = await _reply_to(pending)
        response = web.Response(
            body=msgspec.json.encode(api.reply_body(call, reply)), content_type="application/json"
        )
        await response.prepare(request)
        await response.write_eof()
        pending.is_answered = True
        return response


async def _reply_to(pending: PendingCall) -> Reply:
    """Its answer, which is sampled to the end although this client may leave.

    Raises:
        CallError: there is none.
    """
    try:
        return await asyncio.shield(pending.task)
    except asyncio.CancelledError:
        if pending.task.cancelled():
            raise CallError("this session is over", status=403, code="session_over") from None
        raise


async def _stream(
    request: web.Request, api: ModuleType, call: ModelCall, pending: PendingCall
) -> web.StreamResponse:
    """The answer as events; comments until it is there. An error before the first byte is a status
    of HTTP, as clients expect."""
    response = None
    await asyncio.wait({pending.task}, timeout=KEEP_ALIVE_SECONDS)
    while not pending.task.done():
        response = response or await _begin_stream(request)
        await response.write(keep_alive)
        await asyncio.wait({pending.task}, timeout=KEEP_ALIVE_SECONDS)
    try:
        parts = list(_batched(api, call, await _reply_to(pending)))
    except Exception as error:
        if response is None:
            raise
        if not isinstance(error, CallError):
            logger.exception("a call of an agent failed")
            error = own_fault(error)
        await response.write(api.error_event(error))
        await response.write_eof()
        return response
    response = response or await _begin_stream(request)
    for part in parts:
        await response.write(part)
    await response.write_eof()
    pending.is_answered = True
    return response


async def _begin_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"content-type": "text/event-stream", "cache-control": "no-cache"}
    )
    await response.prepare(request)
    return response


def _batched(api: ModuleType, call: ModelCall, reply: Reply) -> Iterator[bytes]:
    """Events, several to a write: each write is a system call and a chunk."""
    waiting: list[bytes] = []
    size = 0
    for event in api.reply_events(call, reply):
        waiting.append(event)
        size += len(event)
        if size > _WRITE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def error_response(api: ModuleType, error: CallError) -> web.Response:
    """A refusal. Where every attempt that the run allows was made, the client is told not to try
    again."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = f"{error.retry_after:g}"
    elif error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        headers["x-should-retry"] = "false"
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(api.error_body(error)),
        content_type="application/json",
        headers=headers,
    )


def own_fault(error: Exception) -> CallError:
    """A fault of the gateway's, as an error."""
    return CallError(
        f"the gateway failed: {type(error).__name__}: {text_of(error)}",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
    )
