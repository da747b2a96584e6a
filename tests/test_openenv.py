"""A real server of OpenEnv, in an environment of its own, played in messages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval_protocol_rft.episodes._openenv import OpenEnvEnvironment
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._processor import RolloutError
from tests.test_episodes import call, roll_out
from tests.waiting import wait_until

PYTHON = os.environ.get("EP_RFT_OPENENV")
pytestmark = [
    pytest.mark.worlds,
    pytest.mark.skipif(PYTHON is None, reason="needs EP_RFT_OPENENV, a Python with openenv-core"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [str(PYTHON), str(Path(__file__).with_name("openenv_server.py")), str(port)]
    with subprocess.Popen(command) as process:

        def answers() -> bool:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
        process.kill()


def taking(turn: int, prompt: str) -> str:
    """Takes three, then all that is left."""
    left = int(re.findall(r'"left": (\d+)', prompt)[-1])
    return json.dumps({"take": 3 if turn == 0 else left})


async def test_a_session_is_played_to_its_end(url: str) -> None:
    row, _ = await roll_out(
        lambda: OpenEnvEnvironment(url, more=2),
        lambda turn, prompt: f"I take {taking(turn, prompt)}.",
        n=2,
        params={"seed": 7},
    )
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    for episode in record.episodes:
        start = episode.metrics["reset"]["group_seed"] % 5 + 5 + 2
        said = [m["content"] for m in episode.messages if m["role"] == "user"][1:]
        assert said == [json.dumps({"left": start}), json.dumps({"left": start - 3})]
        assert episode.stop_reason == "done"
        assert sum(reward or 0 for reward in episode.step_rewards) == pytest.approx(start / 10)
    assert record.rewards == [
        pytest.approx(sum(reward or 0 for reward in e.step_rewards)) for e in record.episodes
    ]


async def test_calls_of_a_tool_are_actions_and_wrong_ones_are_told(url: str) -> None:
    def script(turn: int, prompt: str) -> str:
        answers = ["hm", call("take", take="much"), call("take", give=1), call("take", take=3)]
        if turn < len(answers):
            return answers[turn]
        return call("take", **json.loads(taking(1, prompt)))

    schema = {"take": {"type": "integer"}}
    row, _ = await roll_out(lambda: OpenEnvEnvironment(url, tool="take", schema=schema), script)
    told = [str(m.content) for m in row.messages if m.role == "tool"]
    assert "take: Input should be a valid integer" in told[0]
    assert "take: Field required" in told[1]
    assert told[2].startswith('{"left": ')
    assert row.tools is not None
    assert row.tools[0]["function"]["parameters"]["properties"] == schema


async def test_what_the_server_refuses_costs_the_episode(url: str) -> None:
    with pytest.raises(RolloutError, match="so many are not left"):
        await roll_out(lambda: OpenEnvEnvironment(url), lambda turn, prompt: '{"take": 99}')
    with pytest.raises(RolloutError, match="cannot be reached"):
        await roll_out(lambda: OpenEnvEnvironment("http://127.0.0.1:9"), lambda turn, prompt: "")
    with pytest.raises(RolloutError, match="no URL of an OpenEnv server"):
        await roll_out(lambda: OpenEnvEnvironment("localhost"), lambda turn, prompt: "")


async def test_sessions_beyond_those_that_the_server_allows_are_failures(url: str) -> None:
    """Three at once where two are allowed; where only so many run at once, all do."""
    row, _ = await roll_out(lambda: OpenEnvEnvironment(url), taking, n=3, seconds=0.05)
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert (len(record.episodes), len(record.failures)) == (2, 1)
    row, _ = await roll_out(lambda: OpenEnvEnvironment(url), taking, n=3, slots=2)
    assert RolloutRecord.from_extra(row.execution_metadata.extra).failures == []
