"""The gateway over HTTP: whose calls are whose, retries, limits, refusals, rewards, the record."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from eval_protocol_rft.episodes.gateway import (
    AgentRolloutProcessor,
    Gateway,
    Session,
    SessionLimits,
    SessionSettings,
)
from eval_protocol_rft.sampling import RefusedError, RetryPolicy, SamplingError, SamplingParams
from tests.episodes.gateway.models import CALL, Model, tool_model
from tests.rollouts import TOOLS
from tests.waiting import PATIENCE

ASK = [{"role": "user", "content": "add 2 and 40"}]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def gateway_of(model: Model, **settings: Any) -> Gateway:
    params = settings.pop("params", SamplingParams(model="policy"))
    return Gateway(
        model,
        model.tokenizer,
        settings=SessionSettings(params=params, **settings),
        retry=RetryPolicy(max_attempts=1),
    )


async def post(
    http: aiohttp.ClientSession,
    session: Session,
    body: dict[str, Any],
    path: str = "/chat/completions",
    **headers: str,
) -> tuple[int, dict[str, Any]]:
    headers = {"authorization": f"Bearer {session.api_key}", **headers}
    async with http.post(session.base_url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


def chat(messages: list[dict[str, Any]] = ASK, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": messages, **fields}


async def left(session: Session) -> Any:
    """Once the gateway has seen that the client of the session's one call went away: the call."""
    (pending,) = session._pending.all()
    while pending.clients:  # noqa: ASYNC110 - nothing tells it
        await asyncio.sleep(0)
    return pending


async def test_a_tool_agents_tokens_are_those_of_the_wire() -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session("row")
        client = session.openai()
        messages: list[Any] = list(ASK)
        first = await client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
        (call,) = first.choices[0].message.tool_calls
        assert call.function.arguments == '{"a":2,  "b": 40}'  # as it was sampled
        messages.append(first.choices[0].message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "42"})
        last = await client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
        assert last.choices[0].message.content == "It is 42."
        done = await session.finish()
        await client.close()
    (segment,) = done.segments
    (first_prompt, one), (second_prompt, two) = model.wire
    assert segment.tokens.tolist() == [*second_prompt, *two.token_ids]
    assert second_prompt[: len(first_prompt) + len(one.token_ids)] == first_prompt + one.token_ids
    sampled = segment.tokens[segment.loss_mask == 1].tolist()
    assert sampled == [*one.token_ids, *two.token_ids]
    logprobs = segment.logprobs[segment.loss_mask == 1].tolist()
    assert logprobs == pytest.approx([*one.logprobs, *two.logprobs])
    assert done.record.metrics == {"calls": 2, "branches": 1, "shared": "first"}


@pytest.mark.parametrize("header", [None, "1"])
async def test_a_call_that_was_interrupted_is_answered_with_what_was_sampled(
    http: aiohttp.ClientSession, header: str | None
) -> None:
    model = tool_model()
    model.gate = asyncio.Event()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        leaving = asyncio.ensure_future(post(http, session, chat()))
        await asyncio.wait_for(model.began.acquire(), PATIENCE)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        headers = {} if header is None else {"x-stainless-retry-count": header}
        if header is None:
            await left(session)
        again = asyncio.ensure_future(post(http, session, chat(), **headers))
        await asyncio.sleep(0)
        model.gate.set()
        status, reply = await again
        done = await session.finish()
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == CALL
    assert len(model.wire) == 1
    assert done.record.turns == 1
    assert "undelivered" not in done.record.metrics


