"""`ToolLoop`: the model calls tools until it answers without a call. Tools are plain Python
functions, and those of MCP servers.

Invariant: whatever goes wrong with a call (unknown tool, arguments that are no JSON or do not fit,
an exception, a call that takes too long, an answer that is too long or no JSON, a server that died)
is told to the model as the tool's answer; the model may try again.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call
from eval_protocol_rft.episodes._environment import Environment, Step
from eval_protocol_rft.sampling import sampling_time

if TYPE_CHECKING:
    from eval_protocol.models import Message

    from eval_protocol_rft.episodes._mcp import McpServers, McpTool
    from eval_protocol_rft.episodes._mcp_config import Config

TOOL_SECONDS = 30.0
TOOL_CHARACTERS = 100_000
"""More than most contexts have room for."""


class ToolLoop(Environment):
    """Runs the tools that the model calls.

    Args:
        functions: plain functions, sync or async. Name, docstring and annotated parameters make
            the schema that the prompt describes; arguments are checked against it.
        mcp: MCP servers whose tools there are too: a configuration (path of a JSON file with
            `mcpServers`, or what would be in it), whose servers are started for each episode, or
            `McpServers`, which episodes share.
        seconds: the calls of one turn may take together; less than `step_seconds` of
            `EpisodeLimits`, which fails the episode.
        characters: an answer may have.
    """

    _servers: Sequence[McpServers] = ()
    _own_servers: Sequence[McpServers] = ()

    def __init__(
        self,
        *functions: Callable[..., Any],
        mcp: Config | McpServers | None = None,
        seconds: float = TOOL_SECONDS,
        characters: int = TOOL_CHARACTERS,
    ) -> None:
        if not functions and mcp is None:
            raise ValueError("no tools: pass at least one function, or mcp=")
        self._tools: dict[str, _Tool | McpTool] = {
            function.__name__: _Tool(function) for function in functions
        }
        if mcp is not None:
            self.add_mcp(mcp)
        self._seconds = seconds
        self._characters = characters
        self._describe()

    def add_mcp(self, mcp: Config | McpServers) -> None:
        """More MCP servers, before the episode begins.

        Raises:
            McpServerError: the configuration is wrong.
        """
        from eval_protocol_rft.episodes._mcp import McpServers

        if not isinstance(mcp, McpServers):
            mcp = McpServers(mcp)
            self._own_servers = [*self._own_servers, mcp]
        self._servers = [*self._servers, mcp]

    def _describe(self) -> None:
        self.tools = [tool.schema for tool in self._tools.values()]

    async def _open_tools(self) -> None:
        for servers in self._servers:
            for tool in await servers.tools():
                if tool.name in self._tools:
                    raise ValueError(f"two tools have the name {tool.name!r}")
                self._tools[tool.name] = tool
        self._describe()

    async def _close_tools(self) -> None:
        for servers in self._own_servers:
            await servers.aclose()

    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        calls = assistant.tool_calls or []
        if not calls:
            return Step(done=True)
        deadline = sampling_time() + self._seconds
        results = [
            {
                "role": "tool",
                "tool_call_id": one.id,
                "name": one.function.name,
                "content": await self._run(one.function.name, one.function.arguments, deadline),
            }
            for one in calls
        ]
        return Step(messages=results, metrics={"tool_calls": len(results)})

    async def _run(self, name: str, arguments: str, deadline: float) -> str:
        left = deadline - sampling_time()
        if left <= 0:
            return f"Error: not called: the calls before it took {self._seconds:g} s"
        tool = self._tools.get(name)
        if tool is None:
            return f"Error: there is no tool {name!r}; there are {', '.join(self._tools)}"
        try:
            given = tool.arguments(arguments)
        except ValueError as error:
            return f"Error: {error}"
        try:
            invoke = functools.partial(tool.invoke, given)
            result = await call(invoke, what=f"{name}()", seconds=left)
            answer = result if isinstance(result, str) else json.dumps(result, default=str)
        except EnvironmentFaultError as error:
            return f"Error: {error}"
        except (TypeError, ValueError, RecursionError) as error:
            return f"Error: what {name}() returned is no JSON: {error}"
        if len(answer) > self._characters:
            return (
                f"Error: {name}() returned {len(answer)} characters, more than the "
                f"{self._characters} that can be shown: ask for less"
            )
        return answer


class _Tool:
    """A function and its parameters as a schema."""

    def __init__(self, function: Callable[..., Any]) -> None:
        import pydantic

        self.function = function
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(
                    f"{function.__name__}({parameter}): a tool's parameters have names"
                )
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (annotation, default)
        self._model = pydantic.create_model(
            function.__name__, __config__=pydantic.ConfigDict(extra="forbid"), **fields
        )
        parameters = self._model.model_json_schema()
        parameters.pop("title", None)
        parameters.pop("additionalProperties", None)
        for described in parameters.get("properties", {}).values():
            described.pop("title", None)
        parameters.setdefault("properties", {})
        self.schema: Mapping[str, Any] = {
            "type": "function",
            "function": {
                "name": function.__name__,
                "description": inspect.getdoc(function) or "",
                "parameters": parameters,
            },
        }

    def arguments(self, text: str) -> dict[str, Any]:
        """The call's arguments as the function takes them.

        Raises:
            ValueError: no JSON object, or one that does not fit; in words for the model.
        """
        from pydantic import ValidationError

        try:
            given = self._model.model_validate_json(text or "{}")
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}"
                for one in error.errors(include_url=False)
            )
            raise ValueError(f"wrong arguments: {problems}") from error
        return {name: getattr(given, name) for name in type(given).model_fields}

    def invoke(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns; an awaitable where it is async."""
        return self.function(**arguments)


def with_mcp(
    factory: Callable[[], Environment] | None, config_path: str
) -> Callable[[], Environment]:
    """`factory`, which makes a `ToolLoop`, with the servers of `mcp_config_path` of an evaluation
    test; without one, a `ToolLoop` with these alone."""
    if factory is None:
        return functools.partial(ToolLoop, mcp=config_path)

    def made() -> Environment:
        environment = factory()
        if not isinstance(environment, ToolLoop):
            raise TypeError(
                f"mcp_config_path is for a ToolLoop, and this is a {type(environment).__name__}"
            )
        environment.add_mcp(config_path)
        return environment

    made.__name__ = getattr(factory, "__name__", type(factory).__name__)
    return made
