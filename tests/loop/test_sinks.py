"""Loggers are told every number of a run once, also where the run was stopped in between."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval_protocol_rft.loop import _metrics as sinks
from eval_protocol_rft.loop._metrics import open_sinks, require_sinks, scalars
from eval_protocol_rft.loop._run_options import SetupError
from tests.loop.runs import options, run


def step(number: int, reward: float = 0.5) -> dict[str, Any]:
    return {"kind": "step", "step": number, "reward_mean": reward, "dropped": {"failed": 2}}


def evaluation(number: int) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "greedy_score": 0.25, "pass_at_k": {"4": 0.75}}


class StopHereError(RuntimeError):
    pass


def stop_at(wanted: int) -> Any:
    def stop(line: dict[str, Any]) -> None:
        if line["kind"] == "step" and line["step"] == wanted:
            raise StopHereError

    return stop


class FakeRun:
    """As Weights & Biases keeps a run: rows by step, and no way back."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert not self.rows or step >= self.rows[-1][0], "steps only go on"
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def column(self, name: str) -> dict[int, float]:
        found = [(at, values[name]) for at, values in self.rows if name in values]
        assert len(found) == len(dict(found)), "a step was told twice"
        return dict(found)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    """Runs of a stand-in for the package, by id."""
    runs: dict[str, FakeRun] = {}
    module: Any = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", loader=None)

    def init(*, id: str, resume: str, **given: Any) -> FakeRun:  # noqa: A002
        assert (id in runs) == (resume == "allow")
        return runs.setdefault(id, FakeRun())

    module.init, module.Error = init, type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_line_becomes_its_numbers_and_nothing_is_made_up() -> None:
    assert scalars(step(3)) == {"train/reward_mean": 0.5, "train/dropped/failed": 2.0}
    assert scalars(evaluation(3)) == {"eval/greedy_score": 0.25, "eval/pass_at_k/4": 0.75}
    assert scalars({"kind": "step", "step": 1, "note": "x", "ok": True}) == {}


def test_an_unknown_logger_is_refused_by_name() -> None:
    with pytest.raises(SetupError, match="no logger 'mlflow': choose from tensorboard, wandb"):
        require_sinks(["mlflow"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
async def test_a_missing_package_is_named_before_the_run_has_a_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "PACKAGES", {name: (f"{name}_that_is_not_here",)})
    with pytest.raises(SetupError, match=f"pip install {name}_that_is_not_here"):
        await run(tmp_path / "run", options(), log_to=[name])
    assert not (tmp_path / "run").exists()


async def test_a_stopped_run_goes_on_in_the_same_wandb_run(
    tmp_path: Path, wandb: dict[str, FakeRun]
) -> None:
    chosen = options(steps=5, checkpoint_every=2)
    with pytest.raises(StopHereError):
        await run(tmp_path / "run", chosen, log_to=["wandb"], on_line=stop_at(3))
    [kept] = wandb.values()
    assert max(kept.column("train/reward_mean")) == 3  # a step that is done again
    result = await run(tmp_path / "run", chosen, log_to=["wandb"])
    assert list(wandb.values()) == [kept]
    assert kept.finished == 2
    assert kept.column("train/reward_mean") == {
        line["step"]: line["reward_mean"] for line in result.steps
    }
    assert kept.column("eval/greedy_score") == {
        line["step"]: line["greedy_score"] for line in result.evaluations
    }


def test_a_logger_that_comes_later_gets_what_went_before(
    tmp_path: Path, wandb: dict[str, FakeRun]
) -> None:
    [sink] = open_sinks(["wandb", "wandb"], tmp_path, settings={}, lines=[evaluation(0), step(1)])
    sink.write(step(2, reward=0.75))
    [kept] = wandb.values()
    assert kept.column("train/reward_mean") == {1: 0.5, 2: 0.75}
    assert kept.column("eval/greedy_score") == {0: 0.25}


def test_a_run_that_wandb_refuses_leaves_no_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: dict[str, FakeRun]
) -> None:
    module: Any = sys.modules["wandb"]

    def refuse(**given: Any) -> None:
        raise module.Error("no API key")

    monkeypatch.setattr(module, "init", refuse)
    with pytest.raises(SetupError, match="did not take the run: no API key"):
        open_sinks(["wandb"], tmp_path, settings={}, lines=[])
    assert list(tmp_path.iterdir()) == []


def tensorboard_values(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(name)]


async def test_tensorboard_shows_each_step_of_a_stopped_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    chosen = options(steps=5, checkpoint_every=2)
    with pytest.raises(StopHereError):
        await run(tmp_path / "run", chosen, log_to=["tensorboard"], on_line=stop_at(3))
    result = await run(tmp_path / "run", chosen, log_to=["tensorboard"])
    shown = tensorboard_values(result.folder, "train/reward_mean")
    assert [number for number, _ in shown] == [1, 2, 3, 4, 5]
    for (_, value), line in zip(shown, result.steps, strict=True):
        assert value == pytest.approx(line["reward_mean"], rel=1e-6)
    evaluated = tensorboard_values(result.folder, "eval/greedy_score")
    assert [number for number, _ in evaluated] == [line["step"] for line in result.evaluations]


def test_tensorboard_that_comes_later_gets_what_went_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    [sink] = open_sinks(["tensorboard"], tmp_path, settings={}, lines=[step(1), step(2, 0.75)])
    sink.close()
    assert tensorboard_values(tmp_path, "train/reward_mean") == [(1, 0.5), (2, 0.75)]
