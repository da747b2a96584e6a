"""Chat completions of the local Fireworks, over HTTP: what goes in, what comes out, as clients read
it. The model is the bundled one where it can do what is asked; else what it says is given."""

from __future__ import annotations

import contextlib
import json

import httpx
import openai
import pytest
from fireworks import AsyncFireworks, Fireworks
from starlette.applications import Starlette

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.local.server import (
    EXCEPTION_HANDLERS,
    ApiError,
    CompletionEndpoints,
    ServedModel,
)
from eval_protocol_rft.loop.service.inference._chat import ChatEndpoints
from eval_protocol_rft.sampling import Completion
from tests.service import BASE, arithmetic_base, fireworks_service
from tests.serving import ScriptedSampler, byte_tokenizer, post_and_leave, running
from tests.waiting import PATIENCE

TOKENIZER = LoadedTokenizer.wrap(arithmetic_base().tokenizer)
EOS = TOKENIZER.tokenizer.eos_token_id
SUM = [{"role": "user", "content": "17+25="}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a":2,  "b": 40}}\n</tool_call>'


# With a real model


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with fireworks_service(tmp_path_factory.mktemp("state")) as service:
        yield service


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def openai_client(service):
    url = f"{service.url}/inference/v1"
    with openai.OpenAI(base_url=url, api_key="any", timeout=PATIENCE, max_retries=0) as client:
        yield client


SETTINGS = {
    "max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 3, "n": 3,
    "logprobs": True, "return_token_ids": True, "raw_output": True,
}  # fmt: skip


def test_a_chat_is_the_completion_of_its_rendered_prompt(client):
    prompt = TOKENIZER.tokenizer.apply_chat_template(
        SUM, add_generation_prompt=True, return_dict=False
    )
    chat = client.post(
        "/inference/v1/chat/completions", json={"model": BASE, "messages": SUM, **SETTINGS}
    ).json()
    completion = client.post(
        "/inference/v1/completions", json={"model": BASE, "prompt": prompt, **SETTINGS}
    ).json()
    assert chat["prompt_token_ids"] == prompt
    assert chat["usage"] == completion["usage"]
    assert chat["object"] == "chat.completion"
    assert len(chat["choices"]) == 3
    for one, other in zip(chat["choices"], completion["choices"], strict=True):
        for field in ("index", "token_ids", "finish_reason", "raw_output"):
            assert one[field] == other[field]
        assert one["message"] == {"role": "assistant", "content": other["text"]}
        assert ids_of(one) == ids_of(other) == one["token_ids"]
        for name in ("logprob", "sampling_logprob"):
            assert values_of(one, name) == pytest.approx(values_of(other, name), abs=1e-4)


def test_a_stream_holds_what_a_whole_reply_does(client):
    body = {"model": BASE, "messages": SUM, **SETTINGS, "perf_metrics_in_response": True}
    whole = client.post("/v1/chat/completions", json=body).json()
    chunks = chunks_of(client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["perf_metrics"].keys() == whole["perf_metrics"].keys()
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert parts[0]["delta"]["role"] == "assistant"
        assert text == choice["message"]["content"]
        assert [t for part in parts for t in part.get("token_ids", [])] == choice["token_ids"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["raw_output"] == choice["raw_output"]


def test_openai_clients_chat(openai_client):
    messages = [{"role": "system", "content": "Add."}, *SUM]
    reply = openai_client.chat.completions.create(
        model=BASE, messages=messages, max_tokens=4, temperature=0, logprobs=True
    )
    (choice,) = reply.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert len(choice.logprobs.content) == reply.usage.completion_tokens
    stream = openai_client.chat.completions.create(
        model=BASE,
        messages=messages,
        max_tokens=4,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == reply.usage
    assert [model.id for model in openai_client.models.list()] == [BASE]


async def test_fireworks_clients_chat(service):
    asked = {"model": BASE, "messages": SUM, "max_tokens": 4, "temperature": 0.0}
    async with AsyncFireworks(api_key="any", base_url=service.url, timeout=PATIENCE) as client:
        reply = await client.chat.completions.create(
            **asked, raw_output=True, return_token_ids=True, perf_metrics_in_response=True
        )
        stream = await client.chat.completions.create(**asked, stream=True, return_token_ids=True)
        chunks = [chunk async for chunk in stream]
    with Fireworks(api_key="any", base_url=f"{service.url}/inference", timeout=PATIENCE) as client:
        again = client.chat.completions.create(**asked)
    (choice,) = reply.choices
    assert choice.token_ids == choice.raw_output.completion_token_ids
    assert reply.prompt_token_ids == choice.raw_output.prompt_token_ids
    assert int(reply.perf_metrics["prompt-tokens"]) == len(reply.prompt_token_ids)
    assert again.choices[0].message.content == choice.message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert [t for c in chunks for t in c.choices[0].token_ids or []] == choice.token_ids


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "field: 'messages'"),
        ({"messages": None}, "field: 'messages'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "field: 'messages[0].role'"),
        ({"messages": [{"role": "user"}]}, "field: 'messages[0].content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "field: 'messages[0].content[0].type'",
        ),
        ({"messages": [{"role": "user", "content": "1+" * 1024}]}, "too long"),
        ({"messages": [{"role": "user", "content": "1" * 100_000}]}, "field: 'messages'"),
        ({"prompt": "x"}, "Extra inputs are not permitted, field: 'prompt'"),
        ({"temprature": 1}, "Extra inputs are not permitted, field: 'temprature'"),
        ({"temperature": 3}, "field: 'temperature'"),
        ({"temperature": "hot"}, "field: 'temperature'"),
        ({"n": 0}, "field: 'n'"),
        ({"n": 129}, "field: 'n'"),
        ({"top_logprobs": 2}, "field: 'top_logprobs'"),
        ({"echo": True}, "field: 'echo'"),
        ({"min_p": 0.2}, "min_p"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "field: 'max_completion_tokens'"),
        ({"max_tokens": 9999, "context_length_exceeded_behavior": "error"}, "field: 'max_tokens'"),
        ({"response_format": {"type": "json_object"}}, "field: 'response_format'"),
        ({"response_format": {"type": "poem"}}, "field: 'response_format.type'"),
        ({"reasoning_effort": "high"}, "field: 'reasoning_effort'"),
        ({"tools": [{"type": "search"}]}, "field: 'tools[0].type'"),
        ({"tool_choice": "required"}, "field: 'tool_choice'"),
        ({"safe_tokenization": True}, "field: 'safe_tokenization'"),
        ({"prompt_truncate_len": 10}, "field: 'prompt_truncate_len'"),
        ({"functions": [{"name": "f"}]}, "field: 'functions'"),
        ({"chat_template_kwargs": [1]}, "field: 'chat_template_kwargs'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, fields, said):
    reply = client.post("/v1/chat/completions", json={"model": BASE, "messages": SUM, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "invalid_request_error"), error
    assert said in error["message"], error


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"model": 3}', b"null", b"[" * 5000])
def test_what_is_no_request_is_refused(client, body):
    headers = {"content-type": "application/json"}
    assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 400
    assert client.post("/v1/chat/completions", content=body).status_code == 415


def test_fields_that_ask_for_nothing_pass(client):
    nothing = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "functions": [],
        "safe_tokenization": False, "echo": False, "logit_bias": {}, "user": "me", "metadata": {},
        "store": False, "service_tier": "auto", "reasoning_effort": None, "stop": None,
        "presence_penalty": 0, "top_logprobs": 0, "stream": False, "stream_options": None,
    }  # fmt: skip
    reply = client.post(
        "/v1/chat/completions", json={"model": BASE, "messages": SUM, "max_tokens": 2, **nothing}
    )
    assert reply.status_code == 200, reply.text


def test_a_model_that_is_not_there_is_not_found(client):
    reply = client.post("/v1/chat/completions", json={"model": "other", "messages": SUM})
    assert reply.status_code == 404
    assert "not deployed" in reply.json()["error"]["message"]


# With what a model says given


class Given:
    """One model that says what `script` gives."""

    def __init__(self, tokenizer: LoadedTokenizer, context_length: int | None = 2048) -> None:
        self.sampler = ScriptedSampler(lambda ids, params, seed: said("hello"))
        self.model = ServedModel(
            name="m", sampler=self.sampler, tokenizer=tokenizer, context_length=context_length
        )

    async def find(self, name: str) -> ServedModel:
        if name != "m":
            raise ApiError.unknown_model(name, served=["m"])
        return self.model

    async def listed(self):
        return []


def said(text: str, *, finish_reason: str = "stop", **changes) -> Completion:
    ids = TOKENIZER.encode(text) + [EOS] * (finish_reason == "stop")
    fields = {
        "token_ids": ids,
        "logprobs": [-0.5] * len(ids),
        "raw_logprobs": [-0.25] * len(ids),
        "finish_reason": finish_reason,
        "text": text,
    }
    return Completion(**{**fields, **changes})


class Asking:
    def __init__(self, given: Given, client: httpx.Client, lines: list[str], url: str) -> None:
        self.given, self.lines, self.url = given, lines, url
        self._client = client

    def __call__(self, text_or_completion, **body) -> dict | list[dict]:
        completion = (
            said(text_or_completion) if isinstance(text_or_completion, str) else text_or_completion
        )
        self.given.sampler.script = lambda ids, params, seed: completion
        reply = self._client.post(
            "/v1/chat/completions", json={"model": "m", "messages": SUM, **body}
        )
        assert reply.status_code == 200, reply.text
        return chunks_of(reply) if body.get("stream") else reply.json()


@contextlib.contextmanager
def asking():
    given, lines = Given(TOKENIZER), []
    completions = CompletionEndpoints(given)
    app = Starlette(
        routes=[*completions.routes(), *ChatEndpoints(completions, say=lines.append).routes()],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.stopping = completions.stopping
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield Asking(given, client, lines, url)


@pytest.fixture
def ask():
    with asking() as ask:
        yield ask


def test_tool_calls_are_read_as_calls(ask):
    first, second = (ask(f"I will.\n{CALL}{CALL}", tools=[ADD])["choices"][0] for _ in range(2))
    assert first["finish_reason"] == "tool_calls"
    message = first["message"]
    assert message["content"].strip() == "I will."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "add", "arguments": '{"a":2,  "b": 40}'}
    ] * 2
    ids = [call["id"] for one in (first, second) for call in one["message"]["tool_calls"]]
    assert len(set(ids)) == 4
    assert all(one.startswith("call_") for one in ids)


def test_calls_are_text_where_no_tools_are_offered_or_none_may_be_called(ask):
    for body in ({}, {"tools": [ADD], "tool_choice": "none"}):
        (choice,) = ask(CALL, **body)["choices"]
        assert choice["message"] == {"role": "assistant", "content": CALL}
        assert choice["finish_reason"] == "stop"


def test_calls_are_streamed(ask):
    chunks = ask(CALL, tools=[ADD], stream=True, logprobs=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["id"].startswith("call_")
    assert calls[0]["function"]["name"] == "add"
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":2,  "b": 40}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    ids = [
        row["token_id"]
        for chunk in chunks
        for row in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert ids == said(CALL).token_ids


def test_a_call_that_was_cut_off_ended_for_length(ask):
    cut = said(CALL, finish_reason="length")
    (choice,) = ask(cut, tools=[ADD])["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"]


def test_malformed_calls_stay_text(ask):
    text = '<tool_call>{"name": "add", "arguments": {</tool_call>'
    (choice,) = ask(text, tools=[ADD])["choices"]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]


def test_thinking_is_apart(ask):
    text = "<think>\nhm\n</think>\n\n42"
    (choice,) = ask(text)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "42", "reasoning_content": "hm"}
    deltas = [chunk["choices"][0]["delta"] for chunk in ask(text, stream=True)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "42"


def test_weights_that_changed_on_the_way_are_named(ask):
    changed = said("hello world", policy_version="new", first_policy_version="old")
    names = [chunk["model"] for chunk in ask(changed, stream=True)]
    assert (names[0], names[-1]) == ("m@old", "m@new")
    assert ask(changed)["model"] == "m"


def test_what_is_not_enforced_is_said_once(ask):
    for _ in range(2):
        ask("hello", tools=[ADD], tool_choice="required", parallel_tool_calls=False)
        strict = {**ADD, "function": {**ADD["function"], "strict": True}}
        ask("hello", tools=[strict], tool_choice={"type": "function", "function": {"name": "add"}})
    assert sorted(line.split(" is not")[0] for line in ask.lines) == [
        "chat: parallel_tool_calls",
        "chat: tool_choice",
        "chat: tools.strict",
    ]


def test_settings_reach_the_sampler(ask):
    ask("hello", temperature=0.5, top_p=0.9, top_k=3, stop=["x", "y"], seed=7, n=2, max_tokens=5)
    (_, params, first), (_, _, second) = ask.given.sampler.asked
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 3)
    assert (params.stop, params.max_tokens, first) == (("x", "y"), 5, 7)
    assert second not in (None, 7)


def test_histories_of_clients_are_rendered_as_the_template_does(ask):
    function = {"name": "add", "arguments": "{}"}
    called = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [],
        "tool_calls": [{"id": "c1", "type": "function", "index": 0, "function": function}],
    }  # fmt: skip
    parts = [{"type": "text", "text": "1+2"}]
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    ask("3", messages=[{"role": "user", "content": parts}, called, result], tools=[ADD])
    ((ids, _, _),) = ask.given.sampler.asked
    text = TOKENIZER.decode(ids)
    assert text.startswith('<|im_start|>system\n{"tools": [')
    assert "<|im_start|>user\n1+2<|im_end|>" in text
    assert '"name": "add", "arguments": ' in text
    assert text.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


def test_a_client_that_leaves_cancels_its_completions(ask):
    ask.given.sampler.held = lambda seed: True
    connection = post_and_leave(
        ask.url, {"model": "m", "messages": SUM, "n": 2}, path="/v1/chat/completions"
    )
    for _ in range(2):
        assert ask.given.sampler.waiting.acquire(timeout=PATIENCE)
    connection.close()
    for _ in range(2):
        assert ask.given.sampler.cancelled.acquire(timeout=PATIENCE)


def test_a_server_that_stops_answers_503_and_cancels():
    with asking() as ask:
        ask.given.sampler.held = lambda seed: True
        connection = post_and_leave(
            ask.url, {"model": "m", "messages": SUM}, path="/v1/chat/completions"
        )
        assert ask.given.sampler.waiting.acquire(timeout=PATIENCE)
    with connection, connection.makefile("rb") as reply:
        assert reply.readline() == b"HTTP/1.1 503 Service Unavailable\r\n"
    assert ask.given.sampler.cancelled.acquire(timeout=PATIENCE)


def test_a_model_without_a_template_does_not_chat():
    completions = CompletionEndpoints(Given(LoadedTokenizer.wrap(byte_tokenizer())))
    app = Starlette(
        routes=ChatEndpoints(completions).routes(), exception_handlers=EXCEPTION_HANDLERS
    )
    app.state.stopping = completions.stopping
    with running(app) as url:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "m", "messages": SUM}, timeout=PATIENCE
        )
    assert reply.status_code == 400
    assert "has no chat template" in reply.json()["error"]["message"]


def chunks_of(reply: httpx.Response) -> list[dict]:
    *blocks, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def ids_of(choice: dict) -> list[int]:
    return values_of(choice, "token_id")


def values_of(choice: dict, name: str) -> list:
    return [row[name] for row in choice["logprobs"]["content"]]
