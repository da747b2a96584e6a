"""Whole runs: they learn, they keep count, and they go on where they were stopped."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from eval_protocol_rft.loop._run_directory import RunFolder, RunFolderError
from eval_protocol_rft.loop._run_options import Optimizer
from eval_protocol_rft.loop._setup import LocalParts
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.loop._watch import NothingToTrainOnError
from eval_protocol_rft.sampling._types import RefusedError
from examples.arithmetic import test_arithmetic as example
from tests.loop.runs import options, run, sums_file, without_times
from tests.programs import Zygote
from tests.waiting import wait_until


class StopHereError(RuntimeError):
    pass


async def test_a_run_is_the_same_twice_and_wherever_it_is_stopped(tmp_path: Path) -> None:
    """Metrics to the last bit, with checkpoints every other step and refills by the filter."""
    chosen = options(steps=5, checkpoint_every=2, learning_rate=1e-3)
    whole = await run(tmp_path / "whole", chosen)
    again = await run(tmp_path / "again", chosen)
    assert without_times(again) == without_times(whole)
    assert sum(line["dropped"].get("zero_variance", 0) for line in whole.steps)
    for after in random.Random(2).sample(range(1, len(whole.lines) + 1), 3):
        lines = 0

        def stop(line: dict[str, object], after: int = after) -> None:
            nonlocal lines
            lines += 1
            if lines == after:
                raise StopHereError

        folder = tmp_path / f"stopped-{after}"
        with pytest.raises(StopHereError):
            await run(folder, chosen, on_line=stop)
        resumed = await run(folder, chosen)
        assert without_times(resumed) == without_times(whole), after


async def test_every_completion_of_every_admitted_row_is_counted(tmp_path: Path) -> None:
    result = await run(tmp_path / "run", options(steps=3))
    for line in result.steps:
        assert line["completions"] == 4 * line["groups"]
        assert line["datums"] == 4 * line["groups_trained"] == 16
        assert line["datums"] + sum(line["dropped"].values()) == line["completions"]
        assert line["staleness"] == {"0": 4}
        assert line["mismatch_k3"] < 1e-8
    assert [line["step"] for line in result.evaluations] == [0, 2, 3]
    assert (result.folder / "model" / "config.json").exists()
    AutoModelForCausalLM.from_pretrained(result.folder / "model")


async def test_sampling_ahead_stays_within_the_bound(tmp_path: Path) -> None:
    result = await run(tmp_path / "run", options(steps=8, max_staleness=2))
    assert len(result.steps) == 8
    seen = {int(behind) for line in result.steps for behind in line["staleness"]}
    assert max(seen) <= 2
    assert seen - {0}
    resumed = await run(tmp_path / "run", options(steps=8, max_staleness=2))
    assert resumed.lines == result.lines


async def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = await run(tmp_path / "run", options(steps=2))
    second = await run(tmp_path / "run", options(steps=2))
    assert second.lines == first.lines


async def test_other_settings_are_refused_and_overwriting_is_a_choice(tmp_path: Path) -> None:
    await run(tmp_path / "run", options(steps=1))
    with pytest.raises(RunFolderError, match=r"learning_rate: 0.0001, now 0.001"):
        await run(tmp_path / "run", options(steps=1, learning_rate=1e-3))
    anew = await run(tmp_path / "run", options(steps=1, learning_rate=1e-3), overwrite=True)
    assert len(anew.steps) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="no training run"):
        await run(tmp_path / "mine", options(steps=1), overwrite=True)
    (tmp_path / "mine" / "settings.json").write_text('{"editor.tabSize": 2}')
    with pytest.raises(RunFolderError, match="no training run"):
        await run(tmp_path / "mine", options(steps=1), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


async def test_what_is_wrong_is_said_before_an_old_run_is_given_up(tmp_path: Path) -> None:
    done = await run(tmp_path / "run", options(steps=1))
    with pytest.raises(RefusedError, match="no-such-model"):
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=1),
            model="local/no-such-model",
            overwrite=True,
            progress=False,
        )
    assert (await run(tmp_path / "run", options(steps=1))).lines == done.lines


async def test_a_run_is_not_continued_with_another_optimiser(tmp_path: Path) -> None:
    data = sums_file(tmp_path / "sums.jsonl")

    async def trained(weight_decay: float) -> None:
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=1),
            model="local/arithmetic",
            data=[data],
            held_out=0,
            progress=False,
            parts=LocalParts(optimizer=Optimizer(weight_decay=weight_decay)),
        )

    await trained(0.0)
    with pytest.raises(RunFolderError, match="weight_decay"):
        await trained(0.5)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_stopped_in_its_last_evaluation_a_run_loses_no_step(
    staleness: int, tmp_path: Path
) -> None:
    """The task is cancelled, as Ctrl-C does, while nothing but the last evaluation is left."""
    chosen = options(steps=3, eval_every=0, checkpoint_every=100, max_staleness=staleness)

    def interrupt(line: dict[str, object]) -> None:
        if line.get("step") == 3:
            task.cancel()

    task = asyncio.ensure_future(run(tmp_path / "run", chosen, on_line=interrupt))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert RunFolder(tmp_path / "run").latest() is not None
    resumed = await run(tmp_path / "run", chosen)
    assert [line["step"] for line in resumed.steps] == [1, 2, 3]
    assert [line["step"] for line in resumed.evaluations] == [0, 3]


async def test_epochs_end_with_the_rows_and_the_last_step_is_what_is_left(tmp_path: Path) -> None:
    data = sums_file(tmp_path / "ten.jsonl", [(a, 11) for a in range(10, 20)])
    result = await atrain(
        example.test_arithmetic,
        tmp_path / "run",
        options=options(steps=None, epochs=2.0),
        model="local/arithmetic",
        data=[data],
        held_out=0,
        progress=False,
    )
    seen = sum(line["groups"] for line in result.steps)
    left = sum(line.get("groups_dropped", 0) for line in result.lines)
    assert seen + left == 20
    assert not result.evaluations


async def test_hopeless_data_ends_with_a_reason(tmp_path: Path) -> None:
    data = tmp_path / "hopeless.jsonl"
    row = {"messages": [{"role": "user", "content": "10+10="}], "ground_truth": "never"}
    data.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(NothingToTrainOnError, match="same reward"):
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=2),
            model="local/arithmetic",
            data=[str(data)],
            held_out=0,
            progress=False,
        )


async def test_rows_that_cannot_be_asked_end_with_the_reason(tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    row = {"messages": [{"role": "user", "content": "1" * 4000}], "ground_truth": "2"}
    data.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(NothingToTrainOnError, match="gave no scored completion"):
        await atrain(
            example.test_arithmetic,
            tmp_path / "run",
            options=options(steps=2),
            model="local/arithmetic",
            data=[str(data)],
            held_out=0,
            progress=False,
        )


def test_killed_at_random_moments_the_command_ends_in_the_same_curve(
    tmp_path: Path, zygote: Zygote
) -> None:
    data = sums_file(tmp_path / "data.jsonl")

    def command(folder: Path) -> list[str]:
        options = "--steps 12 --groups-per-step 4 -n 4 --lr 0.0001 --checkpoint-every 2"
        return [
            "train", "examples/arithmetic/test_arithmetic.py::test_arithmetic", "--data", data,
            "-o", str(folder), *options.split(), "--held-out", "8", "--eval-every", "4", "--quiet",
        ]  # fmt: skip

    def finish(folder: Path) -> None:
        done = zygote.run(*command(folder))
        assert done.returncode == 0, done.stderr

    def lines(folder: Path) -> list[dict[str, object]]:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in found]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    rng = random.Random(4)
    kills = 0
    for _ in range(3):
        before = _count(killed)
        program = zygote.start(*command(killed))
        target = before + rng.randint(1, 5)
        wait_until(lambda: _count(killed) >= target or program.poll() is not None)  # noqa: B023
        kills += program.kill() == -signal.SIGKILL
    assert kills
    finish(killed)
    assert lines(killed) == lines(whole)


def _count(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
