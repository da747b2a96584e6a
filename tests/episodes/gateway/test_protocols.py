"""What holds for every protocol: a request is read or refused, whatever stands in it."""

from __future__ import annotations

import copy
import json
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.episodes.gateway import _chat_api, _messages_api, _responses_api
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall
from tests.episodes.gateway.protocol_server import (
    ADD,
    FIRST,
    choice,
    events_of,
    reply,
    tool_call,
)

SCHEMA = {"name": "x", "schema": ADD, "strict": True}
TEXT = [{"type": "text", "text": "a"}]
REQUESTS: dict[Any, dict[str, Any]] = {
    _chat_api: {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": TEXT},
            {"role": "assistant", "reasoning_content": "r", "tool_calls": list(FIRST.tool_calls)},
            {"role": "tool", "tool_call_id": "call_A1", "content": "42"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": ADD}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "stream_options": {"include_usage": True},
        "stop": ["a"],
        "logit_bias": {},
        "user": "u",
    },
    _responses_api: {
        "model": "m",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "r"}],
                "content": [],
            },
            {"type": "message", "role": "assistant", "content": "<think>\nr\n</think>"},
            {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
        ],
        "instructions": "i",
        "tools": [{"type": "function", "name": "add", "parameters": ADD, "strict": True}],
        "tool_choice": {"type": "function", "name": "add"},
        "text": {"format": {"type": "json_schema", **SCHEMA}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "truncation": "disabled",
    },
    _messages_api: {
        "model": "m",
        "max_tokens": 5,
        "system": TEXT,
        "messages": [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "r", "signature": "s"},
                    *TEXT,
                    {"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": TEXT}, *TEXT],
            },
        ],
        "tools": [{"name": "add", "input_schema": ADD, "type": "custom"}],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": ADD}},
        "stop_sequences": ["a"],
        "metadata": {"user_id": "u"},
    },
}
APIS = pytest.mark.parametrize("api", REQUESTS, ids=lambda api: api.__name__.rsplit(".", 1)[-1])

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(max_size=5), one, max_size=2),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container of a request, with each key of it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(pairs):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += places(inner)
    return found


@APIS
def test_the_request_is_read(api):
    call = api.read_call(json.dumps(REQUESTS[api]).encode())
    assert call.tools[0]["function"] == {
        "name": "add",
        "parameters": ADD,
        **({"strict": True} if api is _responses_api else {}),
    }
    assert call.tool_choice == "function:add"
    assert call.response_format["json_schema"]["schema"] == ADD
    assert [m["role"] for m in call.messages if m["role"] == "assistant"] == ["assistant"]


@APIS
@given(data=st.data())
def test_whatever_is_wrong_with_a_request_is_a_400_of_its_own(api, data):
    request = copy.deepcopy(REQUESTS[api])
    container, key = data.draw(st.sampled_from(places(request)))
    if data.draw(st.booleans()):
        container[key] = data.draw(values)
    else:
        del container[key]
    body = json.dumps(request).encode()
    outcome = read(api, body)
    if isinstance(outcome, ModelCall):
        roles = {message["role"] for message in outcome.messages}
        assert roles <= {"system", "developer", "user", "assistant", "tool"}
        json.dumps(outcome.messages)
        return
    assert outcome.status == 400
    assert str(outcome).startswith(f"{outcome.param}: ")
    root = outcome.param.partition(".")[0].partition("[")[0]
    assert root in {*request, *REQUESTS[api]}


def read(api: ModuleType, body: bytes) -> ModelCall | CallError:
    try:
        return api.read_call(body)
    except CallError as error:
        return error


@APIS
@given(body=st.binary(max_size=60))
def test_bytes_that_are_no_request_are_refused(api, body):
    with pytest.raises(CallError) as caught:
        api.read_call(body)
    assert caught.value.status == 400


@APIS
def test_no_text_ends_a_line_of_a_stream(api):
    """httpx, and litellm with it, splits lines at more characters than a stream's standard does."""
    text = "a\r\nb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h" * 9
    arguments = json.dumps({"a": text}, ensure_ascii=False)
    answer = reply(choice(text, tool_call(arguments), reasoning=text))
    call = api.read_call(json.dumps(REQUESTS[api]).encode())
    stream = b"".join(api.reply_events(call, answer)).decode()
    assert {line.partition(": ")[0] for line in stream.splitlines()} <= {"event", "data", ""}
    told = "".join(json.dumps(data, ensure_ascii=False) for _, data in events_of([stream.encode()]))
    assert "\u2028" in told
