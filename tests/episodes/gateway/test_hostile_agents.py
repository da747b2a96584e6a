"""Many sessions at once whose agents do everything wrong, beside some that do nothing wrong: every
completion is accounted for, and none in another session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import pytest

from eval_protocol_rft.episodes.gateway import (
    Gateway,
    Session,
    SessionLimits,
    SessionRecord,
    SessionSettings,
)
from eval_protocol_rft.sampling import RetryPolicy, SamplingParams
from tests.episodes.gateway.models import Model

NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
"""Ten thousand requests wait for each other."""
LIMITS = SessionLimits(turns=40, seconds=1800.0, concurrent_calls=4, bytes=400_000)


class World:
    """One gateway, and the sessions whose keys a thief may try."""

    def __init__(self, http: aiohttp.ClientSession, model: Model) -> None:
        self.http, self.model = http, model
        self.sessions: list[Session] = []
        self.refused: Counter[int] = Counter()
        self.floods: list[int] = []
        """Requests of the next sessions that flood; 100 where it is empty."""

    async def ask(
        self, session: Session, messages: list[dict[str, Any]], *, key: str = "", **fields: Any
    ) -> dict[str, Any] | None:
        headers = {"authorization": f"Bearer {key or session.api_key}"}
        url = session.base_url + "/chat/completions"
        body = {"model": "m", "messages": messages, **fields}
        async with self.http.post(url, json=body, headers=headers) as response:
            reply = await response.json()
            if response.status != 200:
                assert "error" in reply
                self.refused[response.status] += 1
                return None
            answer: dict[str, Any] = reply["choices"][0]["message"]
            return answer


def opening(session: Session) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"session {session.name}"}]


async def good(world: World, session: Session) -> None:
    messages = opening(session)
    for _ in range(4):
        answer = await world.ask(session, messages)
        assert answer is not None
        assert session.name in answer["content"]  # its own, and no other's
        messages += [answer, {"role": "user", "content": "go on"}]


async def crashes(world: World, session: Session) -> None:
    await world.ask(session, opening(session))
    raise RuntimeError("crash")


async def hangs(world: World, session: Session) -> None:
    await world.ask(session, opening(session))
    await asyncio.Event().wait()


async def loops(world: World, session: Session) -> None:
    messages = opening(session)
    while answer := await world.ask(session, messages):
        messages += [answer, {"role": "user", "content": "again"}]


async def floods(world: World, session: Session) -> None:
    requests = world.floods.pop() if world.floods else 100
    await asyncio.gather(*(world.ask(session, opening(session)) for _ in range(requests)))


async def connected(*place: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Also where so many come at once that the system lets some wait in vain."""
    while True:
        with contextlib.suppress(OSError):
            return await asyncio.open_connection(*place)


