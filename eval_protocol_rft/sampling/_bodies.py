"""Reading a reply's body: bounded, and without waiting for a connection that has died.

Invariant: no reply, whatever a server sends, takes more memory than its request could explain. A
body that was not read to its end is never returned.
"""

from __future__ import annotations

import re

import aiohttp

from eval_protocol_rft.sampling._clock import Deadline
from eval_protocol_rft.sampling._types import (
    AttemptTimeoutError,
    ContractError,
    SamplingParams,
    TokenIds,
)

STREAM_FROM_TOKENS = 4096
"""From this max_tokens on replies are streamed: such a generation takes minutes, in which a
connection that died would otherwise look like one that is busy."""
STALL_SECONDS = 30.0
"""A stream that has begun and is silent for so long is dead. Servers pause for seconds at most."""
ERROR_BYTES = 1 << 16
_DONE = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\](?:\r\n|\n|\r){2}")
"""The last event, whole: as a line of its own, and with the blank line that ends it. A text may
hold the same words."""
_LONGEST_DONE = 20
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


def reply_limit(prompt: TokenIds, params: SamplingParams) -> int:
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


async def read_stream(response: aiohttp.ClientResponse, *, limit: int) -> bytes:
    """A whole event stream, up to its `[DONE]`, or what arrived before it ended otherwise.

    Raises:
        AttemptTimeoutError: it had begun, and then nothing came for `STALL_SECONDS`.
        ContractError: it is longer than `limit` bytes.
        aiohttp.ClientError, OSError, TimeoutError: it broke off.
    """
    body = bytearray()
    # Before the first event the request may be waiting in the server's queue.
    silence = Deadline(None)
    try:
        async with silence:
            while chunk := await response.content.readany():
                body += chunk
                if len(body) > limit:
                    raise _too_long(limit)
                if _is_done(body, len(chunk)):
                    break
                silence.restart(STALL_SECONDS)
    except TimeoutError:
        if not silence.expired():
            raise
        raise AttemptTimeoutError(
            f"the stream stalled for {STALL_SECONDS:g} s after {len(body)} bytes"
        ) from None
    return bytes(body)


def _is_done(body: bytearray, new: int) -> bool:
    """Whether the last event is among the `new` last bytes."""
    # Found by its words first: the pattern alone would cost more than parsing the events.
    at = body.rfind(b"[DONE]", max(0, len(body) - new - _LONGEST_DONE))
    return at >= 0 and _DONE.search(body, max(0, at - _LONGEST_DONE)) is not None


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
