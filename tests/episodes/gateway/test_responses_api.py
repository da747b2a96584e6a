"""OpenAI Responses as the `openai` package reads it, and as five clients write it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from eval_protocol_rft.episodes.gateway import _responses_api
from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._protocol import ENGINE_FIELDS
from tests.episodes.gateway.protocol_server import (
    ADD,
    ARGUMENTS,
    FIRST,
    SECOND_ARGUMENTS,
    choice,
    choices,
    events_of,
    meaning,
    meaning_of,
    reply,
    speaking,
    tool_call,
)

ID = "0123456789abcdef" * 2
USER = {"role": "user", "content": "2 + 40?"}
TOOL = {"type": "function", "name": "add", "description": "d", "parameters": ADD, "strict": True}
OUTPUTS = [
    {"type": "function_call_output", "call_id": call_id, "output": "42"}
    for call_id in ("call_A1", "call_A2")
]
RESULTS = [
    {"role": "tool", "tool_call_id": call_id, "content": "42"} for call_id in ("call_A1", "call_A2")
]
EVENT = TypeAdapter(ResponseStreamEvent)


def read(**fields: Any):
    return _responses_api.read_call(json.dumps({"model": "m", "input": [USER], **fields}).encode())


@pytest.fixture
def connect():
    """Make clients, and close them."""
    clients = []

    def client_of(server) -> openai.OpenAI:
        clients.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0))
        return clients[-1]

    yield client_of
    for client in clients:
        client.close()


def test_the_client_reads_items_and_sends_them_back(connect):
    with speaking(_responses_api, reply(FIRST), reply(choice("42"))) as server:
        client = connect(server)
        first = client.responses.create(model="m", input=[USER], tools=[TOOL], instructions="Add.")
        history = [USER, *first.output, *OUTPUTS]
        second = client.responses.create(model="m", input=history, tools=[TOOL])
    assert (first.id, first.status, first.model) == (f"resp_{ID}", "completed", "m")
    assert [item.type for item in first.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert first.output_text == " I will add.\n"
    assert first.output[0].summary[0].text == "I need the tool."
    calls = [(item.call_id, item.name, item.arguments) for item in first.output[2:]]
    assert calls == [("call_A1", "add", ARGUMENTS), ("call_A2", "add", SECOND_ARGUMENTS)]
    assert len({item.id for item in first.output}) == 4
    assert (first.usage.input_tokens, first.usage.output_tokens, first.usage.total_tokens) == (
        11,
        7,
        18,
    )
    assert first.instructions == "Add."
    assert first.tools[0].name == "add"
    assert second.output_text == "42"
    one, two = server.calls
    assert one.messages[0] == {"role": "system", "content": "Add."}
    assert one.tools == [
        {
            "type": "function",
            "function": {"name": "add", "description": "d", "parameters": ADD, "strict": True},
        }
    ]
    assert two.messages == [
        USER,
        {
            "role": "assistant",
            "reasoning_content": "I need the tool.",
            "content": " I will add.\n",
            "tool_calls": list(FIRST.tool_calls),
        },
        *RESULTS,
    ]


def test_the_clients_stream_helper_ends_with_the_same_response(connect):
    with speaking(_responses_api, reply(FIRST), reply(FIRST)) as server:
        client = connect(server)
        whole = client.responses.create(model="m", input="2 + 40?", tools=[TOOL])
        with client.responses.stream(model="m", input="2 + 40?", tools=[TOOL]) as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == whole.output_text
    dumped = [item.model_dump(exclude_none=True) for item in whole.output]
    streamed = [item.model_dump(exclude_none=True) for item in final.output]
    for item in streamed:
        item.pop("parsed_arguments", None)
    assert streamed == dumped
    assert server.calls[0].messages == [USER]


class Sum(BaseModel):
    total: int


def test_the_clients_parse_helper_asks_for_a_schema_and_reads_it(connect):
    with speaking(_responses_api, reply(choice('{"total": 42}'))) as server:
        parsed = connect(server).responses.parse(model="m", input="2 + 40?", text_format=Sum)
    assert parsed.output_parsed == Sum(total=42)
    asked = server.calls[0].response_format
    assert (asked["type"], asked["json_schema"]["name"]) == ("json_schema", "Sum")
    assert asked["json_schema"]["strict"] is True
    assert asked["json_schema"]["schema"]["properties"]["total"]["type"] == "integer"
    assert parsed.text.format.name == "Sum"


def test_what_was_cut_off_is_incomplete_and_ends_a_stream_all_the_same(connect):
    cut = reply(choice("It is 4", finish_reason="length"))
    with speaking(_responses_api, cut, cut) as server:
        client = connect(server)
        whole = client.responses.create(model="m", input="2 + 40?", max_output_tokens=3)
        with client.responses.stream(model="m", input="2 + 40?", max_output_tokens=3) as stream:
            final = stream.get_final_response()
    for told in (whole, final):
        assert told.status == "incomplete"
        assert told.incomplete_details.reason == "max_output_tokens"
        assert told.output[0].status == "incomplete"
        assert told.output_text == "It is 4"
        assert told.max_output_tokens == 3


def test_logprobs_stand_at_the_text_where_they_are_included(connect):
    tokens = {"token_texts": ["4", "\ufffd"], "token_ids": [4, 5], "logprobs": [-0.5, -0.25]}
    two = reply(choice("4\ufffd", **tokens))
    asked = {"model": "m", "input": "x", "include": ["message.output_text.logprobs"]}
    with speaking(_responses_api, two, two) as server:
        whole = connect(server).responses.create(**asked)
        events = list(connect(server).responses.create(**asked, stream=True))
    told = whole.output[0].content[0].logprobs
    assert [(t.token, t.logprob, t.bytes) for t in told] == [
        ("4", -0.5, [52]),
        ("\ufffd", -0.25, []),
    ]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [t.logprob for t in done.logprobs] == [-0.5, -0.25]


def test_an_error_is_the_clients_own_with_the_fields_name(connect):
    with speaking(_responses_api) as server, pytest.raises(openai.BadRequestError) as caught:
        connect(server).responses.create(model="m", input="x", background=True)
    assert caught.value.param == "background"


def test_an_error_in_a_stream_is_raised(connect):
    error = CallError("the engine is gone", status=503, code="engine")
    with speaking(_responses_api, error) as server, pytest.raises(openai.APIError) as caught:
        list(connect(server).responses.create(model="m", input="x", stream=True))
    assert caught.value.message == "the engine is gone"
    ((name, data),) = events_of([_responses_api.error_event(error)])
    assert name == "error"
    assert (data["type"], data["message"], data["code"]) == (
        "error",
        "the engine is gone",
        "engine",
    )
    EVENT.validate_python(data)


@given(choices())
def test_a_stream_is_the_whole_sequence_and_adds_up_to_the_body(answer):
    call, told = read(tools=[{**TOOL, "strict": None}]), reply(answer)
    body = _responses_api.reply_body(call, told)
    Response.model_validate(body)
    stream = events_of(list(_responses_api.reply_events(call, told)))
    names = [name for name, _ in stream]
    assert names == [data["type"] for _, data in stream]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert [data["sequence_number"] for _, data in stream] == list(range(len(stream)))
    assert stream[-1][1]["response"] == body
    texts: dict[tuple[str, str], str] = {}
    items = []
    for _, data in stream:
        EVENT.validate_python(data)
        kind = data["type"].removeprefix("response.")
        if kind.endswith(".delta"):
            key = (data["item_id"], kind.removesuffix(".delta"))
            texts[key] = texts.get(key, "") + data["delta"]
        elif kind in ("output_text.done", "reasoning_summary_text.done"):
            assert texts.get((data["item_id"], kind.removesuffix(".done")), "") == data["text"]
        elif kind == "function_call_arguments.done":
            assert texts[data["item_id"], "function_call_arguments"] == data["arguments"]
        elif kind == "output_item.done":
            assert data["output_index"] == len(items)
            items.append(data["item"])
    assert items == body["output"]


@given(choices())
def test_an_answer_comes_back_with_its_meaning(answer):
    call = read()
    output = _responses_api.reply_body(call, reply(answer))["output"]
    (message,) = read(input=[USER, *output]).messages[1:]
    assert meaning(message) == meaning_of(answer)
    assert message.get("reasoning_content", "") == (answer.reasoning or "")


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def assistant(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    return item("message", id="msg_1", role="assistant", content=[part], status="completed")


def function_call(arguments: str, call_id: str, **fields: Any) -> dict[str, Any]:
    return item("function_call", name="add", call_id=call_id, arguments=arguments, **fields)


REASONING = item("reasoning", id="rs_1", summary=[item("summary_text", text="I need the tool.")])
COMPACT = [
    function_call('{"a":2,"b":40}', "call_A1"),
    function_call('{"b":1,"a":1.0}', "call_A2"),
]
BACK = {
    "agents": [
        REASONING,
        assistant(" I will add.\n"),
        function_call(ARGUMENTS, "call_A1", id="fc_1", status="completed"),
        function_call(SECOND_ARGUMENTS, "call_A2", id="fc_2", status="completed"),
    ],
    "langchain": [
        {**REASONING, "content": None, "encrypted_content": None},
        {k: v for k, v in assistant(" I will add.\n").items() if k != "status"},
        function_call(ARGUMENTS, "call_A1", id="fc_1"),
        function_call(SECOND_ARGUMENTS, "call_A2", id="fc_2"),
    ],
    "pydantic-ai": [
        {"role": "assistant", "content": "<think>\nI need the tool.\n</think>"},
        {"role": "assistant", "content": " I will add.\n"},
        *COMPACT,
    ],
    "pydantic-ai streaming": [{"role": "assistant", "content": " I will add.\n"}, *COMPACT],
    "vllm and others": [
        item(
            "reasoning",
            id="rs_1",
            summary=[],
            content=[item("reasoning_text", text="I need the tool.")],
        ),
        assistant(" I will add.\n"),
        *COMPACT,
    ],
}


@pytest.mark.parametrize("client", BACK)
def test_the_first_turn_comes_back_as_one_message(client):
    messages = read(input=[USER, *BACK[client], *OUTPUTS]).messages
    assert meaning(messages[1]) == meaning_of(FIRST)
    assert messages[1].get("reasoning_content") == (
        None if client == "pydantic-ai streaming" else "I need the tool."
    )
    assert messages[2:] == RESULTS


def test_litellm_sends_parts_and_a_system_item():
    parts = [
        item("message", role="system", content=[item("input_text", text="You")]),
        item("message", role="user", content=[item("input_text", text="2 + 40?")]),
    ]
    assert read(input=parts).messages == [
        {"role": "system", "content": [{"type": "text", "text": "You"}]},
        {"role": "user", "content": [{"type": "text", "text": "2 + 40?"}]},
    ]


def test_the_order_of_turns_is_kept():
    """A turn is thinking, text, calls: what comes behind in another order is the next turn."""
    messages = read(
        input=[
            assistant("one"),
            assistant("two"),
            function_call("{}", "c1"),
            REASONING,
            function_call("{}", "c2"),
            {"role": "developer", "content": "Go on."},
            assistant("three"),
        ]
    ).messages
    said = [
        (m["role"], m.get("content"), [c["id"] for c in m.get("tool_calls", [])]) for m in messages
    ]
    assert said == [
        ("assistant", "one", []),
        ("assistant", "two", ["c1"]),
        ("assistant", None, ["c2"]),
        ("developer", "Go on.", []),
        ("assistant", "three", []),
    ]
    assert messages[2]["reasoning_content"] == "I need the tool."


def test_what_the_agents_sdk_sends_by_default_is_read():
    call = read(
        instructions="You add.",
        include=[],
        reasoning={"effort": "none"},
        text={"verbosity": "low"},
        stream=True,
        tools=[TOOL],
        prompt_cache_key="k",
    )
    assert call.reasoning_effort == "none"
    assert call.ignored == {"text.verbosity": "low", "prompt_cache_key": "k"}
    assert (call.stream, call.logprobs, call.response_format) == (True, False, None)


def test_a_record_goes_on_from_a_response_by_its_id():
    call = read(previous_response_id="resp_1", input=OUTPUTS, instructions="You add.")
    assert call.previous_response_id == "resp_1"
    assert call.messages == [{"role": "system", "content": "You add."}, *RESULTS]


def test_settings_are_read():
    call = read(
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop="END",
        max_output_tokens=5,
        parallel_tool_calls=False,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "add"},
        store=False,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "high", "summary": "auto"},
    )
    assert (call.temperature, call.top_p, call.seed, call.stop) == (0.5, 0.9, 7, ("END",))
    assert (call.max_tokens, call.parallel_tool_calls) == (5, False)
    assert (call.tool_choice, call.reasoning_effort) == ("function:add", "high")
    assert call.ignored == {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning.summary": "auto",
    }
    body = _responses_api.reply_body(call, reply(choice("42")))
    told = Response.model_validate(body)
    assert (told.temperature, told.max_output_tokens, told.store) == (0.5, 5, False)
    assert told.tool_choice.name == "add"
    assert told.reasoning.effort == "high"


def test_tools_are_repeated_as_the_clients_type_has_them():
    """LangChain's tools say nothing of strictness; the type of the answer must."""
    call = read(tools=[{"type": "function", "name": "add"}])
    assert call.tools == [{"type": "function", "function": {"name": "add"}}]
    Response.model_validate(_responses_api.reply_body(call, reply(choice("42"))))


