"""The examples of episodes, run as a user runs them, and what their rows hold."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.local._tokenizer import load_tokenizer
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._answers import parse_tool_calls
from tests.programs import Zygote

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def lake(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Rows of both tests of the frozen lake, by the test's name."""
    folder = tmp_path_factory.mktemp("lake")
    arguments = ("-q", "-p", "no:cacheprovider", "examples/frozen_lake")
    environment = {"EP_OUTPUT_DIR": str(folder)}
    done = zygote.run(*arguments, program="pytest", env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for file in folder.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["eval_metadata"]["name"], []).append(row)
    return found


def test_the_lake_is_written_in_at_most_a_hundred_lines() -> None:
    assert len((EXAMPLES / "frozen_lake/test_frozen_lake.py").read_text().splitlines()) <= 100


def test_the_bundled_model_walks_and_every_episode_is_scored(lake: Any) -> None:
    rows = lake["test_frozen_lake"]
    assert len(rows) == 7
    for row in rows:
        record = RolloutRecord.from_extra(row["execution_metadata"]["extra"])
        assert record.episodes is not None
        reached = [float(e.step_rewards[-1:] == [1.0]) for e in record.episodes]
        assert record.rewards == reached
        assert {e.stop_reason for e in record.episodes} <= {"done", "turns", "length"}


def test_tool_calls_move_and_are_trained_on_token_by_token(lake: Any) -> None:
    tokenizer = load_tokenizer(str(bundled_model_path("arithmetic")))
    rows = lake["test_with_tools"]
    assert len(rows) == 7
    for row in rows:
        record = RolloutRecord.from_extra(row["execution_metadata"]["extra"])
        assert record.episodes is not None
        assert record.trajectories is not None
        for episode, segments in zip(record.episodes, record.trajectories, strict=True):
            (segment,) = segments
            assert sum(segment.logprobs) == pytest.approx(episode.turns * log(1 / 4))
            told = [m for m in episode.messages if m["role"] == "tool"]
            assert len(told) == episode.turns - 1
            said = [m for m in episode.messages if m["role"] == "assistant"]
            assert [call["function"]["name"] for m in said for call in m["tool_calls"]] == [
                "move"
            ] * episode.turns
            sampled = segment.tokens[segment.loss_mask == 1].tolist()
            texts = tokenizer.decode(sampled).split("<|im_end|>")[:-1]
            directions = [
                json.loads(calls[0]["function"]["arguments"])["direction"]
                for _, calls in (parse_tool_calls(text, tokenizer) for text in texts)
            ]
            assert directions == [
                json.loads(m["tool_calls"][0]["function"]["arguments"])["direction"] for m in said
            ]


def test_an_mcp_server_is_used_in_at_most_thirty_lines(zygote: Zygote, tmp_path: Path) -> None:
    assert len((EXAMPLES / "mcp_tools/test_mcp.py").read_text().splitlines()) <= 30
    done = zygote.run(
        *("-q", "-p", "no:cacheprovider", "examples/mcp_tools"),
        program="pytest",
        env={"EP_OUTPUT_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [json.loads(line) for f in tmp_path.rglob("*.jsonl") for line in f.open()]
    assert len(rows) == 2
    for row in rows:
        record = RolloutRecord.from_extra(row["execution_metadata"]["extra"])
        assert record.episodes is not None
        (asked,) = {int(e.messages[0]["content"][:2]) for e in record.episodes}
        for episode, reward in zip(record.episodes, record.rewards or (), strict=True):
            (call,) = episode.messages[1]["tool_calls"]
            right = {"add": 2 * asked, "multiply": asked * asked}[call["function"]["name"]]
            assert json.loads(episode.messages[2]["content"]) == {"result": right}
            assert reward == float(call["function"]["name"] == "add")


@pytest.mark.worlds
def test_a_gymnasium_environment_is_used_in_at_most_thirty_lines(zygote: Zygote) -> None:
    pytest.importorskip("gymnasium", reason="needs gymnasium")
    assert len((EXAMPLES / "gym_lake/test_lake.py").read_text().splitlines()) <= 30
    done = zygote.run(*("-q", "-p", "no:cacheprovider", "examples/gym_lake"), program="pytest")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "16 rows, 256 completions, 256 scored" in done.stdout
