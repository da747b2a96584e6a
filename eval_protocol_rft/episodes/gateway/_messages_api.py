"""Anthropic Messages: a request's bytes to a `ModelCall`, a `Reply` to its answer.

Invariant: the blocks of a request keep their order: results of tools and text of one user's message
become one message each, what the assistant thought, said and called becomes one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply, ReplyChoice
from eval_protocol_rft.episodes.gateway._protocol import (
    Content,
    Count,
    Effort,
    MessageList,
    Sampling,
    StopText,
    check_tool_choice,
    check_type,
    event,
    function_tool,
    json_schema_format,
    pieces,
    read_request,
    read_shape,
    refusal,
    text_content,
    without_nulls,
)
from eval_protocol_rft.episodes.gateway._protocol import keep_alive as keep_alive

IGNORED = frozenset(
    {
        "cache_control",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
}
SIGNATURE = "unsigned"
"""Of thinking. Clients send a block back only where it has one; nothing is proved by it here."""
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class _Message(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class _ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Thinking(Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: str | None = None


class _Format(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    format: _Format | None = None


class _Request(Sampling, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_tokens: Count
    system: Content | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: dict[str, Any] | None = None
    stop_sequences: list[StopText] | None = None


class _Tool(Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    type: str | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool = False
    allowed_callers: list[Literal["direct"]] | None = None


class _Text(Struct):
    text: str


class _ThinkingBlock(Struct):
    thinking: str


class _ToolUse(Struct):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(Struct):
    tool_use_id: str
    content: Content | None = None


def read_call(body: bytes) -> ModelCall:
    """Read a request.

    Raises:
        CallError: 400, with the name of the field that is wrong or cannot be honoured.
    """
    request, ignored = read_request(body, _Request, ignored=IGNORED, unsupported=UNSUPPORTED)
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or [])]
    choice = request.tool_choice
    parallel = None
    if choice is not None and choice.disable_parallel_tool_use is not None:
        parallel = not choice.disable_parallel_tool_use
    output = read_shape(without_nulls(request.output_config or {}), _OutputConfig, "output_config")
    effort: str | None = output.effort
    if request.thinking is not None and request.thinking.type == "disabled":
        effort = "none"
    elif request.thinking is not None:
        # A model thinks as its template says, and no budget ends it: on record, for it is no limit.
        ignored["thinking"] = without_nulls(msgspec.to_builtins(request.thinking))
    settings = request.settings()
    settings["stop"] += tuple(request.stop_sequences or ())
    return ModelCall(
        protocol="messages",
        **settings,
        messages=_messages(request),
        tools=tools or None,
        max_tokens=request.max_tokens,
        tool_choice=_tool_choice(choice, tools),
        parallel_tool_calls=parallel,
        response_format=(
            json_schema_format("output", output.format.schema, strict=True)
            if output.format
            else None
        ),
        reasoning_effort=effort,
        ignored=ignored,
    )


def _messages(request: _Request) -> list[dict[str, Any]]:
    """The system prompt, then the messages."""
    read = MessageList()
    if request.system is not None and request.system != []:
        read.add({"role": "system", "content": text_content(request.system, "system")})
    for index, message in enumerate(request.messages):
        where = f"messages[{index}].content"
        read.end_turn()
        if message.role == "assistant":
            _read_assistant(message.content, where, read)
        elif isinstance(message.content, str):
            read.add({"role": message.role, "content": message.content})
        elif message.content:
            _read_blocks(message.role, message.content, where, read)
        else:
            raise refusal(where, "there is nothing in it")
    if request.messages[-1].role == "assistant":
        last = f"messages[{len(request.messages) - 1}].role"
        raise refusal(last, "prefill is not supported: the last message must not be an assistant's")
    return read.messages


def _read_blocks(role: str, blocks: list[dict[str, Any]], where: str, read: MessageList) -> None:
    """Add what a user says: one message for each result of a tool, one for texts in a row."""
    texts: list[dict[str, Any]] = []
    allowed = ("text", "tool_result") if role == "user" else ("text",)
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        check_type(block, place, *allowed)
        if block["type"] == "text":
            if not texts:
                read.add({"role": role, "content": texts})
            texts.append({"type": "text", "text": read_shape(block, _Text, place).text})
            continue
        texts = []
        result = read_shape(block, _ToolResult, place)
        content = text_content(result.content or "", f"{place}.content")
        read.add({"role": "tool", "tool_call_id": result.tool_use_id, "content": content})


def _read_assistant(content: str | list[dict[str, Any]], where: str, read: MessageList) -> None:
    """Add what the assistant thought, said and called."""
    if isinstance(content, str) or not content:
        read.say(content if isinstance(content, str) else "")
        return
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        check_type(block, place, "text", "thinking", "tool_use")
        match block["type"]:
            case "text":
                read.say(read_shape(block, _Text, place).text)
            case "thinking":
                read.think(read_shape(block, _ThinkingBlock, place).thinking)
            case _:
                called = read_shape(block, _ToolUse, place)
                read.call(called.id, called.name, json.dumps(called.input, ensure_ascii=False))


def _tool(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool, which must be one that the client runs."""
    check_type(fields, where, "custom", None)
    tool = read_shape(without_nulls(fields), _Tool, where)
    if tool.defer_loading:
        raise refusal(f"{where}.defer_loading", "all tools are shown to the model from the start")
    return function_tool(tool.name, tool.description, tool.input_schema, tool.strict)