async def test_two_calls_alike_at_once_draw_two_completions(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session(seed=1)
        await asyncio.gather(*(post(http, session, chat()) for _ in range(2)))
        done = await session.finish()
    assert len(model.wire) == 2
    assert len(set(model.seeds)) == 2
    assert done.record.metrics["branches"] == 2
    assert [s.num_sampled for s in done.segments] == [len(c.token_ids) for _, c in model.wire]


async def test_what_no_client_had_is_kept_and_counted(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    model.gate = asyncio.Event()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        leaving = asyncio.ensure_future(post(http, session, chat(stream=True)))
        await asyncio.wait_for(model.began.acquire(), PATIENCE)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        pending = await left(session)
        model.gate.set()
        await asyncio.wait({pending.task})
        done = await session.finish()
    assert done.record.metrics["undelivered"] == 1
    assert done.segments[0].num_sampled == len(model.wire[0][1].token_ids)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"turns": 2}, "turns"),
        ({"tokens": 150}, "tokens"),
        ({"bytes": 300}, "bytes"),
        ({"seconds": 0.05}, "seconds"),
    ],
)
async def test_a_limit_refuses_further_calls_and_keeps_what_there_is(
    http: aiohttp.ClientSession, limits: dict[str, Any], reason: str
) -> None:
    model = tool_model()
    async with gateway_of(model, limits=SessionLimits(**limits)) as gateway:
        session = gateway.session()
        other = gateway.session()
        answers = []
        for number in range(8):
            said = [{"role": "user", "content": f"{number}: " + "add " * 12}]
            answers.append(await post(http, session, chat(said)))
            if reason == "seconds":
                await asyncio.sleep(0.03)
        assert (await post(http, other, chat()))[0] == 200
        done = await session.finish()
    statuses = [status for status, _ in answers]
    assert statuses == sorted(statuses)
    assert {*statuses} == {200, 400}
    assert answers[-1][1]["error"]["code"] == "session_limit"
    assert done.record.stop_reason == reason
    assert done.record.turns == statuses.count(200)


async def test_no_session_is_reached_with_another_key_or_address(
    http: aiohttp.ClientSession,
) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        mine, other = gateway.session("mine"), gateway.session("other")
        keys = [other.api_key, "", "EMPTY", mine.api_key[:-1], mine.api_key + "x", "\u00e9"]
        for key in keys:
            for path in ("/chat/completions", "/responses", "/messages", "/models"):
                method = "get" if path == "/models" else "post"
                headers = {"authorization": f"Bearer {key}".encode().decode("latin-1")}
                async with http.request(
                    method, mine.base_url + path, json=chat(), headers=headers
                ) as response:
                    assert response.status == 401, (key, path)
                    assert "API key" in (await response.json())["error"]["message"]
        await mine.end()
        assert (await post(http, mine, chat()))[0] == 401
        by_key_alone = gateway.url + "/v1/chat/completions"
        headers = {"x-api-key": other.api_key}
        async with http.post(by_key_alone, json=chat(), headers=headers) as response:
            assert response.status == 200
        assert (await mine.finish()).segments == []
        assert (await other.finish()).record.turns == 1


async def test_web_pages_and_unknown_addresses_are_refused(http: aiohttp.ClientSession) -> None:
    async with gateway_of(tool_model()) as gateway:
        session = gateway.session()
        status, reply = await post(http, session, chat(), origin="http://evil.example")
        assert (status, "web pages" in reply["error"]["message"]) == (403, True)
        status, reply = await post(http, session, chat(), host="evil.example")
        assert (status, "loopback" in reply["error"]["message"]) == (403, True)
        status, reply = await post(http, session, chat(), "/completions")
        assert status == 404
        assert "/v1" in reply["error"]["message"]
        status, reply = await post(http, session, chat(), "/v1/messages")  # of base URL with /v1
        assert reply["type"] == "error"  # in Anthropic's shape: max_tokens is missing
        assert "max_tokens" in reply["error"]["message"]


