"""Episodes are scored while their environments live, and nobody scores what is left of them."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, MetricResult
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import score_each_completion
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.scoring._evaluator import EvaluatorError
from eval_protocol_rft.scoring._scorer import ascore_rows
from eval_protocol_rft.training._batch import build_batch
from tests.data.servers import succeed, write_jsonl
from tests.loop.runs import options
from tests.test_episodes import a_row, roll_out

DESK = Path()
"""Where the desks of a test are; set by its fixture."""


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(globals(), "DESK", tmp_path / "desk")
    return DESK


class Desk(Environment):
    """Writes what the model says to a folder of its own, which is gone when the episode is over."""

    def reset(self, row: EvaluationRow, *, index: int) -> None:
        self.folder = DESK / str(index)
        self.folder.mkdir(parents=True)

    def step(self, messages: Any, assistant: Message) -> Step:
        (self.folder / "said").write_text(str(assistant.content))
        return Step(done=True, metrics={"folder": str(self.folder)})

    def close(self) -> None:
        shutil.rmtree(self.folder)


def letters(row: EvaluationRow) -> EvaluationRow:
    """How much stands on the desk."""
    folder = (row.execution_metadata.extra or {})["episode"]["metrics"]["folder"]
    said = (Path(folder) / "said").read_text()
    detail = MetricResult(score=0.5, reason="half")
    row.evaluation_result = EvaluateResult(
        score=float(len(said)), reason=said, metrics={"detail": detail}
    )
    return row


def growing() -> Callable[[int, str], str]:
    """Says one letter more each time."""
    said = 0

    def script(turn: int, prompt: str) -> str:
        nonlocal said
        said += 1
        return "a" * said

    return script


async def on_the_desk() -> EvaluationRow:
    row, _ = await roll_out(Desk, growing(), n=3, score=letters)
    return row


async def test_the_users_evaluator_sees_each_episodes_own_world() -> None:
    row = await on_the_desk()
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    lengths = [float(len(e.messages[-1]["content"])) for e in record.episodes]
    assert sorted(lengths) == [1.0, 2.0, 3.0]
    assert record.rewards == lengths
    assert record.completion_results is not None
    assert [score.reason for score in record.completion_results] == [
        "a" * int(length) for length in lengths
    ]
    assert not os.listdir(DESK)
    assert len(build_batch([row]).datums) == 3


async def test_the_evaluator_that_scored_them_is_not_called_again() -> None:
    row = await on_the_desk()
    before = dict(row.execution_metadata.extra or {})
    for evaluator in (letters, score_each_completion(letters)):
        (scored,) = await ascore_rows([row], evaluator)
        extra = scored.execution_metadata.extra or {}
        assert extra["rewards"] == before["rewards"]
        assert extra["completion_results"] == [
            {**one, "metrics": one["metrics"] or {}} for one in before["completion_results"]
        ]
        assert extra["completion_results"][0]["metrics"]["detail"]["score"] == 0.5


async def test_another_evaluator_sees_the_score_and_may_keep_it() -> None:
    row = await on_the_desk()
    rewards = (row.execution_metadata.extra or {})["rewards"]

    def keeps(row: EvaluationRow) -> EvaluationRow:
        return row

    def halves(row: EvaluationRow) -> float:
        assert row.evaluation_result is not None
        alive = (row.execution_metadata.extra or {})["episode"]["metrics"]["scored_alive"]
        assert alive["by"] == "test_scoring_alive.py::letters"
        assert alive["score"] == row.evaluation_result.score
        return row.evaluation_result.score / 2

    (scored,) = await ascore_rows([row], halves)
    assert (scored.execution_metadata.extra or {})["rewards"] == [r / 2 for r in rewards]
    (scored,) = await ascore_rows([scored], keeps)
    assert (scored.execution_metadata.extra or {})["rewards"] == rewards


async def test_no_two_evaluators_are_taken_for_one() -> None:
    row, _ = await roll_out(Desk, growing(), n=2, score=lambda row: 1.0)
    (scored,) = await ascore_rows([row], lambda row: 2.0)
    assert (scored.execution_metadata.extra or {})["rewards"] == [2.0, 2.0]


class Scores(Environment):
    """Scores itself in the way that `how` says."""

    how: Callable[[EvaluationRow], Any] = staticmethod(lambda row: 0.5)

    def step(self, messages: Any, assistant: Message) -> Step:
        return Step(done=True, reward=0.25)

    def score(self, row: EvaluationRow) -> Any:
        return type(self).how(row)


async def later(row: EvaluationRow) -> EvaluateResult:
    await asyncio.sleep(0)
    return EvaluateResult(score=0.75, reason="in time")


def refuses(row: EvaluationRow) -> float:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("how", "reward", "said"),
    [
        (lambda row: 0.5, 0.5, None),
        (lambda row: sum(row.execution_metadata.extra["episode"]["step_rewards"]), 0.25, None),
        (later, 0.75, None),
        (refuses, None, "Scores.score() raised ValueError: not today"),
        (lambda row: "much", None, "returned str"),
        (lambda row: float("nan"), None, "nan, not a finite number"),
    ],
)
async def test_an_environment_scores_its_episode(how: Any, reward: Any, said: str | None) -> None:
    world = type("Scores", (Scores,), {"how": staticmethod(how)})
    row, _ = await roll_out(world, lambda turn, prompt: "a")
    extra = row.execution_metadata.extra or {}
    assert extra["rewards"] == [reward]
    assert (said or "") in (extra["completion_results"][0]["error"] or "")


async def test_an_environment_that_scores_nothing_leaves_it_to_the_evaluator() -> None:
    silent = type("Silent", (Scores,), {"how": staticmethod(lambda row: None)})
    row, _ = await roll_out(silent, lambda turn, prompt: "a")
    assert "rewards" not in (row.execution_metadata.extra or {})
    (scored,) = await ascore_rows([row], lambda row: float(row.evaluation_result is None))
    assert (scored.execution_metadata.extra or {})["rewards"] == [1.0]


async def test_a_score_of_another_kind_is_the_environments_own() -> None:
    class Game(Scores):
        def score(self) -> int:  # type: ignore[override]
            raise AssertionError

    row, _ = await roll_out(Game, lambda turn, prompt: "a")
    assert "rewards" not in (row.execution_metadata.extra or {})


async def test_a_score_that_hangs_costs_itself_and_not_the_episode() -> None:
    leave = threading.Event()
    hangs = type("Hangs", (Scores,), {"how": staticmethod(lambda row: leave.wait())})
    row, _ = await roll_out(
        hangs, lambda turn, prompt: "a", limits=EpisodeLimits(step_seconds=0.05)
    )
    leave.set()
    extra = row.execution_metadata.extra or {}
    assert extra["rewards"] == [None]
    assert "took longer than 0.05 s" in extra["completion_results"][0]["error"]


def test_an_evaluator_of_groups_cannot_score_one_episode() -> None:
    def groups(rows: list[EvaluationRow]) -> list[EvaluationRow]:
        return rows

    with pytest.raises(EvaluatorError, match="takes `rows`"):
        EpisodeRolloutProcessor(Desk, score=groups)


async def test_training_learns_from_scores_of_living_environments(tmp_path: Path) -> None:
    calls = 0

    def odd(row: EvaluationRow) -> EvaluationRow:
        nonlocal calls
        calls += 1
        letters(row)
        assert row.evaluation_result is not None
        index = (row.execution_metadata.extra or {})["completion_index"]
        row.evaluation_result.score = index % 2
        return row

    @evaluation_test(
        input_rows=[[a_row()]],
        completion_params=[{"model": "local/arithmetic", "n": 4, "max_tokens": 32}],
        rollout_processor=EpisodeRolloutProcessor(Alone, score=odd),
    )
    @score_each_completion
    def test_it(row: EvaluationRow) -> EvaluationRow:
        return row

    asked = [{"role": "user", "content": "1+1="}]
    rows = write_jsonl(tmp_path / "data.jsonl", [{"messages": asked, "i": i} for i in range(8)])
    result = await atrain(
        test_it,
        tmp_path / "run",
        data=[rows],
        held_out=0,
        options=options(steps=1, groups_per_step=2, eval_every=0),
        progress=False,
    )
    (step,) = result.steps
    assert step["reward_mean"] == 0.5
    assert calls == step["completions"]


class Alone(Desk):
    """A desk whose place nobody else has."""

    def reset(self, row: EvaluationRow, *, seed: int) -> None:  # type: ignore[override]
        super().reset(row, index=seed)


WORLD = """
import shutil, tempfile
from pathlib import Path
from eval_protocol_rft import EpisodeRolloutProcessor
from eval_protocol_rft.episodes import Environment, Step

