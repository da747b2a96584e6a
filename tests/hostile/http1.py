"""Reading requests, by hand: no HTTP library stands between a fault and the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

LONGEST_HEAD = 1 << 16


class NoRequestError(Exception):
    """The client closed the connection, or sent what is no request."""


async def read_request(reader: asyncio.StreamReader) -> tuple[str, Mapping[str, str], Any]:
    """The path, the headers (names in lower case) and the JSON body of the next request.

    Raises:
        NoRequestError: there is none.
    """
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        _method, path, _version = lines[0].split(" ")
        pairs = [line.partition(":") for line in lines[1:] if line]
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await _chunks(reader)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        return path, headers, json.loads(body)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError) as error:
        raise NoRequestError(str(error)) from None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readuntil(b"\r\n")
    return body
