"""Real games of TextArena, played in messages."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from eval_protocol_rft.episodes._textarena import TextArenaEnvironment
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout._processor import RolloutError
from tests.test_episodes import roll_out

arena = pytest.importorskip("textarena", reason="needs TextArena")
pytestmark = pytest.mark.worlds


def halving(turn: int, prompt: str) -> str:
    """Guesses a number by halving; all that it knows is what it was told."""
    low, high = 1, 20
    for guess, hint in re.findall(r"\[(\d+)\].*?is (lower|higher)", prompt, re.DOTALL):
        low, high = (low, int(guess) - 1) if hint == "lower" else (int(guess) + 1, high)
    return f"[{(low + high) // 2}]"


def record_of(row: Any) -> RolloutRecord:
    return RolloutRecord.from_extra(row.execution_metadata.extra)


async def test_a_game_is_the_one_of_its_seed_whatever_others_draw_meanwhile() -> None:
    row, _ = await roll_out(
        lambda: TextArenaEnvironment("GuessTheNumber-v0"),
        halving,
        n=6,
        params={"seed": 2, "max_tokens": 50},
    )
    record = record_of(row)
    assert record.rewards == [1.0] * 6
    assert record.episodes is not None
    for episode in record.episodes:
        random.seed(episode.metrics["reset"]["group_seed"])
        number = random.randint(1, 20)
        said = [m["content"] for m in episode.messages]
        assert said[1].startswith("You are Player 0. You are playing Guess The Number.")
        assert said[-1] == f"[{number}]"
        for guess, hint in zip(said[2::2], said[3::2], strict=False):
            higher = "higher" if int(guess[1:-1]) < number else "lower"
            assert hint == f"The target number is {higher}."


async def test_others_move_by_the_opponent() -> None:
    seen: list[str] = []

    def last(observation: str) -> str:
        seen.append(observation)
        return re.findall(r"'(\[\d\])'", observation)[-1]

    def first(turn: int, prompt: str) -> str:
        return re.findall(r"'(\[\d\])'", prompt)[0]

    for player in (0, 1):
        row, _ = await roll_out(
            lambda player=player: TextArenaEnvironment(
                "TicTacToe-v0", players=2, player=player, opponent=last
            ),
            first,
            params={"max_tokens": 50},
        )
        record = record_of(row)
        assert record.episodes is not None
        assert record.episodes[0].stop_reason == "done"
        assert record.rewards is not None
        assert record.rewards[0] in (-1.0, 0.0, 1.0)
        moves = [str(m.content) for m in row.messages if m.role == "assistant"]
        assert len(moves) in (3, 4, 5)
        said = [str(m.content) for m in row.messages if m.role == "user"][1:]
        assert f"You are Player {player}" in said[0]
    assert seen


async def test_a_game_that_cannot_be_made_costs_its_episode() -> None:
    with pytest.raises(RolloutError, match="NoSuchGame"):
        await roll_out(lambda: TextArenaEnvironment("NoSuchGame-v0"), halving)
    with pytest.raises(RolloutError, match="2 players need an opponent"):
        await roll_out(lambda: TextArenaEnvironment("TicTacToe-v0", players=2), halving)
