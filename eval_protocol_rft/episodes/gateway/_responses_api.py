"""OpenAI Responses: a request's bytes to a `ModelCall`, a `Reply` to its answer.

Invariant: the items of a turn (thinking, text, calls) are one message of the `ModelCall`, and one
answer is the same items again, by the same ids, each time it is written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply
from eval_protocol_rft.episodes.gateway._protocol import (
    Content,
    Count,
    Effort,
    MessageList,
    Part,
    Sampling,
    check_tool_choice,
    check_type,
    event,
    function_tool,
    joined_text,
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
        "client_metadata",
        "max_tool_calls",  # of built-in tools, of which there are none
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
}
ECHOED = (
    "instructions",
    "max_output_tokens",
    "parallel_tool_calls",
    "previous_response_id",
    "reasoning",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
)
TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"
ITEM_ID = re.compile(r"(rs|msg|fc)_([0-9a-f]{32})(?:_(\d+))?")
"""Of the items that `_items` makes: what it is, of which answer, and which call of it."""
THINKING = re.compile(r"<think>\n(.*)\n</think>", re.DOTALL)
"""How Pydantic AI sends back what was thought: as the text of an assistant's message of its own."""


class _Request(Sampling, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    top_logprobs: int | None = None


class _Tool(Struct, forbid_unknown_fields=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool = False
    allowed_callers: list[Literal["direct"]] | None = None


class _FunctionName(Struct):
    name: str


class _Format(Struct):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class _Text(Struct, forbid_unknown_fields=True):
    format: _Format | None = None
    verbosity: str | None = None


class _ReasoningSettings(Struct, forbid_unknown_fields=True):
    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    mode: Literal["standard"] | None = None
    context: Literal["auto"] | None = None


class _Message(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class _Reasoning(Struct):
    summary: list[Part] | None = None
    content: list[Part] | None = None


class _FunctionCall(Struct):
    call_id: str
    name: str
    arguments: str


class _FunctionCallOutput(Struct):
    call_id: str
    output: Content


def read_call(body: bytes) -> ModelCall:
    """Read a request.

    Raises:
        CallError: 400, with the name of the field that is wrong or cannot be honoured.
    """
    request, ignored = read_request(body, _Request, ignored=IGNORED, unsupported=UNSUPPORTED)
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or [])]
    text = read_shape(without_nulls(request.text or {}), _Text, "text")
    reasoning = read_shape(without_nulls(request.reasoning or {}), _ReasoningSettings, "reasoning")
    if request.top_logprobs:
        raise refusal("top_logprobs", "only the logprobs of sampled tokens are known; send 0")
    # The answer repeats what was asked for.
    asked = {name: getattr(request, name) for name in ECHOED}
    repeated = {name: ignored.get(name) for name in ("metadata", "service_tier", "store", "user")}
    unread = {
        "text.verbosity": text.verbosity,
        "reasoning.summary": reasoning.summary or reasoning.generate_summary,
        "include": [name for name in request.include or [] if name != LOGPROBS] or None,
    }
    return ModelCall(
        protocol="responses",
        **request.settings(),
        messages=_messages(request),
        tools=tools or None,
        max_tokens=request.max_output_tokens,
        logprobs=LOGPROBS in (request.include or []),
        tool_choice=_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(text.format),
        reasoning_effort=reasoning.effort,
        previous_response_id=request.previous_response_id,
        echo=without_nulls(asked | repeated),
        ignored=ignored | without_nulls(unread),
    )


def _messages(request: _Request) -> list[dict[str, Any]]:
    """Instructions, then the items of the input."""
    read = MessageList()
    if request.instructions is not None:
        read.add({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        read.add({"role": "user", "content": request.input})
        return read.messages
    if not request.input:
        raise refusal("input", "there is nothing to answer")
    for index, item in enumerate(request.input):
        _read_item(item, f"input[{index}]", read)
    return read.messages


def _read_item(item: dict[str, Any], where: str, read: MessageList) -> None:
    """Add what one item says. Status, annotations and ids of items mean nothing to a model."""
    kinds = "message", "reasoning", "function_call", "function_call_output", "item_reference", None
    check_type(item, where, *kinds)
    match item.get("type"):
        case "item_reference":
            _refer(item.get("id"), f"{where}.id", read)
        case "reasoning":
            thought = read_shape(item, _Reasoning, where)
            if text := _thought(thought):
                read.think(text)
        case "function_call":
            call = read_shape(item, _FunctionCall, where)
            read.call(call.call_id, call.name, call.arguments)
        case "function_call_output":
            result = read_shape(item, _FunctionCallOutput, where)
            output = text_content(result.output, f"{where}.output", TEXT_PARTS)
            read.add({"role": "tool", "tool_call_id": result.call_id, "content": output})
        case _:
            _read_message(read_shape(item, _Message, where), f"{where}.content", read)


def _refer(item_id: Any, where: str, read: MessageList) -> None:
    """Add an item of an earlier answer that is named alone."""
    found = ITEM_ID.fullmatch(item_id) if isinstance(item_id, str) else None
    if found is None:
        raise refusal(where, f"no item {item_id!r} was answered here: send the whole item")
    kind, reply_id, number = found.groups()
    part = {"rs": "reasoning_content", "msg": "content"}.get(kind) or int(number or 0)
    read.refer(reply_id, part)


def _thought(item: _Reasoning) -> str:
    """What was thought; where only a summary of it is told, that."""
    whole = "".join(part.text or "" for part in item.content or [])
    return whole or "\n\n".join(part.text or "" for part in item.summary or [])


def _read_message(message: _Message, where: str, read: MessageList) -> None:
    """Add a message; of the assistant, to the turn that its thinking began."""
    if message.role != "assistant":
        content = text_content(message.content, where, TEXT_PARTS)
        read.add({"role": message.role, "content": content})
        return
    text = joined_text(message.content, where, TEXT_PARTS)
    if thinking := THINKING.fullmatch(text):
        read.think(thinking[1])
        return
    if read.has_text():
        read.end_turn()
    read.say(text)


def _tool(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool, which must be a function of the client's."""
    check_type(fields, where, "function")
    tool = read_shape(without_nulls(fields), _Tool, where)
    if tool.defer_loading:
        raise refusal(f"{where}.defer_loading", "all tools are shown to the model from the start")
    return function_tool(tool.name, tool.description, tool.parameters, tool.strict)


def _tool_choice(choice: str | dict[str, Any] | None, tools: list[dict[str, Any]]) -> str | None:
    """The choice as a `ModelCall` has it."""
    if isinstance(choice, dict):
        check_type(choice, "tool_choice", "function")
        choice = f"function:{read_shape(choice, _FunctionName, 'tool_choice').name}"
    elif choice not in ("auto", "none", "required", None):
        raise refusal("tool_choice", f"{choice!r} is none of auto, none, required")
    return check_tool_choice(choice, tools)


def _response_format(asked: _Format | None) -> dict[str, Any] | None:
    """The format in the chat API's form; None for text."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    for name in ("name", "schema"):
        if getattr(asked, name) is None:
            raise refusal(f"text.format.{name}", "this field is required")
    return json_schema_format(asked.name or "", asked.schema or {}, asked.strict, asked.description)


def reply_body(call: ModelCall, reply: Reply) -> dict[str, Any]:
    """The answer to a request without `stream`. What was cut off has the status `incomplete`."""
    cut_off = reply.choices[0].finish_reason == "length"
    return {
        **_response(call, reply),
        "status": "incomplete" if cut_off else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
        "output": _items(call, reply),
        "usage": {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def _response(call: ModelCall, reply: Reply) -> dict[str, Any]:
    """The response before anything is in it."""
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": reply.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": reply.model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": None,
        **call.echo,
    }


def _items(call: ModelCall, reply: Reply) -> list[dict[str, Any]]:
    """What was thought (as its own summary, which more clients show than its content), the text,
    the calls. There is a text, even an empty one, where there are no calls. The logprobs at the
    text are those of all sampled tokens; where there are only calls, no field is there for them.
    """
    choice = reply.choices[0]
    items: list[dict[str, Any]] = []
    if choice.reasoning:
        summary = [{"type": "summary_text", "text": choice.reasoning}]
        items.append({"id": f"rs_{reply.id}", "type": "reasoning", "summary": summary})
    if choice.content or not choice.tool_calls:
        part: dict[str, Any] = {"type": "output_text", "text": choice.content, "annotations": []}
        if call.logprobs:
            told = token_logprobs(choice)
            part["logprobs"] = [{**token, "bytes": token["bytes"] or []} for token in told]
        message = {"id": f"msg_{reply.id}", "type": "message", "role": "assistant"}
        items.append({**message, "content": [part]})
    items += [
        {
            "id": f"fc_{reply.id}_{index}",
            "type": "function_call",
            "call_id": tool_call["id"],
            "name": tool_call["function"]["name"],
            "arguments": tool_call["function"]["arguments"],
        }
        for index, tool_call in enumerate(choice.tool_calls)
    ]
    for item in items:
        item["status"] = "completed"
    if choice.finish_reason == "length":
        items[-1]["status"] = "incomplete"
    return items


def reply_events(call: ModelCall, reply: Reply) -> Iterator[bytes]:
    """The whole answer to a request with `stream`.

    The last event is `response.completed`, also where the answer was cut off: its response says
    `incomplete` and why, as without `stream`. Behind a `response.incomplete` instead, the client's
    own stream helper has no response to return, and the Agents SDK ends the agent. (Without
    `stream` that SDK ends the agent for the status, which is the truth.)
    """
    numbers = itertools.count()

    def numbered(kind: str, fields: Mapping[str, Any]) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    body = reply_body(call, reply)
    for kind in ("response.created", "response.in_progress"):
        yield numbered(kind, {"response": _response(call, reply)})
    for index, item in enumerate(body["output"]):
        for kind, fields in _item_events(item):
            yield numbered(kind, {"output_index": index, **fields})
    yield numbered("response.completed", {"response": body})


def _item_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of one item: it begins empty, grows, and is told whole at the end."""
    events = {
        "reasoning": _reasoning_events,
        "message": _message_events,
        "function_call": _call_events,
    }[item["type"]]
    empty = {"reasoning": "summary", "message": "content"}.get(item["type"], "arguments")
    begun = {**item, "status": "in_progress", empty: "" if empty == "arguments" else []}
    yield "response.output_item.added", {"item": begun}
    for kind, fields in events(item):
        yield f"response.{kind}", {"item_id": item["id"], **fields}
    yield "response.output_item.done", {"item": item}


def _reasoning_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = {"summary_index": 0}
    part = item["summary"][0]
    yield "reasoning_summary_part.added", {**place, "part": {**part, "text": ""}}
    for delta in pieces(part["text"]):
        yield "reasoning_summary_text.delta", {**place, "delta": delta}
    yield "reasoning_summary_text.done", {**place, "text": part["text"]}
    yield "reasoning_summary_part.done", {**place, "part": part}


def _message_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = {"content_index": 0}
    part = item["content"][0]
    logprobs = part.get("logprobs", [])
    yield "content_part.added", {**place, "part": {**part, "text": "", "logprobs": []}}
    for delta in pieces(part["text"]):
        yield "output_text.delta", {**place, "delta": delta, "logprobs": []}
    yield "output_text.done", {**place, "text": part["text"], "logprobs": logprobs}
    yield "content_part.done", {**place, "part": part}


def _call_events(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for delta in pieces(item["arguments"]):
        yield "function_call_arguments.delta", {"delta": delta}
    done = {"name": item["name"], "arguments": item["arguments"]}
    yield "function_call_arguments.done", done


def error_body(error: CallError) -> dict[str, Any]:
    """The body of an answer with the error's status."""
    return openai_error_body(error)


def error_event(error: CallError) -> bytes:
    """The error inside a stream that has begun. The client's package raises on the field `error`
    only; frameworks look for the event, whose fields stand beside it."""
    told = error_body(error)["error"]
    return event({**told, "type": "error", "sequence_number": 0, "error": told}, "error")