def test_nulls_are_as_absent():
    fields = [n for n in _responses_api._Request.__struct_fields__ if n not in ("model", "input")]
    fields += [*_responses_api.IGNORED, *_responses_api.UNSUPPORTED, *ENGINE_FIELDS, "unheard_of"]
    assert read(**dict.fromkeys(fields)) == read()


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [USER, {"role": "user", "content": list(parts)}]}


REFUSED = [
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"messages": [USER]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ({"input": [USER, {"type": "web_search_call", "id": "ws"}]}, "input[1].type"),
    ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [function_call({"a": 2}, "c")]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    (
        {
            "input": [
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [{"type": "input_image", "image_url": "data:"}],
                }
            ]
        },
        "input[0].output[0].type",
    ),
    (user({"type": "input_image", "image_url": "data:..."}), "input[1].content[0].type"),
    (user({"type": "input_file", "file_id": "f"}), "input[1].content[0].type"),
    (
        user({"type": "input_text", "text": "a"}, {"type": "input_audio", "input_audio": {}}),
        "input[1].content[1].type",
    ),
    (
        {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
        "input[0].content[0].type",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL, {"type": "mcp", "server_label": "s"}]}, "tools[1].type"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**TOOL, "output_schema": {}}]}, "tools[0].output_schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "web_search_preview"}, "tools": [TOOL]}, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "name": "f"}, "tools": [TOOL]}, "tool_choice"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"style": "x"}}, "text.style"),
    ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"logit_bias": {"1": 1}}, "logit_bias"),
    ({"something_unheard_of": 1}, "something_unheard_of"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(f)[:60] for f, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_its_name(fields, param):
    with pytest.raises(CallError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).startswith(f"{param}: ")


def test_a_call_may_be_cut_off_too():
    cut = choice("", tool_call(), finish_reason="length")
    (called,) = _responses_api.reply_body(read(), reply(cut))["output"]
    assert (called["type"], called["status"]) == ("function_call", "incomplete")


def test_an_answers_text_may_be_named_where_its_calls_are_told():
    text = {"type": "item_reference", "id": f"msg_{ID}"}
    calls = [
        {"type": "function_call", "call_id": f"call_{i}", "name": "add", "arguments": "{}"}
        for i in range(2)
    ]
    call = read(input=[USER, text, *calls, *OUTPUTS])
    named, (first, second) = call.messages[1], call.messages[1]["tool_calls"]
    assert (named["reply_id"], named["parts"]) == (ID, ["content"])
    assert (first["id"], second["id"]) == ("call_0", "call_1")
    assert call.messages[2:] == RESULTS


def test_items_of_one_answer_that_are_named_alone_are_one_message_of_its_parts():
    other = "f" * 32
    named = [f"rs_{ID}", f"msg_{ID}", f"fc_{ID}_0", f"fc_{ID}_1", f"msg_{other}"]
    call = read(input=[USER, *({"type": "item_reference", "id": one} for one in named), USER])
    assert call.messages == [
        USER,
        {"role": "assistant", "reply_id": ID, "parts": ["reasoning_content", "content", 0, 1]},
        {"role": "assistant", "reply_id": other, "parts": ["content"]},
        USER,
    ]


@pytest.mark.parametrize("item_id", ["msg_abc", f"resp_{ID}", 7, None])
def test_an_item_that_was_not_answered_here_is_refused_by_its_id(item_id):
    with pytest.raises(CallError, match="send the whole item") as refused:
        read(input=[USER, {"type": "item_reference", "id": item_id}])
    assert refused.value.param == "input[1].id"
