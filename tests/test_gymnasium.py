"""Real environments of gymnasium, played in messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.episodes._gymnasium import GymnasiumEnvironment
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._processor import RolloutError
from tests.test_episodes import call, roll_out

gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium")
pytestmark = pytest.mark.worlds

LAKE = {"desc": ["SFF", "FHF", "FFG"], "is_slippery": False}
NAMES = ("left", "down", "right", "up")
TO_THE_GOAL = ("down", "down", "right", "right")


def saying(*answers: str) -> Callable[[int, str], str]:
    return lambda turn, prompt: answers[turn]


def seen(row: EvaluationRow, role: str = "user") -> list[str]:
    """What the environment said."""
    return [str(m.content) for m in row.messages if m.role == role][role == "user" :]


def record_of(row: EvaluationRow) -> RolloutRecord:
    return RolloutRecord.from_extra(row.execution_metadata.extra)


async def test_observations_actions_and_rewards_are_those_of_the_environment() -> None:
    moves = [1, 1, 2, 2]
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment("FrozenLake-v1", **LAKE),
        saying(*(f"I choose {move}." for move in moves)),
    )
    world = gymnasium.make("FrozenLake-v1", **LAKE)
    states = [world.reset()[0], *(world.step(move)[0] for move in moves)]
    assert seen(row) == [str(int(state)) for state in states[:-1]]
    record = record_of(row)
    assert record.rewards == [1.0]
    assert record.episodes is not None
    assert record.episodes[0].stop_reason == "done"
    assert record.episodes[0].step_rewards == [0.0, 0.0, 0.0, 1.0]
    assert record.episodes[0].metrics["terminated"] is True
    assert set(record.episodes[0].metrics["reset"]) == {"seed", "group_seed"}


async def test_calls_of_a_tool_are_actions() -> None:
    turns = [call("walk", action=move) for move in TO_THE_GOAL[:2]]
    both = "".join(call("walk", action=move) for move in (*TO_THE_GOAL[2:], "up"))
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment("FrozenLake-v1", tool="walk", actions=NAMES, **LAKE),
        saying("let us see", call("swim", action="up"), call("walk", action="north"), *turns, both),
        params={"max_tokens": 1000},
    )
    assert row.tools is not None
    action = row.tools[0]["function"]["parameters"]["properties"]["action"]
    assert action == {"type": "string", "enum": list(NAMES)}
    assert "Call walk to go on." in seen(row)
    told = seen(row, "tool")
    assert told[0] == "Error: there is no tool 'swim'; there is walk"
    assert told[1] == "That is no action: say one of left, down, right, up"
    assert told[2:] == ["3", "6"]
    record = record_of(row)
    assert record.episodes is not None
    assert record.episodes[0].step_rewards == [None, None, None, 0.0, 0.0, 1.0]
    assert record.rewards == [1.0]


@pytest.mark.parametrize("answer", ["", "nothing", "7", "-1", "1.5 or 9", "9" * 5000])
async def test_what_is_no_action_is_told_and_changes_nothing(answer: str) -> None:
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment("FrozenLake-v1", **LAKE),
        saying(answer, "1", "1", "2", "2"),
        params={"max_tokens": 6000},
    )
    assert seen(row)[1] == "That is no action: give a whole number from 0 to 3"
    assert record_of(row).rewards == [1.0]


async def test_a_limit_of_steps_truncates_an_episode() -> None:
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment("FrozenLake-v1", max_episode_steps=2, **LAKE), saying("0", "0")
    )
    record = record_of(row)
    assert record.episodes is not None
    metrics = record.episodes[0].metrics
    assert (metrics["terminated"], metrics["truncated"]) == (False, True)
    assert record.rewards == [0.0]


async def test_a_world_that_renders_text_is_shown_as_it_renders() -> None:
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment("FrozenLake-v1", render_mode="ansi", **LAKE), saying("1", "2")
    )
    assert "FHF" in seen(row)[0]


async def test_episodes_of_a_row_begin_alike_and_have_chance_of_their_own() -> None:
    """Blackjack: the same first hand in all, and other cards after it."""

    async def talks(seed: int) -> list[tuple[str, ...]]:
        row, _ = await roll_out(
            lambda: GymnasiumEnvironment("Blackjack-v1"),
            lambda turn, prompt: "1",
            n=8,
            params={"seed": seed},
        )
        record = record_of(row)
        assert record.episodes is not None
        return [tuple(str(m["content"]) for m in e.messages) for e in record.episodes]

    alike, different = set(), set()
    for seed in range(4):
        episodes = await talks(seed)
        assert episodes == await talks(seed)
        assert len({talk[1] for talk in episodes}) == 1
        alike.add(episodes[0][1])
        different.update(episodes)
    assert 1 < len(alike) < len(different)


async def test_spaces_of_numbers_take_json() -> None:
    class Aim(gymnasium.Env):  # type: ignore[misc, name-defined]
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        observation_space = gymnasium.spaces.Dict(
            {"at": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)}
        )

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return {"at": np.zeros(2, np.float32)}, {}

        def step(self, action: Any) -> Any:
            assert action.dtype == np.float32
            return {"at": action}, np.float64(action.sum()), bool(action[0] > 0), False, {}

    row, _ = await roll_out(
        lambda: GymnasiumEnvironment(Aim),
        saying("[0.5, 2]", "perhaps [1, or [-0.5, 0.25] then", "x [0.5, 0.25]"),
    )
    first, problem, second = seen(row)
    assert json.loads(first) == {"at": [0.0, 0.0]}
    assert "give JSON of a member of Box" in problem
    assert json.loads(second) == {"at": [-0.5, 0.25]}
    assert record_of(row).rewards == [0.5]


class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Shows the last action; ends after it."""

    observation_space = gymnasium.spaces.Discrete(9)

    def __init__(self, space: Any) -> None:
        self.action_space = space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return "begin", {}

    def step(self, action: Any) -> Any:
        return "end", float(np.sum(action)), True, False, {}


