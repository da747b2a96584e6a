"""The log of requests: what every client asked, and loudly what nothing here answers.

Invariant: a line is written for each request once it was answered, whatever became of it; no line
holds a key. What is shown can do nothing to a terminal, and no body is without end.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eval_protocol_rft.loop.service._names import now

UNANSWERED = "fireworks.unanswered"
"""Set in the scope of a request by an endpoint that answers for whole trees of paths."""
FILE = "requests.jsonl"
MOST_BODY_BYTES = 151 * 10**6
"""Of a request; an upload to an address of its own says before how many it has."""
_SHOWN_BYTES = 300
_NO_SUCH = (404, 405)
_SECRET = re.compile(r'("[^"]*(?:key|secret|token|password)[^"]*"\s*:\s*)"[^"]*"?', re.IGNORECASE)
_SECRET_IN_QUERY = re.compile(
    r"((?!pageToken=)[^&=]*(?:key|secret|token|password)[^&=]*=)[^&]*", re.IGNORECASE
)
_SIGNED = re.compile(r"^(/(?:up|down)loads/[^/]+/).*")


class RequestLog:
    """The file, and what is shown of it.

    Args:
        folder: gets `requests.jsonl`.
        print_line: takes a line for each request that is to be shown.
        show_all: show every request, and not only those that nothing answers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        print_line: Callable[[str], None],
        show_all: bool = False,
    ) -> None:
        self._print = print_line
        self._show_all = show_all
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            os.close(descriptor)

    def write(
        self,
        *,
        method: str,
        path: str,
        query: str,
        status: int | None,
        seconds: float,
        user_agent: str,
        unanswered: bool,
        who: str = "",
        body: bytes = b"",
    ) -> None:
        """One request. `status` is None where the answer was cut off; of `body`, the beginning is
        shown where nothing answers; `who` is the client library, where more than the agent
        tells it."""
        entry = {
            "time": now(),
            "method": method,
            "path": _SIGNED.sub(r"\1...", path),
            "query": _SECRET_IN_QUERY.sub(r"\1...", query),
            "status": status,
            "ms": round(seconds * 1000, 1),
            "user_agent": user_agent,
            "who": who or user_agent.split(" ")[0] or "unknown",
            "unanswered": unanswered,
        }
        if self._file >= 0:
            os.write(self._file, msgspec.json.encode(entry) + b"\n")
        if unanswered:
            self._print(_printable(_loud(entry, body[:_SHOWN_BYTES])))
        elif self._show_all:
            self._print(_printable(_line(entry)))


class RequestLogMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        began, status, beginning = time.perf_counter(), 0, bytearray()
        left = float("inf") if _SIGNED.match(scope["path"]) else MOST_BODY_BYTES

        async def noting_receive() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body has more than {MOST_BODY_BYTES} bytes")
            beginning.extend(message.get("body", b"")[: _SHOWN_BYTES - len(beginning)])
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Afterwards it cannot be had any more.
                if _unanswered(scope, status) and not beginning and _has_body(headers):
                    await noting_receive()
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        finally:
            agent = headers.get("user-agent", "")
            self._log.write(
                method=scope["method"],
                path=scope["path"],
                query=scope.get("query_string", b"").decode("latin-1"),
                status=status or None,
                seconds=time.perf_counter() - began,
                user_agent=agent,
                who=_who(agent, headers),
                unanswered=_unanswered(scope, status),
                body=bytes(beginning),
            )


def _unanswered(scope: Scope, status: int) -> bool:
    """No route, none for this method, or an endpoint that says that it does not know the path."""
    if scope.get(UNANSWERED):
        return True
    return status in _NO_SUCH and (status == 405 or "endpoint" not in scope)


def _who(agent: str, headers: dict[str, str]) -> str:
    """The client library, where other headers than the agent tell."""
    if version := headers.get("x-stainless-package-version"):
        return f"{agent.partition('/')[0] or 'stainless'} {version}"
    return ""


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _printable(line: str) -> str:
    """Without what moves a terminal's cursor or begins a line of its own."""
    return "".join(c if c.isprintable() else "?" for c in line)


def _line(entry: dict[str, Any]) -> str:
    query = f"?{entry['query']}" if entry["query"] else ""
    return (
        f"{entry['method']} {entry['path']}{query} {entry['status'] or 'cut off'} "
        f"{entry['ms']:g} ms, {entry['who']}"
    )


def _loud(entry: dict[str, Any], beginning: bytes) -> str:
    body = _SECRET.sub(r'\1"..."', beginning.decode("utf-8", "replace")).replace("\n", " ")
    return f"NOTHING HERE ANSWERS {_line(entry)} ({entry['user_agent'] or 'no user agent'})" + (
        f", body: {body}" if body else ""
    )
