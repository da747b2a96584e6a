"""Tools of MCP servers, as the official client (package `mcp`) speaks to them over stdio and HTTP.

Invariant: a session lives in one task of its own, in an event loop that no episode runs in: who
calls may be cancelled, or belong to a loop that ends, and the session goes on. What was started is
ended: by `McpServers.close`, or with the process. A server that dies, hangs or answers nonsense is
an error of the call that met it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar

from eval_protocol_rft._text import text_of, without_url_users
from eval_protocol_rft.episodes._mcp_config import (
    Config,
    McpServerError,
    ServerSettings,
    filled_in,
    process_environment,
    read_config,
    secrets_of,
)

if TYPE_CHECKING:
    from mcp import ClientSession
    from mcp.types import CallToolResult, Tool

T = TypeVar("T")
_STARTING_SECONDS = 30.0
"""A server has, from its start until its tools are listed. One that hangs is ended then, and the
next episode starts it anew; so it is less than an episode waits for its environment."""
_PING_SECONDS = 20.0
"""A server that others use has to answer a ping; longer than most of its calls keep it busy."""
_ENDING_SECONDS = 10.0
"""A server has to end; the client itself ends one by force after four."""
_SHOWN = 500
"""Characters of what a server wrote to its standard error that an error shows."""


class McpServers:
    """MCP servers that episodes share: `ToolLoop(mcp=servers)` in each of them.

    They are started when the first episode needs them, one that has died when the next does, and
    ended by `close`, or with the process. A `ToolLoop` that is given a configuration instead has
    servers of its own.

    Args:
        config: path of a JSON file with `mcpServers`, as Eval Protocol's `mcp_config_path` and most
            MCP clients have it, or what would be in it: of each server `command`, `args`, `env`,
            `cwd`, or `url`, `authorization`, `headers`.

    Raises:
        McpServerError: the configuration is wrong.
    """

    def __init__(self, config: Config) -> None:
        self._servers = [_Server(name, one) for name, one in read_config(config).items()]

    async def tools(self) -> list[McpTool]:
        """Their tools; starts them.

        Raises:
            McpServerError: one cannot be started, or two have a tool of one name.
        """
        found: dict[str, McpTool] = {}
        for server in self._servers:
            for tool in await _elsewhere(server.tools()):
                if tool.name in found:
                    both = f"{found[tool.name].server.name!r} and {server.name!r}"
                    raise McpServerError(f"MCP servers {both} both have a tool {tool.name!r}")
                found[tool.name] = McpTool(server, tool)
        return list(found.values())

    async def aclose(self) -> None:
        """End them; those who use them are told so."""
        open_ones = [server for server in self._servers if server.is_open]
        await asyncio.gather(*(_elsewhere(server.close()) for server in open_ones))

    def close(self) -> None:
        """`aclose` where no event loop is running."""
        asyncio.run(self.aclose())


class McpTool:
    """A tool of a server."""

    def __init__(self, server: _Server, tool: Tool) -> None:
        self.server, self.name = server, tool.name
        self.schema: Mapping[str, Any] = {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.inputSchema,
            },
        }

    def arguments(self, text: str) -> dict[str, Any]:
        """The call's arguments; the server checks them.

        Raises:
            ValueError: no JSON object; in words for the model.
        """
        try:
            given = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"wrong arguments: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"wrong arguments: a JSON object is needed, not {text[:100]}")
        return given

    async def invoke(self, arguments: Mapping[str, Any]) -> str:
        """What it answers, as text for the model.

        Raises:
            McpServerError: the server did not answer.
        """
        return result_text(await _elsewhere(self.server.call(self.name, dict(arguments))))


def result_text(result: CallToolResult) -> str:
    """The result of a call as Eval Protocol's own agent shows it to a model: its structured content
    where there is some, else its text; an error says that it is one."""
    if result.structuredContent:
        text = json.dumps(result.structuredContent)
    else:
        text = "\n".join(map(_part_text, result.content))
    if result.isError and not text.startswith("Error"):
        text = f"Error: {text}"
    return text


def _part_text(part: Any) -> str:
    if part.type == "text":
        return str(part.text)
    if part.type == "resource_link":
        return str(part.uri)
    if part.type == "resource" and hasattr(part.resource, "text"):
        return str(part.resource.text)
    kind = getattr(part, "mimeType", None) or getattr(part, "type", "something")
    return f"({kind}, which is no text)"


class _Server:
    """A server and its session. All of it runs in the loop of `_elsewhere`."""

    def __init__(self, name: str, settings: ServerSettings) -> None:
        self.name, self.settings = name, settings
        self._lock: asyncio.Lock | None = None
        self._holding: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None]
        self._stop: asyncio.Event
        self._session: ClientSession | None = None
        self._tools: list[Tool] = []
        self._is_dead = False

    @property
    def is_open(self) -> bool:
        """Or being opened; from any thread."""
        return self._holding is not None

    async def tools(self) -> list[Tool]:
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if not await self._lives():
                await self.close()
                self._open()
            opened = self._opened
        # Whoever waits may be cancelled; the others go on waiting. They share one start, failed or
        # not: behind the lock each would wait for one of its own.
        await asyncio.shield(opened)
        return self._tools

    async def _lives(self) -> bool:
        import anyio
        import mcp

        if self._is_dead or self._holding is None or self._holding.done():
            return False
        if self._session is not None:
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    await self._session.send_ping()
            except mcp.McpError as error:  # one that knows no pings has answered too
                return error.error.code != mcp.types.CONNECTION_CLOSED
            except (anyio.ClosedResourceError, anyio.BrokenResourceError, TimeoutError):
                return False
        return True

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        import anyio
        import mcp

        if self._session is None:
            raise McpServerError(f"the MCP server {self.name!r} has ended")
        try:
            return await self._session.call_tool(tool, arguments)
        except mcp.McpError as error:
            self._is_dead |= error.error.code == mcp.types.CONNECTION_CLOSED
            raise self._error(f"the MCP server {self.name!r}: {text_of(error)}") from error
        except (anyio.ClosedResourceError, anyio.BrokenResourceError) as error:
            self._is_dead = True
            raise McpServerError(f"the MCP server {self.name!r} has ended") from error

    def _error(self, message: str) -> McpServerError:
        """An error that goes on record, without what the configuration keeps secret."""
        for secret in sorted(secrets_of(self.settings), key=len, reverse=True):
            message = message.replace(secret, "***")
        return McpServerError(without_url_users(message))

    async def close(self) -> None:
        holding, self._holding = self._holding, None
        if holding is None:
            return
        if self._session is None:
            holding.cancel()  # it is only being started
        self._stop.set()
        _, late = await asyncio.wait([holding], timeout=_ENDING_SECONDS)
        for task in late:
            task.cancel()

    def _open(self) -> None:
        self._stop, self._is_dead = asyncio.Event(), False
        self._opened = asyncio.get_running_loop().create_future()
        self._opened.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self._holding = asyncio.create_task(self._hold(self._opened, self._stop))
        _HELD.add(self._holding)
        self._holding.add_done_callback(_HELD.discard)

    async def _hold(self, opened: asyncio.Future[None], stop: asyncio.Event) -> None:
        """Have a session until it is closed."""
        import mcp

        starting = asyncio.timeout(_STARTING_SECONDS)
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            try:
                async with (
                    starting,
                    _streams(self.name, self.settings, stderr) as (read, write),
                    mcp.ClientSession(read, write) as session,
                ):
                    await session.initialize()
                    self._tools = await _all_tools(session)
                    self._session = session
                    starting.reschedule(None)
                    if not opened.done():
                        opened.set_result(None)
                    await stop.wait()
            # Whatever the client and its transports raise, in groups of groups.
            except Exception as error:  # noqa: BLE001
                self._is_dead = True
                if not opened.done():
                    reason = _reason(error)
                    if starting.expired():
                        reason = f"it did not answer within {_STARTING_SECONDS:g} s of its start"
                    message = f"the MCP server {self.name!r} cannot be used: {reason}"
                    opened.set_exception(self._error(message + _last_words(stderr)))
            finally:
                self._session = None
                if not opened.done():
                    opened.cancel()


async def _all_tools(session: ClientSession) -> list[Tool]:
    page = await session.list_tools()
    tools = list(page.tools)
    while page.nextCursor:
        page = await session.list_tools(page.nextCursor)
        tools += page.tools
    return tools


@contextlib.asynccontextmanager
async def _streams(
    name: str, settings: ServerSettings, stderr: IO[str]
) -> AsyncIterator[tuple[Any, Any]]:
    """What is read from a server, and written to it."""
    if settings.command is not None:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        process = StdioServerParameters(
            command=settings.command,
            args=settings.args,
            env=process_environment(name, settings.env),
            cwd=settings.cwd,
        )
        async with stdio_client(process, errlog=stderr) as streams:  # type: ignore[arg-type]
            yield streams
        return
    assert settings.url is not None  # noqa: S101 - one of them is there
    headers = {key: filled_in(value, name) for key, value in settings.headers.items()}
    if settings.authorization is not None:
        headers["Authorization"] = filled_in(settings.authorization, name)
    if settings.type == "sse":
        from mcp.client.sse import sse_client

        async with sse_client(settings.url, headers=headers) as streams:
            yield streams
        return
    import httpx
    from mcp.client.streamable_http import streamable_http_client

    times = httpx.Timeout(30.0, read=300.0)
    async with (
        httpx.AsyncClient(headers=headers, timeout=times, follow_redirects=True) as client,
        streamable_http_client(settings.url, http_client=client) as (read, write, _),
    ):
        yield read, write


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = text_of(error)
    return text if isinstance(error, McpServerError) else f"{type(error).__name__}: {text}"


def _last_words(stderr: IO[str]) -> str:
    stderr.seek(0)
    said = stderr.read().strip()
    return f"; it said: {said[-_SHOWN:]}" if said else ""


class _Loop:
    """An event loop in a thread of its own, begun when it is needed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: after a fork there is no thread."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True).start()
            return self._loop

    def end(self) -> None:
        """Before the process ends: no server is left behind."""
        if self._loop is None or not _HELD:
            return
        ending = asyncio.run_coroutine_threadsafe(_end_all(), self._loop)
        with contextlib.suppress(TimeoutError):
            ending.result(_ENDING_SECONDS)


async def _end_all() -> None:
    tasks = list(_HELD)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _elsewhere(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, from the loop of the sessions."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _LOOP.get()))


_HELD: set[asyncio.Task[None]] = set()
"""Sessions that are open, or are being opened or closed."""
_LOOP = _Loop()
atexit.register(_LOOP.end)


def _forget() -> None:
    _HELD.clear()
    _LOOP.forget()


if hasattr(os, "register_at_fork"):  # not everywhere
    os.register_at_fork(after_in_child=_forget)
