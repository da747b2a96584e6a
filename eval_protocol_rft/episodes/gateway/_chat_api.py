"""OpenAI Chat Completions: a request's bytes to a `ModelCall`, a `Reply` to its answer.

Invariant: the messages of a `ModelCall` are the request's own; what a client adds to them on the
way back (null fields, token ids, fields of other providers) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply, ReplyChoice
from eval_protocol_rft.episodes.gateway._protocol import (
    Content,
    Count,
    Effort,
    Sampling,
    check_tool_choice,
    check_type,
    event,
    json_schema_format,
    openai_error_body,
    pieces,
    read_request,
    read_shape,
    refusal,
    text_content,
    token_logprobs,
    without_nulls,
)
from eval_protocol_rft.episodes.gateway._protocol import keep_alive as keep_alive

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
MOST_CHOICES = 128
"""Of one request, as at OpenAI: each of them holds a place in the engine."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(Struct):
    function: _Function


class _CalledFunction(Struct):
    name: str
    arguments: str


class _ToolCall(Struct):
    id: str
    function: _CalledFunction
    type: Literal["function"] | None = None


class _Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None


class _FunctionName(Struct):
    name: str


class _NamedFunction(Struct):
    type: Literal["function"]
    function: _FunctionName


class _JsonSchema(Struct):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class _ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class _Request(Sampling, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    response_format: _ResponseFormat | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def read_call(body: bytes) -> ModelCall:
    """Read a request.

    Raises:
        CallError: 400, with the name of the field that is wrong or cannot be honoured.
    """
    request, ignored = read_request(body, _Request, ignored=IGNORED, unsupported=UNSUPPORTED)
    tools = _tools(request.tools or [])
    options = request.stream_options or _StreamOptions()
    if options.continuous_usage_stats:
        raise refusal("stream_options.continuous_usage_stats", "usage is told at the end only")
    if request.top_logprobs:
        raise refusal("top_logprobs", "only the logprobs of sampled tokens are known; send 0")
    return ModelCall(
        protocol="chat",
        **request.settings(),
        messages=[_message(m, f"messages[{i}]") for i, m in enumerate(request.messages)],
        tools=tools or None,
        include_usage=bool(options.include_usage),
        n=request.n or 1,
        max_tokens=_max_tokens(request),
        logprobs=bool(request.logprobs),
        tool_choice=_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request.response_format),
        reasoning_effort=request.reasoning_effort,
        template_kwargs=request.chat_template_kwargs or {},
        ignored=ignored,
    )