def _tool_choice(choice: _ToolChoice | None, tools: list[dict[str, Any]]) -> str | None:
    """The choice as a `ModelCall` has it."""
    if choice is None:
        return None
    if choice.type != "tool":
        return check_tool_choice("required" if choice.type == "any" else choice.type, tools)
    if choice.name is None:
        raise refusal("tool_choice.name", "this field is required")
    return check_tool_choice(f"function:{choice.name}", tools)


def reply_body(call: ModelCall, reply: Reply) -> dict[str, Any]:
    """The answer to a request without `stream`."""
    choice = reply.choices[0]
    return {
        **_message(reply),
        "content": _blocks(choice),
        **_stop(choice),
        "usage": _usage(reply, reply.completion_tokens),
    }


def _message(reply: Reply) -> dict[str, Any]:
    """The message before anything is in it."""
    return {
        "id": f"msg_{reply.id}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(reply, 0),
    }


def _usage(reply: Reply, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": reply.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _blocks(choice: ReplyChoice) -> list[dict[str, Any]]:
    """What was thought, the text, the calls. There is a text, even an empty one, where there are no
    calls. Arguments are the object as it was sampled, byte for byte."""
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        thought = {"type": "thinking", "thinking": choice.reasoning, "signature": SIGNATURE}
        blocks.append(thought)
    if choice.content or not choice.tool_calls:
        blocks.append({"type": "text", "text": choice.content})
    for tool_call in choice.tool_calls:
        function = tool_call["function"]
        arguments = msgspec.Raw(function["arguments"].encode())
        called = {"type": "tool_use", "id": tool_call["id"], "name": function["name"]}
        blocks.append({**called, "input": arguments})
    return blocks


def _stop(choice: ReplyChoice) -> dict[str, str | None]:
    """Why it ended. What was cut off is `max_tokens`, calls or not."""
    sequence = None
    if choice.finish_reason == "length":
        reason = "max_tokens"
    elif choice.tool_calls:
        reason = "tool_use"
    elif choice.stop_sequence is not None:
        reason, sequence = "stop_sequence", choice.stop_sequence
    else:
        reason = "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def reply_events(call: ModelCall, reply: Reply) -> Iterator[bytes]:
    """The whole answer to a request with `stream`."""
    choice = reply.choices[0]

    def named(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    yield named("message_start", message=_message(reply))
    for index, block in enumerate(_blocks(choice)):
        empty, deltas = _growth(block)
        yield named("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield named("content_block_delta", index=index, delta=delta)
        yield named("content_block_stop", index=index)
    usage = _usage(reply, reply.completion_tokens)
    yield named("message_delta", delta=_stop(choice), usage=usage)
    yield named("message_stop")


def _growth(block: dict[str, Any]) -> tuple[dict[str, Any], Sequence[dict[str, str]]]:
    """How a block begins, and what is added to it."""
    match block["type"]:
        case "thinking":
            grown = [{"type": "thinking_delta", "thinking": t} for t in pieces(block["thinking"])]
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return {**block, "thinking": "", "signature": ""}, [*grown, signed]
        case "text":
            texts = pieces(block["text"])
            return {**block, "text": ""}, [{"type": "text_delta", "text": t} for t in texts]
    arguments = pieces(bytes(block["input"]).decode())
    grown = [{"type": "input_json_delta", "partial_json": text} for text in arguments]
    return {**block, "input": {}}, grown


def error_body(error: CallError) -> dict[str, Any]:
    """The body of an answer with the error's status. The shape has no place for the field's name,
    with which the message of a 400 begins."""
    kind = ERROR_TYPES.get(
        error.status, "api_error" if error.status >= 500 else "invalid_request_error"
    )
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def error_event(error: CallError) -> bytes:
    """The error inside a stream that has begun."""
    return event(error_body(error), "error")
