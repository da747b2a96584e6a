"""An environment's life: what it is told at its beginning, how many live at once, how it ends."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import data, score_each_completion
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._episode_processor import EpisodeRolloutProcessor
from eval_protocol_rft.episodes._tool_loop import ToolLoop
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.scoring._scorer import ascore_rows
from tests.data.servers import write_jsonl
from tests.loop.runs import options
from tests.test_episodes import Scripted, a_row, add, roll_out, roll_out_from
from tests.waiting import PATIENCE, until


class OneTurn(Environment):
    def step(self, messages: Any, assistant: Message) -> Step:
        return Step(done=True)


class Told(OneTurn):
    """Keeps what it is told."""

    said: ClassVar[list[dict[str, int]]] = []

    def reset(self, row: EvaluationRow, *, index: int, seed: int, group_seed: int) -> None:
        self.said.append({"index": index, "seed": seed, "group_seed": group_seed})


def resets(row: EvaluationRow) -> list[dict[str, int]]:
    """What the record says that each episode was told."""
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    return [episode.metrics["reset"] for episode in record.episodes]


async def test_an_environment_is_told_which_episode_it_is_and_its_seeds() -> None:
    class Here(Told):
        said: ClassVar[list[dict[str, int]]] = []

    row, _ = await roll_out(Here, lambda turn, prompt: "a", n=3, params={"seed": 5})
    told = sorted(Here.said, key=lambda one: one["index"])
    assert resets(row) == told
    assert [one["index"] for one in told] == [0, 1, 2]
    assert len({one["seed"] for one in told}) == 3
    assert len({one["group_seed"] for one in told}) == 1
    assert all(0 <= one[name] < 2**31 for one in told for name in ("seed", "group_seed"))

    again, _ = await roll_out(Here, lambda turn, prompt: "a", n=3, params={"seed": 5})
    other, _ = await roll_out(Here, lambda turn, prompt: "a", n=3, params={"seed": 6})
    assert resets(again) == told
    assert resets(other) != told


@pytest.mark.parametrize("names", [(), ("seed",), ("group_seed", "index")])
async def test_an_environment_is_told_what_it_declares(names: tuple[str, ...]) -> None:
    source = f"def reset(self, row{''.join(f', {name}=None' for name in names)}): ..."
    methods: dict[str, Any] = {}
    exec(source, methods)  # noqa: S102 - a signature for each case
    row, _ = await roll_out(
        type("World", (OneTurn,), {"reset": methods["reset"]}), lambda turn, prompt: "a"
    )
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert record.episodes is not None
    assert set(record.episodes[0].metrics.get("reset", {})) == set(names)


async def test_an_environment_that_takes_any_keywords_is_told_all() -> None:
    class Open(OneTurn):
        async def reset(self, row: EvaluationRow, **facts: Any) -> None:
            assert set(facts) == {"index", "seed", "group_seed"}

    row, _ = await roll_out(Open, lambda turn, prompt: "a")
    assert set(resets(row)[0]) == {"index", "seed", "group_seed"}


def test_seeds_of_environments_are_those_of_the_job_however_often_it_is_asked(
    tmp_path: Path,
) -> None:
    rows = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{i}+11="} for i in (10, 20)])

    def generate(name: str, **params: Any) -> list[dict[str, int]]:
        params = {"model": "local/arithmetic", "n": 2, "max_tokens": 2, **params}
        data.generate(rows, tmp_path / name, params, episodes=Told, progress=False)
        episodes = [row.episode for row in RolloutDataset(tmp_path / name)]
        return [episode["metrics"]["reset"] for episode in episodes if episode is not None]

    first, again = generate("a.parquet", seed=3), generate("b.parquet", seed=3)
    assert first == again != generate("c.parquet", seed=4)
    drawn = generate("d.parquet")
    assert len({one["group_seed"] for one in first}) == len({r["group_seed"] for r in drawn}) == 2
    assert len({one["seed"] for one in first}) == 4


async def test_the_row_has_the_tools_of_the_prompt_whoever_looks_at_it() -> None:
    seen: list[Any] = []

    def names(row: EvaluationRow) -> list[str]:
        return [tool["function"]["name"] for tool in row.tools or ()]

    class Looking(ToolLoop):
        def __init__(self) -> None:
            super().__init__(add)

        def reset(self, row: EvaluationRow) -> None:
            seen.append(names(row))

    def evaluate(row: EvaluationRow) -> float:
        seen.append(names(row))
        return 1.0

    row, _ = await roll_out(Looking, lambda turn, prompt: "a", n=2)
    await ascore_rows([row], evaluate)
    assert seen == [["add"]] * 4


class Census:
    """Counts environments: `made`, alive `now`, and the `most` that ever were at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made = self.now = self.most = self.closed = 0

    def born(self) -> None:
        with self.lock:
            self.made, self.now = self.made + 1, self.now + 1
            self.most = max(self.most, self.now)

    def died(self) -> None:
        with self.lock:
            self.now, self.closed = self.now - 1, self.closed + 1