def _message(message: _Message, where: str) -> dict[str, Any]:
    """A message of the request, without what a client adds to it."""
    for name in ("refusal", "function_call", "audio"):
        if getattr(message, name) is not None:
            raise refusal(f"{where}.{name}", "no model is shown this; leave it out")
    assistant = message.role == "assistant"
    if message.content is None and not assistant:
        raise refusal(f"{where}.content", "this field is required")
    read: dict[str, Any] = {"role": message.role}
    if message.name is not None:
        read["name"] = message.name
    if message.content is not None:
        read["content"] = text_content(message.content, f"{where}.content")
    if message.role == "tool":
        if message.tool_call_id is None:
            raise refusal(f"{where}.tool_call_id", "this field is required")
        read["tool_call_id"] = message.tool_call_id
    if not assistant:
        if message.tool_calls:
            raise refusal(f"{where}.tool_calls", "only an assistant calls tools")
        return read
    if reasoning := message.reasoning_content or message.reasoning:
        read["reasoning_content"] = reasoning
    if message.tool_calls:
        read["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return read


def _tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools as the request has them, for a template may show each of their fields."""
    for index, tool in enumerate(tools):
        check_type(tool, f"tools[{index}]", "function")
    read_shape(tools, list[_Tool], "tools")
    return [{"type": "function", "function": without_nulls(tool["function"])} for tool in tools]


def _max_tokens(request: _Request) -> int | None:
    """The limit of sampled tokens, which has an old and a new name."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise refusal("max_tokens", f"{old}, but max_completion_tokens is {new}; send one of them")
    return old if new is None else new


def _tool_choice(choice: str | _NamedFunction | None, tools: list[dict[str, Any]]) -> str | None:
    """The choice as a `ModelCall` has it."""
    if isinstance(choice, _NamedFunction):
        choice = f"function:{choice.function.name}"
    return check_tool_choice(choice, tools)


def _response_format(asked: _ResponseFormat | None) -> dict[str, Any] | None:
    """The format; None for text."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    if (schema := asked.json_schema) is None:
        raise refusal("response_format.json_schema", "this field is required")
    return json_schema_format(schema.name, schema.schema, schema.strict, schema.description)


def reply_body(call: ModelCall, reply: Reply) -> dict[str, Any]:
    """The answer to a request without `stream`."""
    choices = [
        {
            "index": index,
            "message": assistant_message(choice),
            "logprobs": _logprobs(choice) if call.logprobs else None,
            "finish_reason": _finish_reason(choice),
        }
        for index, choice in enumerate(reply.choices)
    ]
    return {**_head(reply, "chat.completion"), "choices": choices, "usage": _usage(reply)}


def _head(reply: Reply, kind: str) -> dict[str, Any]:
    """The fields that the answer and each chunk of a stream have."""
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": kind,
        "created": reply.created,
        "model": reply.model,
    }


def assistant_message(choice: ReplyChoice) -> dict[str, Any]:
    """The message. Its content is null only where there are calls instead."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["content"] = choice.content or None
        message["tool_calls"] = list(choice.tool_calls)
    return message


def _finish_reason(choice: ReplyChoice) -> str:
    """Why it ended. What was cut off is `length`, calls or not."""
    if choice.finish_reason == "length":
        return "length"
    return "tool_calls" if choice.tool_calls else "stop"


def _logprobs(choice: ReplyChoice) -> dict[str, Any]:
    """The logprobs of all sampled tokens, of thinking and calls too."""
    return {"content": token_logprobs(choice), "refusal": None}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def reply_events(call: ModelCall, reply: Reply) -> Iterator[bytes]:
    """The whole answer to a request with `stream`, choice by choice."""
    head = _head(reply, "chat.completion.chunk")
    if call.include_usage:
        head["usage"] = None
    for index, choice in enumerate(reply.choices):
        logprobs = _logprobs(choice) if call.logprobs else None
        for delta, finish_reason in deltas(choice):
            # The tokens are not those of one delta, so all stand at the first text: there every
            # client looks for them.
            here = logprobs if delta.get("content") or finish_reason else None
            logprobs = None if here else logprobs
            chunk = {
                "index": index,
                "delta": delta,
                "logprobs": here,
                "finish_reason": finish_reason,
            }
            yield event({**head, "choices": [chunk]})
    if call.include_usage:
        yield event({**head, "choices": [], "usage": _usage(reply)})
    yield b"data: [DONE]\n\n"


def deltas(choice: ReplyChoice) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What each chunk adds, and why the answer ended behind the last. The first one says the role,
    and no content where there is none: an empty one is an empty text to some clients."""
    role = {"role": "assistant"}
    for delta in _parts(choice):
        yield {**role, **delta}, None
        role = {}
    yield role, _finish_reason(choice)


def _parts(choice: ReplyChoice) -> Iterator[dict[str, Any]]:
    """Thinking, text and calls, in pieces."""
    for text in pieces(choice.reasoning or ""):
        yield {"reasoning_content": text}
    for text in pieces(choice.content):
        yield {"content": text}
    if not choice.content and not choice.tool_calls:
        yield {"content": ""}
    for index, call in enumerate(choice.tool_calls):
        named = {"name": call["function"]["name"], "arguments": ""}
        yield {"tool_calls": [{"index": index, **call, "function": named}]}
        for text in pieces(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def error_body(error: CallError) -> dict[str, Any]:
    """The body of an answer with the error's status."""
    return openai_error_body(error)


def error_event(error: CallError) -> bytes:
    """The error inside a stream that has begun. `code` is the status, for which clients raise what
    they would have raised for it."""
    return event({"error": {**error_body(error)["error"], "code": error.status}})
