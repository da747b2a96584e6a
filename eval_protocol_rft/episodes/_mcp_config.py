"""What a file of `mcpServers` says: MCP servers as Eval Protocol and most clients name them.

Invariant: a value that may be a key goes to its server, and into no error.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError

_SHORTEST_SECRET = 6
"""Characters. Shorter values are words as any."""


class McpServerError(EvalProtocolRftError, RuntimeError):
    """A server's configuration is wrong, it cannot be started, or a call of it failed."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A server in a configuration file: `command` or `url`."""

    command: str | None = None
    args: list[str] = []
    env: list[str] | dict[str, str] = []
    """Names that must be set in the environment, as Eval Protocol has it; or variables to set, as
    others do. The server has the whole environment of this process either way."""
    cwd: str | None = None
    url: str | None = None
    authorization: str | None = None
    headers: dict[str, str] = {}
    type: str | None = None
    """`sse` for the older transport over HTTP; else what `command` and `url` say."""


class _Configuration(msgspec.Struct):
    mcpServers: dict[str, ServerSettings]


Config = str | os.PathLike[str] | Mapping[str, Any]
"""Path of a JSON file with `mcpServers`, or what would be in it."""


def read_config(config: Config) -> dict[str, ServerSettings]:
    """The servers of a configuration, by name.

    Raises:
        McpServerError: it cannot be read, or is none.
    """
    try:
        if isinstance(config, Mapping):
            servers = msgspec.convert(dict(config), _Configuration).mcpServers
        else:
            servers = msgspec.json.decode(Path(config).read_bytes(), type=_Configuration).mcpServers
    except OSError as error:
        raise McpServerError(f"the MCP configuration cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        where = "" if isinstance(config, Mapping) else f" {os.fspath(config)}"
        raise McpServerError(f"the MCP configuration{where} is none: {error}") from error
    for name, server in servers.items():
        if (server.command is None) == (server.url is None):
            raise McpServerError(f"MCP server {name!r} needs either a command or a url")
        try:
            urlsplit(server.url or "")
        except ValueError as error:
            raise McpServerError(f"the url of MCP server {name!r} is none: {error}") from error
    return servers


def process_environment(name: str, env: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """The variables of a server's process.

    Raises:
        McpServerError: one that must be set is not.
    """
    if isinstance(env, Mapping):
        return {**os.environ, **{key: filled_in(value, name) for key, value in env.items()}}
    missing = [key for key in env if key not in os.environ]
    if missing:
        raise McpServerError(f"these environment variables are not set: {', '.join(missing)}")
    return dict(os.environ)


def filled_in(text: str, server: str) -> str:
    """`text` with the values of `${NAME}` and `$NAME`.

    Raises:
        McpServerError: there is no such variable.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise McpServerError(f"the environment variable {name} of server {server!r} is not set")
        return os.environ[name]

    return re.sub(r"\$\{([^}]+)\}|\$([A-Za-z_][A-Za-z0-9_]*)", value, text)


def secrets_of(settings: ServerSettings) -> set[str]:
    """What may be a key: values of headers and of variables that it sets or needs, and the URL's
    user, password and query."""
    values = [*settings.headers.values(), settings.authorization or ""]
    if isinstance(settings.env, Mapping):
        values += settings.env.values()
    else:
        values += [os.environ.get(name, "") for name in settings.env]
    url = urlsplit(settings.url or "")
    for part in (url.username or "", url.password or ""):
        values += (part, unquote(part))
    values += url.query.split("&")
    for value in list(values):
        with contextlib.suppress(McpServerError):
            values.append(filled_in(value, ""))
    words = {word for value in values for word in (value, *value.split(), value.split("=")[-1])}
    return {word for word in words if len(word) >= _SHORTEST_SECRET}