def counted(census: Census, turns: int = 2) -> type[Environment]:
    class Counted(Environment):
        def __init__(self) -> None:
            census.born()
            self.left = turns

        def step(self, messages: Any, assistant: Message) -> Step:
            self.left -= 1
            return Step(messages=[{"role": "user", "content": "1+1="}], done=not self.left)

        def close(self) -> None:
            census.died()

    return Counted


def evaluation_of(world: type[Environment], bound: int) -> Any:
    @evaluation_test(
        input_rows=[[a_row()]],
        completion_params=[{"model": "local/arithmetic", "n": 4, "max_tokens": 3}],
        rollout_processor=EpisodeRolloutProcessor(world, limits=EpisodeLimits(turns=2)),
        max_concurrent_rollouts=bound,
    )
    @score_each_completion
    def test_it(row: EvaluationRow) -> EvaluationRow:
        index = (row.execution_metadata.extra or {})["completion_index"]
        row.evaluation_result = EvaluateResult(score=index % 2)
        return row

    return test_it


@pytest.mark.parametrize("staleness", [0, 1])
async def test_training_and_evaluation_have_as_many_environments_as_the_test_allows(
    tmp_path: Path, staleness: int
) -> None:
    census = Census()
    asked = [{"role": "user", "content": "1+1="}]
    rows = write_jsonl(tmp_path / "data.jsonl", [{"messages": asked, "i": i} for i in range(12)])
    await atrain(
        evaluation_of(counted(census), 3),
        tmp_path / "run",
        data=[rows],
        held_out=4,
        options=options(steps=2, max_staleness=staleness, eval_every=1),
        progress=False,
    )
    assert census.most == 3
    assert (census.now, census.closed) == (0, census.made)
    assert census.made >= 2 * 16


def test_a_bulk_job_has_as_many_environments_as_it_was_told(tmp_path: Path) -> None:
    census = Census()
    rows = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{i}+11="} for i in range(10, 22)])
    data.generate(
        rows,
        tmp_path / "out.parquet",
        {"model": "local/arithmetic", "n": 4, "max_tokens": 3},
        episodes=counted(census),
        concurrency=3,
        progress=False,
    )
    assert (census.made, census.most, census.now, census.closed) == (48, 3, 0, 48)


class Stuck(Scripted):
    """Samples one turn, and then never again."""

    def __init__(self) -> None:
        super().__init__(lambda turn, prompt: "a")
        self.stuck = 0

    async def sample(self, prompt_ids: Any, params: Any, *, seed: int | None = None) -> Any:
        if self.exchanges:
            self.stuck += 1
            await asyncio.sleep(PATIENCE)
        return await super().sample(prompt_ids, params, seed=seed)


async def test_an_environment_is_closed_once_however_often_its_rollout_is_cancelled() -> None:
    entered, leave = threading.Event(), threading.Event()
    closed = 0

    class Slow(OneTurn):
        def step(self, messages: Any, assistant: Message) -> Step:
            return Step(messages=[{"role": "user", "content": "more"}])

        def close(self) -> None:
            nonlocal closed
            entered.set()
            assert leave.wait(PATIENCE)
            closed += 1

    sampler = Stuck()
    rollout = asyncio.ensure_future(roll_out_from(sampler, Slow))
    await until(lambda: sampler.stuck > 0)
    rollout.cancel()
    await until(entered.is_set)
    rollout.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not rollout.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert closed == 1


async def test_an_environment_that_comes_too_late_is_closed() -> None:
    leave, census = threading.Event(), Census()

    class Late(OneTurn):
        def __init__(self) -> None:
            assert leave.wait(PATIENCE)
            census.born()

        async def close(self) -> None:
            census.died()

    limits = EpisodeLimits(step_seconds=0.05)
    with pytest.raises(RuntimeError, match=r"Late\(\) took longer"):
        await roll_out(Late, lambda turn, prompt: "a", limits=limits)
    leave.set()
    await until(lambda: census.closed == 1)
    assert (census.made, census.now) == (1, 0)