@pytest.mark.parametrize(
    ("names", "answer", "action"),
    [
        (("turn", "turn left", "stop"), "I will turn left", 1),
        (("turn", "turn left", "stop"), "Turn LEFT, no: turn.", 0),
        (("<", "^", ">"), "I go >", 2),
        (("<", "^", ">"), "> or rather ^.", 1),
        (("+", "++", "-"), "well-known: ++", 1),
    ],
)
async def test_an_answer_means_the_name_that_it_says(
    names: tuple[str, ...], answer: str, action: int
) -> None:
    space = gymnasium.spaces.Discrete(3)
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment(lambda: Echo(space), actions=names), saying(answer)
    )
    assert record_of(row).rewards == [float(action)]


@pytest.mark.parametrize(
    ("space", "answer", "problem"),
    [
        (gymnasium.spaces.Box(0, 9, (2,), np.int64), "[1.7, 2]", "give whole numbers"),
        (gymnasium.spaces.MultiDiscrete([3, 3]), "[1.0, 1e-9]", "give whole numbers"),
        (gymnasium.spaces.Discrete(3), "1.2", "give a whole number from 0 to 2"),
        (gymnasium.spaces.Box(0, 9, (2,), np.int64), "[" * 3000, "it is nested too deeply"),
    ],
)
async def test_no_answer_is_made_an_action_that_it_is_not(
    space: Any, answer: str, problem: str
) -> None:
    row, _ = await roll_out(
        lambda: GymnasiumEnvironment(lambda: Echo(space)),
        saying(answer, "1" if space.shape == () else "[1.0, 2]"),
        params={"max_tokens": 4000},
    )
    assert seen(row)[1] == f"That is no action: {problem}"
    assert record_of(row).rewards == [1.0 if space.shape == () else 3.0]


async def test_an_environment_that_raises_costs_its_episode() -> None:
    with pytest.raises(RolloutError, match="NoSuchLake"):
        await roll_out(lambda: GymnasiumEnvironment("NoSuchLake-v0"), saying("1"))
    with pytest.raises(RolloutError, match="3 actions are named"):
        await roll_out(
            lambda: GymnasiumEnvironment("FrozenLake-v1", actions=NAMES[1:], **LAKE), saying("1")
        )
