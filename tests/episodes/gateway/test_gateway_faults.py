"""What goes wrong between a client and its session: halves of requests, ends at the wrong time,
answers that look alike. Each test is of one thing that once went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest

from eval_protocol_rft.episodes._rendering import ChatText
from eval_protocol_rft.episodes._turns import Prompt, Turn, begin
from eval_protocol_rft.episodes.gateway import Session, SessionLimits
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, TokenIds
from tests.episodes.gateway.models import CALL, Model, tool_model
from tests.episodes.gateway.test_gateway import ASK, chat, gateway_of, post
from tests.rollouts import TOOLS, chat_tokenizer
from tests.waiting import PATIENCE


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


async def half_sent(session: Session, body: bytes) -> tuple[asyncio.StreamReader, Any]:
    """A request of which the last byte is still to come, once the session has heard of it."""
    address = urlsplit(session.base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST {address.path}/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\n"
        f"authorization: Bearer {session.api_key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body[:-1])
    async with asyncio.timeout(PATIENCE):
        while not session._log.calls:  # noqa: ASYNC110 - nothing tells it
            await asyncio.sleep(0.001)
    return reader, writer


async def test_a_request_that_is_whole_when_its_session_is_over_samples_nothing() -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        body = msgspec.json.encode(chat())
        reader, writer = await half_sent(session, body)
        await session.finish()
        writer.write(body[-1:])
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 403")
    assert not model.asked


async def test_a_client_that_leaves_in_mid_request_is_no_fault_of_the_gateways(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tool_model()
    with caplog.at_level(logging.WARNING):
        async with gateway_of(model) as gateway:
            session = gateway.session()
            _, writer = await half_sent(session, msgspec.json.encode(chat()))
            writer.transport.abort()
            other = gateway.session()
            async with aiohttp.ClientSession() as http:
                assert (await post(http, other, chat()))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(model.asked) == 1


async def test_bytes_that_were_not_announced_count(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    async with gateway_of(model, limits=SessionLimits(bytes=2_000)) as gateway:
        session = gateway.session()

        async def chunks() -> AsyncIterator[bytes]:
            yield msgspec.json.encode(chat([{"role": "user", "content": "x" * 3_000}]))

        headers = {"authorization": f"Bearer {session.api_key}"}
        url = f"{session.base_url}/chat/completions"
        async with http.post(url, data=chunks(), headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "session_limit")
        assert (await session.finish()).record.stop_reason == "bytes"
    assert not model.asked


async def test_completions_that_were_there_when_a_session_ended_are_kept(
    http: aiohttp.ClientSession,
) -> None:
    model = tool_model()
    sample, held = model.sample, asyncio.Event()

    async def some_hang(*args: Any, **kwargs: Any) -> Completion:
        completion = await sample(*args, **kwargs)
        if len(model.wire) == 3:
            held.set()
            model.wire.pop()  # the engine never says it
            await asyncio.Event().wait()
        return completion

    model.sample = some_hang  # type: ignore[method-assign]
    async with gateway_of(model) as gateway:
        session = gateway.session()
        call = asyncio.ensure_future(post(http, session, chat(n=3)))
        await asyncio.wait_for(held.wait(), PATIENCE)
        done = await session.finish("seconds")
        assert (await call)[0] == 403
    assert len(done.segments) == 2
    assert done.sampled_tokens == sum(len(completion.token_ids) for _, completion in model.wire)


async def test_a_reward_is_of_the_answer_that_a_call_goes_on_from(
    http: aiohttp.ClientSession,
) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        _, first = await post(http, session, chat())
        await post(http, session, chat([{"role": "user", "content": "a sub-agent's"}]))
        more = chat([*ASK, first["choices"][0]["message"], {"role": "user", "content": "more"}])
        for count in ("0", "1"):  # the client tries again, with the same header
            headers = {"x-rft-reward": "0.5", "x-stainless-retry-count": count}
            assert (await post(http, session, more, **headers))[0] == 200
        done = await session.finish()
    assert done.record.step_rewards == [0.5, None, None]


async def test_so_many_choices_are_refused_before_anything_is_made_of_them(
    http: aiohttp.ClientSession,
) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        status, reply = await post(http, gateway.session(), chat(n=10**12))
    assert (status, reply["error"]["param"]) == (400, "n")
    assert not model.asked


async def test_a_limit_of_tokens_holds_for_calls_that_wait(http: aiohttp.ClientSession) -> None:
    model = tool_model()
    model.gate = asyncio.Event()
    limits = SessionLimits(tokens=200, concurrent_calls=1)
    async with gateway_of(model, limits=limits) as gateway:
        session = gateway.session()
        texts = [f"{number} {'x' * 50}" for number in range(8)]
        calls = [post(http, session, chat([{"role": "user", "content": t}])) for t in texts]
        waiting = [asyncio.ensure_future(call) for call in calls]
        async with asyncio.timeout(PATIENCE):
            while session._log.calls < len(texts):  # noqa: ASYNC110 - nothing tells it
                await asyncio.sleep(0.001)
        model.gate.set()
        statuses = sorted(status for status, _ in await asyncio.gather(*waiting))
        done = await session.finish()
    assert statuses[0] == 200
    assert statuses[-1] == 400
    assert len(model.asked) == statuses.count(200) < len(texts)
    assert done.record.stop_reason == "tokens"


async def test_an_error_has_the_shape_of_the_protocol_that_the_address_names(
    http: aiohttp.ClientSession,
) -> None:
    async with gateway_of(tool_model()) as gateway:
        session = gateway.session()
        key = {"authorization": f"Bearer {session.api_key}"}
        for path, headers, status in (
            ("/v1/v1/messages", {}, 401),
            ("/v1/messages/count_tokens", key, 404),
            ("/messages", {"authorization": "Bearer other"}, 401),
            ("/v1/nothing", key, 404),
            ("/v1/responses", {}, 401),
        ):
            url = session.anthropic_url + path
            async with http.post(url, json={}, headers=headers) as response:
                body = await response.json()
            assert response.status == status
            assert (body.get("type") == "error") == ("messages" in path)
            assert body["error"]["message"]


async def test_calls_that_look_alike_are_told_apart_by_their_ids(
    http: aiohttp.ClientSession,
) -> None:
    model = tool_model()
    async with gateway_of(model) as gateway:
        session = gateway.session()
        replies = [(await post(http, session, chat(tools=TOOLS)))[1] for _ in range(2)]
        answer = replies[0]["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "42"}
        await post(http, session, chat([*ASK, answer, result], tools=TOOLS))
        first, _, last = (turn for turn, _ in session._tree.turns)
        assert last.prompt.behind is first


async def test_an_answer_that_is_named_is_meant_among_those_that_look_alike(
    http: aiohttp.ClientSession,
) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        ask = {"model": "m", "input": "well?", "instructions": "Be brief."}
        replies = [(await post(http, session, ask, "/responses"))[1] for _ in range(2)]
        more = {**ask, "input": "more", "previous_response_id": replies[0]["id"]}
        item = {"type": "item_reference", "id": replies[0]["output"][0]["id"]}
        said = [{"role": "user", "content": "well?"}, item, {"role": "user", "content": "still"}]
        await post(http, session, more, "/responses")
        await post(http, session, {**ask, "input": said}, "/responses")
        first, _, second, third = (turn for turn, _ in session._tree.turns)
        assert second.prompt.behind is third.prompt.behind is first


async def test_instructions_are_of_one_request(http: aiohttp.ClientSession) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        ask: dict[str, Any] = {"model": "m", "input": "well?", "instructions": "Be brief."}
        _, reply = await post(http, session, ask, "/responses")
        for instructions in ("Be brief.", "Be long.", None):
            more = {"model": "m", "input": "more", "previous_response_id": reply["id"]}
            fields = more if instructions is None else {**more, "instructions": instructions}
            assert (await post(http, session, fields, "/responses"))[0] == 200
        metrics = (await session.finish()).record.metrics
    texts = [model.tokenizer.decode(prompt) for prompt, _ in model.wire]
    assert ["Be brief." in text for text in texts] == [True, True, False, False]
    assert "Be long." in texts[2]
    assert [edit["message"] for edit in metrics["client_edits"]] == [0, 0]


async def test_answers_that_look_alike_are_told_apart_by_what_stands_behind_them(
    http: aiohttp.ClientSession,
) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        talk: list[dict[str, Any]] = [*ASK]
        for text in ("more", "still more"):
            _, reply = await post(http, session, chat(talk))
            talk += [reply["choices"][0]["message"], {"role": "user", "content": text}]
        await post(http, session, chat(ASK))  # a sub-agent asks the same, and is answered the same
        assert (await post(http, session, chat(talk)))[0] == 200
        done = await session.finish()
    prompt, completion = model.wire[-1]
    kept = [*model.wire[1][0], *model.wire[1][1].token_ids]
    assert prompt[: len(kept)] == kept
    assert [*prompt, *completion.token_ids] in [one.tokens.tolist() for one in done.segments]
    assert [one.num_sampled for one in done.segments] == [3 * len(completion.token_ids), 4]
    assert done.record.metrics["branches"] == 2
    assert "client_edits" not in done.record.metrics


async def edits_of(http: aiohttp.ClientSession, change: Any) -> list[dict[str, Any]]:
    """What is on record where an agent with two calls of tools behind it changes its history."""
    model = Model(lambda prompt: CALL if prompt.count("<|im_start|>tool") < 2 else "It is 42.")
    async with gateway_of(model) as gateway:
        session = gateway.session()
        talk: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, *ASK]
        fields: dict[str, Any] = {"tools": TOOLS}
        for number in range(2):
            _, reply = await post(http, session, chat(talk, **fields))
            answer = reply["choices"][0]["message"]
            result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"]}
            talk += [answer, {**result, "content": f"{'4' * 400}{number}"}]
        await post(http, session, chat([{"role": "user", "content": "a sub-agent's"}]))
        change(talk, fields)
        assert (await post(http, session, chat(talk, **fields)))[0] == 200
        metrics = (await session.finish()).record.metrics
    edits: list[dict[str, Any]] = metrics.get("client_edits", [])
    return edits


async def test_what_was_changed_in_a_long_message_is_shown(http: aiohttp.ClientSession) -> None:
    def change(talk: list[dict[str, Any]], fields: dict[str, Any]) -> None:
        talk[3]["content"] = talk[3]["content"][:-1] + "5, no 6"

    (edit,) = await edits_of(http, change)
    assert (edit["message"], edit["call"]) == (3, 3)
    assert edit["before"].endswith("40")
    assert edit["now"].endswith("45, no 6")


async def test_other_tools_are_on_record(http: aiohttp.ClientSession) -> None:
    def change(talk: list[dict[str, Any]], fields: dict[str, Any]) -> None:
        function = {**TOOLS[0]["function"], "name": "plus"}
        fields["tools"] = [{"type": "function", "function": function}]

    (edit,) = await edits_of(http, change)
    assert edit["message"] is None
    assert '"name":"add"' in edit["before"]
    assert '"name":"plus"' in edit["now"]


async def test_a_summary_is_on_record_though_a_sub_agent_spoke_last(
    http: aiohttp.ClientSession,
) -> None:
    def change(talk: list[dict[str, Any]], fields: dict[str, Any]) -> None:
        talk[:4] = [{"role": "user", "content": "So far: 4."}]
        for message in talk:  # and no id tells
            if "tool_calls" in message:
                message["tool_calls"][0]["id"] = message["tool_call_id"] = "mine"
                del message["tool_call_id"]

    (edit,) = await edits_of(http, change)
    assert edit["message"] == 0
    assert "Be brief." in edit["before"]
    assert "So far" in edit["now"]


async def test_a_call_that_fails_is_not_what_a_later_one_changed(
    http: aiohttp.ClientSession,
) -> None:
    model = Model(lambda prompt: "yes")
    async with gateway_of(model, context_length=150) as gateway:
        session = gateway.session()
        _, reply = await post(http, session, chat())
        talk = [*ASK, reply["choices"][0]["message"]]
        status, error = await post(
            http, session, chat([*talk, {"role": "user", "content": "x" * 200}])
        )
        assert (status, error["error"]["code"]) == (400, "context_length_exceeded")
        status, _ = await post(http, session, chat([*talk, {"role": "user", "content": "x"}]))
        assert status == 200
        assert "client_edits" not in (await session.finish()).record.metrics


def test_a_conversation_may_have_thousands_of_turns() -> None:
    chat_text = ChatText(LoadedTokenizer.wrap(chat_tokenizer()), None, {})
    prompt = first = begin(chat_text, ASK)
    sampled = Completion(token_ids=[1, 2], logprobs=[-0.5, -0.5], finish_reason="stop")
    said = {"role": "assistant", "content": "y"}
    for _ in range(2_000):
        turn = Turn(prompt, sampled, said, tail="", again=None)
        prompt = Prompt(
            chat_text, ASK, "", TokenIds(), behind=turn, behind_message=said, new_ids=[7]
        )
        prompt.forget_texts()
    assert prompt.ids == (*first.ids, *[1, 2, 7] * 2_000)
