"""Anthropic Messages as the `anthropic` package reads it, and as four clients write it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from pydantic import BaseModel, TypeAdapter

from eval_protocol_rft.episodes.gateway import _messages_api
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._protocol import ENGINE_FIELDS
from tests.episodes.gateway.protocol_server import (
    ADD,
    ARGUMENTS,
    FIRST,
    choice,
    choices,
    events_of,
    meaning,
    meaning_of,
    reply,
    speaking,
    tool_call,
)

anthropic = pytest.importorskip("anthropic")

from anthropic.types import Message, RawMessageStreamEvent  # noqa: E402

USER = {"role": "user", "content": "2 + 40?"}
TOOL = {"name": "add", "description": "d", "input_schema": ADD}
RESULTS = [
    {"role": "tool", "tool_call_id": call_id, "content": "42"} for call_id in ("call_A1", "call_A2")
]
EVENT = TypeAdapter(RawMessageStreamEvent)
ASKED = {"model": "m", "max_tokens": 100, "messages": [USER]}


def read(**fields: Any):
    return _messages_api.read_call(json.dumps({**ASKED, **fields}).encode())


def body_of(call, answer) -> dict[str, Any]:
    """The body as it goes over the wire."""
    return json.loads(msgspec.json.encode(_messages_api.reply_body(call, answer)))


@pytest.fixture
def connect():
    """Make clients, and close them."""
    clients = []

    def client_of(server) -> anthropic.Anthropic:
        clients.append(anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0))
        return clients[-1]

    yield client_of
    for client in clients:
        client.close()


def result(call_id: str, content: Any = "42", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def test_the_client_reads_blocks_and_sends_them_back(connect):
    with speaking(_messages_api, reply(FIRST), reply(choice("42"))) as server:
        client = connect(server)
        first = client.messages.create(**ASKED, tools=[TOOL], system="Add.")
        history = [
            USER,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result("call_A1"), result("call_A2")]},
        ]
        second = client.messages.create(**{**ASKED, "messages": history}, tools=[TOOL])
    assert (first.stop_reason, first.role, first.model) == ("tool_use", "assistant", "m")
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert first.content[0].thinking == "I need the tool."
    assert first.content[1].text == " I will add.\n"
    assert [(block.id, block.input) for block in first.content[2:]] == [
        ("call_A1", {"a": 2, "b": 40}),
        ("call_A2", {"b": 1, "a": 1.0}),
    ]
    assert (first.usage.input_tokens, first.usage.output_tokens) == (11, 7)
    assert (second.content[0].text, second.stop_reason) == ("42", "end_turn")
    one, two = server.calls
    assert one.messages == [{"role": "system", "content": "Add."}, USER]
    assert one.tools == [
        {"type": "function", "function": {"name": "add", "description": "d", "parameters": ADD}}
    ]
    assert meaning(two.messages[1]) == meaning_of(FIRST)
    assert two.messages[1]["reasoning_content"] == "I need the tool."
    assert two.messages[2:] == RESULTS


def test_the_clients_stream_helper_ends_with_the_same_message(connect):
    with speaking(_messages_api, reply(FIRST), reply(FIRST)) as server:
        whole = connect(server).messages.create(**ASKED, tools=[TOOL])
        with connect(server).messages.stream(**ASKED, tools=[TOOL]) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_message()
    assert {"text", "thinking", "signature", "input_json", "content_block_stop"} <= kinds
    dumped = [block.model_dump(exclude_none=True) for block in whole.content]
    assert [block.model_dump(exclude_none=True) for block in final.content] == dumped
    assert (final.id, final.stop_reason) == (whole.id, whole.stop_reason)
    assert final.usage.output_tokens == 7


class Sum(BaseModel):
    total: int


def test_the_clients_parse_helper_asks_for_a_schema_and_reads_it(connect):
    with speaking(_messages_api, reply(choice('{"total": 42}'))) as server:
        parsed = connect(server).messages.parse(**ASKED, output_format=Sum)
    assert parsed.parsed_output == Sum(total=42)
    asked = server.calls[0].response_format
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["schema"]["properties"]["total"]["type"] == "integer"


def test_an_error_is_the_clients_own_with_the_fields_name(connect):
    with speaking(_messages_api) as server, pytest.raises(anthropic.BadRequestError) as caught:
        connect(server).messages.create(**ASKED, extra_body={"min_p": 0.5})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["error"]["message"].startswith("min_p: ")


@pytest.mark.parametrize(
    ("status", "raised", "kind"),
    [
        (401, "AuthenticationError", "authentication_error"),
        (404, "NotFoundError", "not_found_error"),
        (429, "RateLimitError", "rate_limit_error"),
        (500, "InternalServerError", "api_error"),
        (503, "InternalServerError", "overloaded_error"),
    ],
)
def test_an_error_of_each_status_is_told(connect, status, raised, kind):
    error = CallError("wait a little", status=status)
    with (
        speaking(_messages_api, error) as server,
        pytest.raises(getattr(anthropic, raised), match="wait a little") as caught,
    ):
        connect(server).messages.create(**ASKED)
    assert caught.value.body["error"]["type"] == kind


def test_an_error_in_a_stream_is_raised(connect):
    error = CallError("the engine is gone", status=500)
    with (
        speaking(_messages_api, error) as server,
        pytest.raises(anthropic.APIStatusError, match="the engine is gone"),
    ):
        list(connect(server).messages.create(**ASKED, stream=True))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (choice("a"), ("end_turn", None)),
        (choice("a", tool_call()), ("tool_use", None)),
        (choice("a", finish_reason="length"), ("max_tokens", None)),
        (choice("a", tool_call(), finish_reason="length"), ("max_tokens", None)),
        (choice("a", stop_sequence="END"), ("stop_sequence", "END")),
    ],
)
def test_why_it_ended(answer, told):
    body = body_of(read(stop_sequences=["END"]), reply(answer))
    assert (body["stop_reason"], body["stop_sequence"]) == told


def test_arguments_are_sent_as_they_were_sampled():
    sampled = '{"a":  1.0,\n "b": "\\ud83d", "big": 123456789012345678901234567890}'
    told = reply(choice("", tool_call(sampled)))
    assert sampled.encode() in msgspec.json.encode(_messages_api.reply_body(read(), told))
    stream = events_of(list(_messages_api.reply_events(read(), told)))
    deltas = [data["delta"] for name, data in stream if name == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in deltas) == sampled


@given(choices())
def test_a_stream_is_the_whole_sequence_and_adds_up_to_the_body(answer):
    call, told = read(), reply(answer)
    body = body_of(call, told)
    Message.model_validate(body)
    stream = events_of(list(_messages_api.reply_events(call, told)))
    assert [name for name, _ in stream] == [data["type"] for _, data in stream]
    assert [stream[0][0], stream[-2][0], stream[-1][0]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    blocks: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    for name, data in stream:
        EVENT.validate_python(data)
        if name == "content_block_start":
            assert data["index"] == len(blocks)
            blocks.append(data["content_block"])
        elif name == "content_block_delta":
            delta, index = data["delta"], data["index"]
            if delta["type"] == "input_json_delta":
                arguments[index] = arguments.get(index, "") + delta["partial_json"]
                continue
            key = delta["type"].removesuffix("_delta")
            blocks[index][key] += delta[key]
    for index, text in arguments.items():
        blocks[index]["input"] = json.loads(text)
    assert blocks == body["content"]
    assert stream[-2][1]["delta"]["stop_reason"] == body["stop_reason"]
    assert stream[-2][1]["usage"] == body["usage"]


@given(choices())
def test_an_answer_comes_back_with_its_meaning(answer):
    content = body_of(read(), reply(answer))["content"]
    (message,) = read(messages=[USER, {"role": "assistant", "content": content}, USER]).messages[
        1:-1
    ]
    assert meaning(message) == meaning_of(answer)
    assert message.get("reasoning_content", "") == (answer.reasoning or "")


THINKING = {"type": "thinking", "thinking": "I need the tool.", "signature": "unsigned"}
TEXT = {"type": "text", "text": " I will add.\n"}
CALLS = [
    {"type": "tool_use", "id": "call_A1", "name": "add", "input": {"a": 2, "b": 40}},
    {"type": "tool_use", "id": "call_A2", "name": "add", "input": {"b": 1, "a": 1.0}},
]
BACK = {
    "anthropic": [
        {**THINKING},
        {**TEXT, "citations": None},
        *({**call, "caller": None} for call in CALLS),
    ],
    "langchain": [THINKING, TEXT, *CALLS],
    "litellm": [THINKING, TEXT, *CALLS],
    "without thinking": [TEXT, *({**c, "cache_control": {"type": "ephemeral"}} for c in CALLS)],
}


@pytest.mark.parametrize("client", BACK)
def test_the_first_turn_comes_back_with_its_meaning(client):
    messages = read(
        messages=[
            USER,
            {"role": "assistant", "content": BACK[client]},
            {"role": "user", "content": [result("call_A1"), result("call_A2", is_error=False)]},
        ]
    ).messages
    assert meaning(messages[1]) == meaning_of(FIRST)
    assert ("reasoning_content" in messages[1]) == (client != "without thinking")
    assert messages[2:] == RESULTS


def test_pydantic_ai_sends_lists_of_blocks_everywhere():
    blocks = [{"type": "text", "text": "You add."}]
    call = read(
        system=blocks,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "2 + 40?"}]},
            {"role": "assistant", "content": BACK["anthropic"]},
            {"role": "user", "content": [result("call_A1", [{"type": "text", "text": "42"}])]},
        ],
        tool_choice={"type": "auto"},
        tools=[TOOL],
    )
    assert call.messages[0] == {"role": "system", "content": blocks}
    assert call.messages[1] == {"role": "user", "content": [{"type": "text", "text": "2 + 40?"}]}
    assert call.messages[3]["content"] == [{"type": "text", "text": "42"}]


def test_blocks_of_one_user_message_keep_their_order():
    text = {"type": "text", "text": "hm"}
    blocks = [text, text, result("a"), result("b", is_error=True), text, result("c", None)]
    messages = read(messages=[{"role": "user", "content": blocks}]).messages
    told = [(m["role"], m.get("tool_call_id"), m["content"]) for m in messages]
    assert told == [
        ("user", None, [text, text]),
        ("tool", "a", "42"),
        ("tool", "b", "42"),
        ("user", None, [text]),
        ("tool", "c", ""),
    ]


def test_an_assistants_text_behind_its_calls_is_the_next_message():
    said = [TEXT, TEXT, CALLS[0], {"type": "text", "text": "Wait."}]
    messages = read(messages=[USER, {"role": "assistant", "content": said}, USER]).messages
    assert [m.get("content") for m in messages[1:-1]] == [" I will add.\n" * 2, "Wait."]


def test_system_messages_stand_anywhere():
    system = {"role": "system", "content": "Please call a tool."}
    assert read(messages=[USER, system, USER]).messages == [USER, system, USER]


def test_an_empty_answer_may_come_back_as_no_block():
    body = body_of(read(), reply(choice("")))
    assert body["content"] == [{"type": "text", "text": ""}]
    for content in (body["content"], [], ""):
        messages = read(messages=[USER, {"role": "assistant", "content": content}, USER]).messages
        assert messages[1] == {"role": "assistant", "content": ""}


def test_settings_are_read():
    call = read(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        stop_sequences=["END", "STOP"],
        stream=True,
        tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        metadata={"user_id": "u"},
        output_config={"effort": "low"},
    )
    assert (call.temperature, call.top_p, call.top_k, call.max_tokens) == (0.5, 0.9, 5, 100)
    assert (call.stop, call.stream, call.tool_choice) == (("END", "STOP"), True, "required")
    assert (call.parallel_tool_calls, call.reasoning_effort) == (False, "low")
    assert call.ignored == {"metadata": {"user_id": "u"}}
    named = read(tools=[TOOL], tool_choice={"type": "tool", "name": "add"})
    assert (named.tool_choice, named.parallel_tool_calls) == ("function:add", None)
    assert read(tools=[TOOL], tool_choice={"type": "none"}).tool_choice == "none"


def test_thinking_is_turned_off_or_stands_on_record():
    off = read(thinking={"type": "disabled"})
    assert (off.reasoning_effort, off.ignored) == ("none", {})
    enabled = {"type": "enabled", "budget_tokens": 2048}
    on = read(thinking=enabled)
    assert (on.reasoning_effort, on.ignored) == (None, {"thinking": enabled})
    adaptive = read(thinking={"type": "adaptive"}, output_config={"effort": "max"})
    assert adaptive.reasoning_effort == "max"
    assert adaptive.ignored == {"thinking": {"type": "adaptive"}}


def test_nulls_are_as_absent():
    fields = [n for n in _messages_api._Request.__struct_fields__ if n not in ASKED]
    fields += [*_messages_api.IGNORED, *_messages_api.UNSUPPORTED, *ENGINE_FIELDS, "unheard_of"]
    assert read(**dict.fromkeys(fields)) == read()


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "user", "content": list(blocks)}]}


def said(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": list(blocks)}, USER]}


REFUSED = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [USER, {"role": "assistant", "content": "It is"}]}, "messages[1].role"),
    (user({"type": "image", "source": {}}), "messages[1].content[0].type"),
    (user(TEXT, {"type": "document", "source": {}}), "messages[1].content[1].type"),
    (user({"text": "x"}), "messages[1].content[0].type"),
    (user({"type": "text"}), "messages[1].content[0].text"),
    (user({"type": "tool_result", "content": "x"}), "messages[1].content[0].tool_use_id"),
    (
        user(result("a", [{"type": "image", "source": {}}])),
        "messages[1].content[0].content[0].type",
    ),
    (user(CALLS[0]), "messages[1].content[0].type"),
    (said({"type": "redacted_thinking", "data": "x"}), "messages[1].content[0].type"),
    (said({"type": "server_tool_use", "id": "s"}), "messages[1].content[0].type"),
    (said({**CALLS[0], "input": ARGUMENTS}), "messages[1].content[0].input"),
    (said(result("a")), "messages[1].content[0].type"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
    ({"tools": [TOOL, {**TOOL, "defer_loading": True}]}, "tools[1].defer_loading"),
    ({"tools": [{**TOOL, "input_examples": [{"a": 1}]}]}, "tools[0].input_examples"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"output_config": {"task_budget": 5}}, "output_config.task_budget"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"something_unheard_of": 1}, "something_unheard_of"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(f)[:60] for f, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_its_name(fields, param):
    with pytest.raises(CallError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    told = _messages_api.error_body(caught.value)["error"]
    assert told["type"] == "invalid_request_error"
    assert told["message"].startswith(f"{param}: ")