async def closes(world: World, session: Session) -> None:
    """Leaves in the middle of its requests, of its replies and of its streams."""
    address = urlsplit(session.base_url)
    body = json.dumps({"model": "m", "messages": opening(session), "stream": True}).encode()
    head = (
        f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: Bearer {session.api_key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for sent, read in ((head, 0), (head + body[:20], 0), (head + body, 0), (head + body, 30)):
        reader, writer = await connected(address.hostname, address.port)
        writer.write(sent)
        await writer.drain()
        await reader.read(read)
        writer.transport.abort()


async def giant(world: World, session: Session) -> None:
    await world.ask(session, opening(session))
    said = [{"role": "user", "content": "x" * 300_000}]
    for _ in range(3):
        await world.ask(session, said, max_tokens=1)


async def steals(world: World, session: Session) -> None:
    """Tries keys and addresses of others."""
    await world.ask(session, opening(session))
    for other in random.Random(session.name).sample(world.sessions, 5):
        if other is session:
            continue
        assert await world.ask(other, opening(session), key=session.api_key) is None
        assert await world.ask(session, opening(session), key=other.api_key) is None


async def nonsense(world: World, session: Session) -> None:
    """What is no request."""
    headers = {"authorization": f"Bearer {session.api_key}"}
    for data in (b"", b"{", b"\xff" * 100, b"[]", b'{"messages": 3}', b"[" * 10_000):
        url = session.base_url + "/chat/completions"
        async with world.http.post(url, data=data, headers=headers) as response:
            assert response.status == 400
            world.refused[400] += 1
    await world.ask(session, [{"role": "user", "content": [{"type": "image_url"}]}])
    await world.ask(session, opening(session), n=3)


AGENTS: list[Callable[[World, Session], Awaitable[None]]] = [
    good, crashes, hangs, loops, floods, closes, giant, steals, nonsense,
]  # fmt: skip


async def hostile(
    count: int, *, floods: list[int] | None = None
) -> tuple[Model, list[tuple[str, SessionRecord]], Counter[int]]:
    model = Model(lambda prompt: "I am " + prompt.partition("session ")[2].partition("<")[0])
    settings = SessionSettings(params=SamplingParams(model="policy"), limits=LIMITS)
    connector = aiohttp.TCPConnector(limit=200)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=NO_TIMEOUT) as http,
        Gateway(
            model, model.tokenizer, settings=settings, retry=RetryPolicy(max_attempts=1)
        ) as gateway,
    ):
        world = World(http, model)
        world.floods = list(floods or [])
        world.sessions = [gateway.session(f"s{number:04d}") for number in range(count)]
        runs = []
        for number, session in enumerate(world.sessions):
            agent = AGENTS[number % len(AGENTS)]
            runs.append((agent, session, asyncio.ensure_future(agent(world, session))))
        await asyncio.wait([run for agent, _, run in runs if agent is not hangs], timeout=None)
        done = []
        for agent, session, run in runs:
            run.cancel()
            (outcome,) = await asyncio.gather(run, return_exceptions=True)
            if agent not in (crashes, hangs):
                assert outcome is None, (agent.__name__, outcome)
            if pending := session._pending.all():  # what nobody waits for any more is sampled
                await asyncio.wait({one.task for one in pending})
            done.append((agent.__name__, await session.finish()))
        assert not gateway._sessions
        assert not gateway._by_key
    return model, done, world.refused


def check(model: Model, done: list[tuple[str, SessionRecord]]) -> None:
    sampled = Counter(tuple(completion.token_ids) for _, completion in model.wire)
    kept: Counter[tuple[int, ...]] = Counter()
    logprobs: Counter[float] = Counter()
    for number, (agent, record) in enumerate(done):
        name = f"I am s{number:04d}"
        for segment in record.segments:
            sampled_ids = segment.tokens[segment.loss_mask == 1].tolist()
            text = model.tokenizer.decode(sampled_ids)
            assert text == f"{name}<|im_end|>" * text.count("<|im_end|>") or agent == "giant"
            logprobs.update(segment.logprobs[segment.loss_mask == 1].tolist())
        kept[agent] += record.sampled_tokens
    assert sum(kept.values()) == sum(len(ids) * count for ids, count in sampled.items())
    assert logprobs.total() == sum(kept.values())
    every = Counter(
        value
        for _, completion in model.wire
        for value in np.array(completion.logprobs, np.float32).tolist()
    )
    assert logprobs == every


async def test_every_completion_is_accounted_for_and_none_leaks() -> None:
    model, done, refused = await hostile(len(AGENTS) * 4)
    check(model, done)
    by_agent = dict(done)
    assert by_agent["good"].record.turns == 4
    assert by_agent["loops"].record.stop_reason == "turns"
    assert by_agent["loops"].record.turns == LIMITS.turns
    assert by_agent["floods"].record.stop_reason == "turns"
    assert by_agent["giant"].record.stop_reason == "bytes"
    assert by_agent["closes"].record.turns in (1, 2)  # the last two requests are the same call
    assert by_agent["steals"].record.turns == 1
    assert by_agent["nonsense"].record.turns == 3
    assert refused[401] >= 4 * 5


@pytest.mark.slow
async def test_a_thousand_hostile_sessions() -> None:
    model, done, _ = await hostile(1000, floods=[10_000] * 3)
    check(model, done)
