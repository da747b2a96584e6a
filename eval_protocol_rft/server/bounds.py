"""What one request may take of the server, and giving it back afterwards.

Invariant: nothing that a web page may send without the server's leave is read as a request; a body
is read no further than its bound; a server that is left alone holds no memory of what it did.
"""

from __future__ import annotations

import ctypes
import sys
from http import HTTPStatus

from starlette.requests import Request

from eval_protocol_rft.server.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20
"""A prompt of a million token ids, and then some."""


async def read_json_body(http: Request) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        ApiError: 415, it does not say so; 413, it has more than `MAX_BODY_BYTES`.
        ClientDisconnect: the client went away before the end.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            "send JSON, with the header 'content-type: application/json'",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            code=HTTPStatus.UNSUPPORTED_MEDIA_TYPE.name,
        )
    chunks, size = [], 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                f"the body has more than {MAX_BODY_BYTES} bytes: send fewer prompts in one request",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                code="REQUEST_ENTITY_TOO_LARGE",
            )
        chunks.append(chunk)
    return b"".join(chunks)


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can (glibc): it keeps the freed parts
    of every thread's heap otherwise, and a server that is left alone would hold them for ever."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
