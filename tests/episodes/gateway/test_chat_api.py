"""OpenAI Chat Completions as the `openai` package reads it, and as seven clients write it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from eval_protocol_rft.episodes.gateway import _chat_api
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

USER = {"role": "user", "content": "2 + 40?"}
NEEDED = ("model", "messages")
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": ADD}}


def read(**fields: Any):
    return _chat_api.read_call(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refused(body: bytes) -> CallError:
    with pytest.raises(CallError) as caught:
        _chat_api.read_call(body)
    return caught.value


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


def test_the_client_reads_text_thinking_and_calls(connect):
    with speaking(_chat_api, reply(FIRST)) as server:
        completion = connect(server).chat.completions.create(
            model="m", messages=[USER], tools=[TOOL]
        )
    assert completion.id == "chatcmpl-" + "0123456789abcdef" * 2
    assert (completion.object, completion.created) == ("chat.completion", 1_790_000_000)
    answer = completion.choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == " I will add.\n"
    assert answer.message.reasoning_content == "I need the tool."
    assert [call.function.arguments for call in answer.message.tool_calls] == [
        ARGUMENTS,
        SECOND_ARGUMENTS,
    ]
    assert completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "total_tokens": 18,
    }
    assert server.calls[0].tools == [TOOL]


def test_the_clients_stream_helper_ends_with_the_same_message(connect):
    with (
        speaking(_chat_api, reply(FIRST)) as server,
        connect(server).chat.completions.stream(
            model="m", messages=[USER], tools=[TOOL], stream_options={"include_usage": True}
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert "content.done" in kinds
    assert final.choices[0].message.content == FIRST.content
    calls = [call.function.arguments for call in final.choices[0].message.tool_calls]
    assert calls == [ARGUMENTS, SECOND_ARGUMENTS]
    assert final.usage.total_tokens == 18


class Sum(BaseModel):
    total: int


def test_the_clients_parse_helper_asks_for_a_schema_and_reads_it(connect):
    with speaking(_chat_api, reply(choice('{"total": 42}'))) as server:
        parsed = connect(server).chat.completions.parse(
            model="m", messages=[USER], response_format=Sum
        )
    assert parsed.choices[0].message.parsed == Sum(total=42)
    asked = server.calls[0].response_format
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["name"] == "Sum"
    assert asked["json_schema"]["strict"] is True


def test_an_error_is_the_clients_own_with_the_fields_name(connect):
    with speaking(_chat_api) as server, pytest.raises(openai.BadRequestError) as caught:
        connect(server).chat.completions.create(model="m", messages=[USER], presence_penalty=0.5)
    assert caught.value.param == "presence_penalty"
    assert "presence_penalty: not supported" in caught.value.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
def test_an_error_of_each_status_is_told(connect, status, kind):
    error = CallError("wait a little", status=status, code="session_limit")
    with speaking(_chat_api, error) as server, pytest.raises(kind, match="wait a little") as caught:
        connect(server).chat.completions.create(model="m", messages=[USER])
    assert caught.value.code == "session_limit"


def test_an_error_in_a_stream_is_raised(connect):
    error = CallError("the engine is gone", status=503)
    with speaking(_chat_api, error) as server, pytest.raises(openai.APIError) as caught:
        list(connect(server).chat.completions.create(model="m", messages=[USER], stream=True))
    assert caught.value.message == "the engine is gone"
    assert caught.value.code == 503


def test_several_choices_and_logprobs_stream_as_they_are_told(connect):
    tokens = {"token_texts": ["4", "\ufffd"], "token_ids": [4, 5], "logprobs": [-0.5, -0.25]}
    two = reply(choice("4\ufffd", **tokens), choice("", tool_call(), **tokens))
    asked = {"model": "m", "messages": [USER], "n": 2, "logprobs": True}
    with speaking(_chat_api, two, two) as server:
        whole = connect(server).chat.completions.create(**asked)
        state = ChatCompletionStreamState()
        for chunk in connect(server).chat.completions.create(**asked, stream=True):
            state.handle_chunk(chunk)
    streamed = state.get_final_completion()
    assert server.calls[0].n == 2
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.logprobs.model_dump() == other.logprobs.model_dump()
        assert [t.logprob for t in one.logprobs.content] == [-0.5, -0.25]
        assert [t.bytes for t in one.logprobs.content] == [[52], None]
        assert one.message.content == other.message.content
        assert one.finish_reason == other.finish_reason


def test_what_was_cut_off_is_length_with_calls_or_without():
    call = read()
    for cut in (
        choice("a", finish_reason="length"),
        choice("", tool_call(), finish_reason="length"),
    ):
        assert _chat_api.reply_body(call, reply(cut))["choices"][0]["finish_reason"] == "length"


def test_content_is_null_only_where_there_are_calls_instead():
    def content(answer):
        return _chat_api.reply_body(read(), reply(answer))["choices"][0]["message"]["content"]

    assert content(choice("", tool_call())) is None
    assert content(choice("")) == ""
    assert content(choice("", reasoning="hm")) == ""


def test_usage_is_streamed_only_where_it_is_asked_for():
    plain = events_of(list(_chat_api.reply_events(read(stream=True), reply(choice("a")))))
    assert all("usage" not in data for _, data in plain[:-1])
    asked = read(stream=True, stream_options={"include_usage": True})
    counted = events_of(list(_chat_api.reply_events(asked, reply(choice("a")))))
    assert counted[-2][1]["usage"]["total_tokens"] == 18
    assert counted[-2][1]["choices"] == []
    assert [data for _, data in counted if data == "[DONE]"] == ["[DONE]"]


@given(st.lists(choices(), min_size=1, max_size=3))
def test_the_deltas_of_a_stream_add_up_to_the_body(answers):
    call, told = read(n=len(answers)), reply(*answers)
    body = ChatCompletion.model_validate(_chat_api.reply_body(call, told))
    state = ChatCompletionStreamState()
    stream = list(_chat_api.reply_events(call, told))
    assert not any(mark in b"".join(stream).decode() for mark in "\x85\u2028\u2029")
    for _, data in events_of(stream)[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate(data))
    for one, other in zip(body.choices, state.current_completion_snapshot.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert (one.message.content or "") == (other.message.content or "")
        assert (one.message.model_extra.get("reasoning_content") or "") == (
            other.message.model_extra.get("reasoning_content") or ""
        )
        ours = [(c.id, c.function.name, c.function.arguments) for c in one.message.tool_calls or []]
        theirs = [
            (c.id, c.function.name, c.function.arguments) for c in other.message.tool_calls or []
        ]
        assert ours == theirs


def reserialised(separators: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {
            **call,
            "function": {
                "name": "add",
                "arguments": json.dumps(
                    json.loads(call["function"]["arguments"]), separators=separators
                ),
            },
        }
        for call in FIRST.tool_calls
    ]


BACK = {
    "openai": {
        "role": "assistant",
        "content": " I will add.\n",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [{**call, "x_mark": 1} for call in FIRST.tool_calls],
        "reasoning_content": "I need the tool.",
        "token_ids": [1, 2, 3],
    },
    "agents": {
        "role": "assistant",
        "content": " I will add.\n",
        "tool_calls": list(FIRST.tool_calls),
    },
    "langchain": {
        "role": "assistant",
        "content": " I will add.\n",
        "tool_calls": reserialised((", ", ": ")),
    },
    "pydantic-ai": {
        "role": "assistant",
        "content": " I will add.\n",
        "reasoning_content": "I need the tool.",
        "tool_calls": reserialised((",", ":")),
    },
    "litellm": {
        "role": "assistant",
        "content": " I will add.\n",
        "tool_calls": list(FIRST.tool_calls),
        "function_call": None,
        "reasoning_content": "I need the tool.",
        "provider_specific_fields": {"token_ids": [1, 2], "refusal": None},
    },
    "eval-protocol": {
        "role": "assistant",
        "content": [{"type": "text", "text": " I will add.\n"}],
        "tool_calls": list(FIRST.tool_calls),
        **dict.fromkeys(
            ("reasoning_content", "name", "tool_call_id", "function_call", "weight", "logprobs")
        ),
    },
}


@pytest.mark.parametrize("client", BACK)
def test_the_first_turn_comes_back_with_its_meaning(client):
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "42"} for call in FIRST.tool_calls
    ]
    messages = read(messages=[USER, BACK[client], *results]).messages
    assert meaning(messages[1]) == meaning_of(FIRST)
    assert set(messages[1]) <= {"role", "content", "tool_calls", "reasoning_content"}
    assert messages[1].get("reasoning_content") == BACK[client].get("reasoning_content")
    assert messages[2:] == results


def test_a_turn_of_calls_alone_comes_back_without_content():
    """Agents and LangChain send null, litellm no key, or an empty text where it streams."""
    turn = {"role": "assistant", "tool_calls": list(FIRST.tool_calls)}
    for content in ({}, {"content": None}, {"content": ""}, {"content": []}):
        messages = read(messages=[USER, {**turn, **content}]).messages
        assert meaning(messages[1])[1] == ""


def test_smolagents_turns_are_parts_and_its_tool_results_a_users():
    parts = [{"type": "text", "text": "I will add.\nCalling tools:\n[...]"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You"}]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": [{"type": "text", "text": "Observation:\n42"}]},
    ]
    call = read(messages=messages, stop=["Observation:", "Calling tools:"], tools=[TOOL])
    assert call.messages == messages
    assert call.stop == ("Observation:", "Calling tools:")


def test_system_messages_stand_anywhere_and_keep_their_roles():
    roles = ["system", "user", "developer", "system", "user"]
    messages = [{"role": role, "content": role} for role in roles]
    assert read(messages=messages).messages == messages


def test_settings_are_read():
    call = read(
        temperature=0,
        top_p=0.9,
        top_k=20,
        seed=7,
        stop="END",
        n=2,
        logprobs=True,
        max_completion_tokens=5,
        max_tokens=5,
        parallel_tool_calls=False,
        reasoning_effort="low",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "add"}},
        stream=True,
    )
    assert (call.temperature, call.top_p, call.top_k, call.seed) == (0, 0.9, 20, 7)
    assert (call.stop, call.n, call.logprobs, call.max_tokens) == (("END",), 2, True, 5)
    assert (call.parallel_tool_calls, call.reasoning_effort) == (False, "low")
    assert (call.tool_choice, call.stream, call.include_usage) == ("function:add", True, False)


def test_nulls_are_as_absent():
    fields = [name for name in _chat_api._Request.__struct_fields__ if name not in NEEDED]
    fields += [*_chat_api.IGNORED, *_chat_api.UNSUPPORTED, *ENGINE_FIELDS, "something_unheard_of"]
    assert read(**dict.fromkeys(fields)) == read()


def test_what_changes_no_token_is_on_record():
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "verbosity": "low"}
    assert read(**fields).ignored == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"modalities": ["text"]},
        {"best_of": 1, "min_p": 0.0, "repetition_penalty": 1.0},
        {"functions": [], "function_call": "auto"},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"top_logprobs": 0},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(fields):
    call = read(**fields)
    assert (call.tools, call.response_format, call.ignored) == (None, None, {})


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "user", "content": list(parts)}]}


REFUSED = [
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.1}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"best_of": 2}, "best_of"),
    ({"min_p": 0.1}, "min_p"),
    ({"something_unheard_of": 1}, "something_unheard_of"),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"reasoning_effort": "very"}, "reasoning_effort"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    ({"model": None}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
    ({"messages": [USER, {"role": "critic", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "42"}]}, "messages[0].tool_call_id"),
    ({"messages": [{**USER, "tool_calls": [tool_call()]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "refusal": "no"}]}, "messages[0].refusal"),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
        "messages[0].function_call",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [tool_call({"a": 2})]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**tool_call(), "type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    (
        user({"type": "image_url", "image_url": {"url": "data:..."}}),
        "messages[1].content[0].type",
    ),
    (
        user({"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}),
        "messages[1].content[1].type",
    ),
    (user({"type": "file", "file": {}}), "messages[1].content[0].type"),
    (user({"type": "text"}), "messages[1].content[0].text"),
    (user({"text": "a"}), "messages[1].content[0].type"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
    ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{**TOOL, "type": "custom"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "subtract"}},
        },
        "tool_choice",
    ),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(f)[:60] for f, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_its_name(fields, param):
    error = refused(json.dumps({"model": "m", "messages": [USER], **fields}).encode())
    assert (error.status, error.param) == (400, param)
    assert str(error).startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "m"} x',
        b'{"model": "\xff", "messages": []}',
        b'{"model": "m", "messages": [], "x": ' + b"[" * 100_000,
        b'{"a": ' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=["empty", "open", "array", "null", "more", "bytes", "deep array", "deep object"],
)
def test_a_body_that_is_no_json_object_is_refused(body):
    error = refused(body)
    assert error.status == 400
    assert "the body of the request" in str(error)
