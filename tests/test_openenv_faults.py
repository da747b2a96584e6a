"""Servers of OpenEnv that go away or refuse: what the environment says and leaves behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from eval_protocol.models import EvaluationRow, Message

from eval_protocol_rft.episodes._openenv import OpenEnvEnvironment, OpenEnvError


async def leaving(request: web.Request) -> web.WebSocketResponse:
    """Begins a session, and is gone."""
    assert request.transport is not None
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.receive()
    await socket.send_str(json.dumps({"data": {"observation": {"left": 1}}}))
    request.transport.abort()
    return socket


async def refusing(request: web.Request) -> web.Response:
    return web.Response(status=401)


@pytest.fixture
async def place() -> AsyncIterator[str]:
    """`HOST:PORT` of both."""
    app = web.Application()
    app.router.add_get("/leaving/ws", leaving)
    app.router.add_get("/refusing/ws", refusing)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    yield f"{host}:{port}"
    await runner.cleanup()


async def test_a_server_that_went_away_leaves_no_connection_open(place: str) -> None:
    world = OpenEnvEnvironment(f"http://user:hunter2@{place}/leaving")
    await world.reset(EvaluationRow(messages=[]), group_seed=1)
    for _ in range(2):
        with pytest.raises(OpenEnvError, match=f"http://{place}/leaving/ws closed the") as caught:
            await world.step([], Message(role="assistant", content='{"take": 1}'))
        assert "hunter2" not in str(caught.value)
    await world.close()
    assert world._client is not None
    assert world._client.closed


async def test_a_server_that_goes_away_before_the_session_is_closed(place: str) -> None:
    world = OpenEnvEnvironment(f"http://{place}/leaving")
    await world.reset(EvaluationRow(messages=[]), group_seed=1)
    assert world._socket is not None
    transport = world._socket._response.connection.transport  # type: ignore[union-attr]
    assert transport is not None
    transport.abort()
    await world.close()
    assert world._client is not None
    assert world._client.closed


@pytest.mark.parametrize("user", ["user:hunter2", "user:p@hunter2", "hunter2"])
async def test_no_error_tells_the_urls_password(place: str, user: str) -> None:
    world = OpenEnvEnvironment(f"ws://{user}@{place}/refusing")
    with pytest.raises(OpenEnvError, match="cannot be reached: 401") as caught:
        await world.reset(EvaluationRow(messages=[]), group_seed=1)
    await world.close()
    assert "hunter2" not in str(caught.value)
    for url in (f"{user}@{place}", f"ftp://{user}@{place}"):
        with pytest.raises(ValueError, match="no URL of an OpenEnv server") as wrong:
            OpenEnvEnvironment(url)
        assert "hunter2" not in str(wrong.value)