class Desk(Environment):
    def reset(self, row):
        self.folder = Path(tempfile.mkdtemp())

    def step(self, messages, assistant):
        (self.folder / "said").write_text(assistant.content)
        return Step(done=True, metrics={"folder": str(self.folder)})

    def close(self):
        shutil.rmtree(self.folder)

def letters(row):
    folder = row.execution_metadata.extra["episode"]["metrics"]["folder"]
    return float(len((Path(folder) / "said").read_text()))

def doubles(row):
    return 2 * row.evaluation_result.score

desks = EpisodeRolloutProcessor(Desk, score=letters)
"""


def test_a_bulk_job_keeps_scores_and_scores_nothing_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "alive_world.py").write_text(WORLD)
    rows = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{i}+11="} for i in (10, 20)])
    output = tmp_path / "out.parquet"
    world = f"{tmp_path / 'alive_world.py'}::"
    succeed(
        "generate", rows, "-o", output, "-n", 2, "--model", "local/arithmetic",
        "--max-tokens", 32, "--episodes", f"{world}desks",
    )  # fmt: skip

    def scores() -> list[float | None]:
        return [row.scores["reward"].reward for row in RolloutDataset(output)]

    lengths = [float(len(row.episode["messages"][-1]["content"])) for row in RolloutDataset(output)]  # type: ignore[index]
    assert scores() == lengths
    succeed("score", output, "-e", f"{world}doubles", "--workers", 1)
    assert scores() == [2 * length for length in lengths]
    succeed("score", output, "-e", f"{world}letters", "--workers", 1, "--overwrite")
    assert scores() == lengths
