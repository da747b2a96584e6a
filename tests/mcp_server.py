"""An MCP server for tests: `python tests/mcp_server.py PIDS [PORT]`, by HTTP where there is a port.
Its process id goes into the folder PIDS once it runs."""

import asyncio
import os
import sys
from pathlib import Path

from mcp.server.fastmcp import FastMCP, Image
from mcp.types import CallToolResult, TextContent

server = FastMCP("tests", log_level="ERROR")
notes: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def note(text: str) -> str:
    """Write it down; tells all notes."""
    notes.append(text)
    return " ".join(notes)


@server.tool(structured_output=False)
def parts() -> list[str]:
    """Two texts."""
    return ["one", "two"]


@server.tool()
def picture() -> Image:
    """No text."""
    return Image(data=b"\x89PNG", format="png")


@server.tool()
def refuse() -> CallToolResult:
    """An error by itself."""
    return CallToolResult(content=[TextContent(type="text", text="no")], isError=True)


@server.tool()
async def wait() -> str:
    """For ever."""
    await asyncio.Event().wait()
    return "too late"


@server.tool()
def die() -> str:
    """The process ends."""
    os._exit(3)


if __name__ == "__main__":
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    if len(sys.argv) > 2:
        server.settings.port = int(sys.argv[2])
        server.run("streamable-http")
    server.run()