async def test_the_runs_sampling_is_kept_on_record_or_refused(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    params = SamplingParams(model="policy", temperature=0.8)
    pinned = frozenset({"temperature"})
    async with gateway_of(model, params=params, pinned=pinned) as gateway:
        session = gateway.session()
        assert (await post(http, session, chat(temperature=0.1, top_p=0.5)))[0] == 200
        done = await session.finish()
    assert (model.asked[0].temperature, model.asked[0].top_p) == (0.8, 0.5)
    assert done.record.metrics["departures"] == [
        {"field": "temperature", "asked": 0.1, "used": 0.8, "calls": 1}
    ]
    refusing = {"params": params, "pinned": pinned, "on_other_sampling": "refuse"}
    async with gateway_of(model, **refusing) as gateway:
        session = gateway.session()
        status, reply = await post(http, session, chat(temperature=0.1))
        assert (status, reply["error"]["param"]) == (400, "temperature")
        assert (await post(http, session, chat(temperature=0.8)))[0] == 200


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
async def test_what_is_not_enforced_is_on_record_or_refused(
    http: aiohttp.ClientSession, fields: dict[str, Any], name: str
) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        assert (await post(http, session, chat(**fields)))[0] == 200
        done = await session.finish()
    assert [one["field"] for one in done.record.metrics["departures"]] == [name]
    async with gateway_of(model, strict=True) as gateway:
        status, reply = await post(http, gateway.session(), chat(**fields))
        assert (status, reply["error"]["param"]) == (400, name)
        assert len(model.wire) == 1


async def test_an_engine_that_constrains_is_given_the_format(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    async with gateway_of(model, guided_decoding=True) as gateway:
        session = gateway.session()
        await post(http, session, chat(response_format=wanted))
        assert model.asked[0].extra == {"response_format": wanted}
        assert "departures" not in (await session.finish()).record.metrics


async def test_the_contexts_end_is_told_and_ends_nothing_else(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    async with gateway_of(model, context_length=120) as gateway:
        session = gateway.session()
        long = [{"role": "user", "content": "x" * 200}]
        status, reply = await post(http, session, chat(long))
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        status, reply = await post(http, session, chat(long, max_tokens=5, stream=True))
        assert status == 400  # before the first byte of a stream
        status, reply = await post(http, session, chat(max_tokens=128_000))
        assert status == 200
        assert model.asked[0].max_tokens == 120 - reply["usage"]["prompt_tokens"]
        assert session.record().record.stop_reason == "done"
        await post(http, session, chat(long))
        done = await session.finish()
    assert (done.record.turns, done.record.stop_reason) == (1, "context")


async def test_a_completion_that_cannot_be_had_fails_the_rollout(
    http: aiohttp.ClientSession,
) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        assert (await post(http, session, chat()))[0] == 200
        model.failing = SamplingError("the engine is gone", kind="unavailable", status=503)
        status, reply = await post(http, session, chat())
        assert (status, reply["error"]["code"]) == (502, "sampling_failed")
        failure = session.record().failure
        assert failure is not None
        assert "the engine is gone" in failure.message
        model.failing = None
        assert (await post(http, session, chat()))[0] == 200
        assert session.record().failure is None  # the same call was answered in the end
        model.failing = RefusedError("too long for the engine")
        status, reply = await post(http, session, chat(stop="x"))
        assert (status, reply["error"]["message"]) == (400, "too long for the engine")


async def test_a_stream_whose_completion_fails_ends_with_an_error(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval_protocol_rft.episodes.gateway._answering.KEEP_ALIVE_SECONDS", 0.01)
    model = tool_model()
    model.gate = asyncio.Event()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        headers = {"authorization": f"Bearer {session.api_key}"}
        url = session.base_url + "/chat/completions"
        async with http.post(url, json=chat(stream=True), headers=headers) as response:
            assert response.content_type == "text/event-stream"
            assert (await response.content.readline()).startswith(b": keep-alive")
            model.failing = SamplingError("gone", kind="unavailable")
            model.gate.set()
            rest = (await response.content.read()).decode()
    events = [line.removeprefix("data: ") for line in rest.splitlines() if line.startswith("data")]
    assert "gone" in json.loads(events[0])["error"]["message"]
    assert "[DONE]" not in rest


async def test_rewards_of_calls_stand_on_the_steps(http: aiohttp.ClientSession) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        _, first = await post(http, session, chat())
        messages = [*ASK, first["choices"][0]["message"], {"role": "user", "content": "more"}]
        await post(http, session, chat(messages), **{"x-rft-reward": "0.5"})
        assert (await post(http, session, {"reward": 2.0}, "/reward"))[0] == 200
        assert (await post(http, session, {"reward": "much"}, "/reward"))[0] == 400
        named = {"reward": 0.25, "id": first["id"]}
        assert (await post(http, session, named, "/reward"))[0] == 200
        done = await session.finish()
    assert done.record.step_rewards == [0.25, 2.0]


async def test_responses_go_on_from_an_id(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    tool = {"type": "function", **TOOLS[0]["function"]}
    async with gateway_of(model) as gateway:
        session, other = gateway.session(), gateway.session()
        client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
        first = await client.responses.create(
            model="m", input="add 2 and 40", instructions="Be brief.", tools=[tool]
        )
        output = {"type": "function_call_output", "call_id": first.output[0].call_id}
        last = await client.responses.create(
            model="m",
            previous_response_id=first.id,
            input=[{**output, "output": "42"}],
            instructions="Be brief.",
            tools=[tool],
        )
        assert last.output_text == "It is 42."
        done = await session.finish()
        await client.close()
        body = {"model": "m", "input": "x", "previous_response_id": first.id}
        status, reply = await post(http, other, body, "/responses")
        assert (status, reply["error"]["param"]) == (400, "previous_response_id")
    (segment,) = done.segments
    assert segment.tokens.tolist() == [*model.wire[1][0], *model.wire[1][1].token_ids]
    assert done.record.metrics["branches"] == 1


async def test_keys_are_in_no_record(http: aiohttp.ClientSession) -> None:
    async with gateway_of(tool_model()) as gateway:
        session = gateway.session()
        body = {**chat(), "model": session.model_name("policy")}
        async with http.post(
            gateway.url + "/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {gateway.api_key}"},
        ) as response:
            assert (await response.json())["model"] == "policy"
        done = await session.finish()
    assert done.record.turns == 1
    assert session.api_key not in repr(done.record)


async def test_a_sessions_clients_load_no_certificates_for_plain_http(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "certificates.pem"
    broken.write_text("none")
    monkeypatch.setenv("SSL_CERT_FILE", str(broken))
    async with gateway_of(tool_model()) as gateway:
        session = gateway.session()
        async with session.openai() as client, session.anthropic():
            reply = await client.chat.completions.create(model="m", messages=ASK)
        assert reply.choices[0].finish_reason == "stop"
        for make in (session.openai, session.anthropic):
            (await asyncio.to_thread(make)).close()


async def test_requests_of_an_agent_in_this_process_are_not_told_one_by_one() -> None:
    told = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    for logger in told:
        logger.setLevel(logging.NOTSET)
    AgentRolloutProcessor(lambda row, session: None)
    assert [logger.level for logger in told] == [logging.WARNING] * 2


REFUSES = (
    "{%- for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system messages come first') }}{% endif %}{% endfor -%}"
)
DROPS = (
    "{%- set later = messages[1:] | rejectattr('role', 'eq', 'system') | list %}"
    "{%- set messages = messages[:1] + later %}"
)


@pytest.mark.parametrize("before", ["", REFUSES, DROPS])
async def test_a_system_message_in_the_middle_reaches_the_model(
    http: aiohttp.ClientSession, before: str
) -> None:
    """As Pydantic AI sends one after an answer that it cannot use."""
    model = Model(lambda prompt: "Yes.")
    model.tokenizer.chat_template = before + model.tokenizer.chat_template
    async with gateway_of(model) as gateway:
        session = gateway.session()
        _, first = await post(http, session, chat())
        more = [{"role": "system", "content": "Call a tool."}, {"role": "user", "content": "?"}]
        messages = [*ASK, first["choices"][0]["message"], *more]
        assert (await post(http, session, chat(messages)))[0] == 200
        done = await session.finish()
    sent = model.tokenizer.decode(model.wire[1][0])
    assert f"<|im_start|>{'user' if before else 'system'}\nCall a tool.<|im_end|>" in sent
    assert done.record.metrics["branches"] == 1
    noted = done.record.metrics.get("rendered_as", [])
    assert noted == (["messages[2]: a later system message as the user's"] if before else [])
