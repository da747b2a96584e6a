"""An iterative run that dies anywhere ends where one that lives does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fireworks", reason="needs the extra `fireworks`")

from eval_protocol_rft.loop._run_directory import RunFolderError
from eval_protocol_rft.loop.fireworks import _iterate as running
from eval_protocol_rft.loop.fireworks._control_plane import ControlPlaneError, JobFailedError
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from eval_protocol_rft.training._types import TrainingDataError
from tests.emulator.account import BASE_MODEL
from tests.emulator.clients import DyingAfterPost, DyingTransport, Faltering, Killed
from tests.emulator.server import Emulator, arithmetic, emulated_control_plane
from tests.emulator.sums_run import right_sum, run_sums
from tests.emulator.weights import Serving
from tests.serving import ScriptedSampler

ROWS, N, STEPS = 2, 2, 2
SAMPLERS: list[ScriptedSampler] = []
HELD = threading.Event()
"""Completions that are asked for meanwhile never end."""


def scripted(weights: int, version: str) -> ScriptedSampler:
    """Answers a digit that is a matter of weights and seed."""
    tokenizer = arithmetic()[1]

    def script(prompt_ids: list[int], params: SamplingParams, seed: int | None) -> Completion:
        ids = tokenizer.encode(str((weights + (seed or 0)) % 10))
        return Completion(
            token_ids=[*ids, tokenizer.eos_token_id], logprobs=[-1.0, -1.0], finish_reason="stop"
        )

    SAMPLERS.append(ScriptedSampler(script))
    SAMPLERS[-1].held = lambda seed: HELD.is_set()
    return SAMPLERS[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[Emulator]:
    """Weights are numbers here, and training adds one."""
    serving = Serving(scripted, arithmetic()[1])
    with emulated_control_plane(
        serving=serving, base_weights=1, train=lambda weights, rows, job: weights + 1
    ) as emulator:
        yield emulator


@pytest.fixture
def emulator(server: Emulator) -> Emulator:
    server.account.reset()
    server.log.clear()
    return server


async def go(emulator: Emulator, folder: Path, **options: Any) -> Any:
    return await run_sums(emulator.url, folder, rows=ROWS, n=N, **{"steps": STEPS, **options})


def ending(emulator: Emulator, folder: Path) -> dict[str, Any]:
    """Everything that a run leaves."""
    account = emulator.account
    return {
        "state": json.loads((folder / "run.json").read_text()),
        "trained": json.loads(json.dumps(account.trained)),
        "jobs": sorted(account.jobs),
        "models": dict(account.weights),
        "data sets": dict(account.datasets),
        "served": emulator.serving.names,
        "adapters": [(d["model"], d["state"]) for d in account.deployed.values()],
    }


@pytest.fixture
def undisturbed(emulator: Emulator, tmp_path: Path) -> dict[str, Any]:
    """Where a run ends that nothing happens to, and after how many requests."""
    folder = tmp_path / "undisturbed"
    asyncio.run(go(emulator, folder))
    end = ending(emulator, folder)
    end["requests"] = len(emulator.log)
    emulator.account.reset()
    emulator.log.clear()
    return end


BEFORE_OR_AFTER = [pytest.param(False, id="before", marks=pytest.mark.slow)]
BEFORE_OR_AFTER += [pytest.param(True, id="after")]
"""Dying before a request is much like dying after the one before it."""


@pytest.mark.parametrize("answered", BEFORE_OR_AFTER)
def test_killed_at_any_request_a_run_ends_in_the_same_place(
    emulator: Emulator, undisturbed: dict[str, Any], tmp_path: Path, answered: bool
) -> None:
    requests = undisturbed.pop("requests")
    assert undisturbed["data sets"] == {}
    assert len(undisturbed["trained"]) == STEPS
    for at in range(1, requests + 1):
        folder = tmp_path / f"killed-{at}"
        emulator.account.reset()
        with pytest.raises(Killed):
            asyncio.run(go(emulator, folder, transport=DyingTransport(at, answered=answered)))
        asyncio.run(go(emulator, folder))
        assert ending(emulator, folder) == undisturbed, f"killed at request {at}"


@pytest.mark.parametrize("written", BEFORE_OR_AFTER)
def test_killed_at_any_transition_a_run_ends_in_the_same_place(
    emulator: Emulator,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: bool,
) -> None:
    undisturbed.pop("requests")
    write = running.write_state
    for at in range(1, 5 * STEPS + 2):  # the beginning, and five phases a step
        folder, left = tmp_path / f"killed-{at}", [at]

        def dying(where: Path, state: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0 and not written:
                raise Killed
            write(where, state)
            if left[0] == 0:
                raise Killed

        emulator.account.reset()
        with monkeypatch.context() as patch:
            patch.setattr(running, "write_state", dying)
            with pytest.raises(Killed):
                asyncio.run(go(emulator, folder))
        asyncio.run(go(emulator, folder))
        assert ending(emulator, folder) == undisturbed, f"killed at transition {at}"


@pytest.mark.parametrize("path", ["datasets", "rlorTrainerJobs", "deployments"])
async def test_what_was_made_and_is_not_found_yet_is_not_made_twice(
    emulator: Emulator, undisturbed: dict[str, Any], tmp_path: Path, path: str
) -> None:
    undisturbed.pop("requests")
    with pytest.raises(Killed):
        await go(emulator, tmp_path, transport=DyingAfterPost(path))
    key = "dep" if path == "deployments" else "sums-step0"
    emulator.account.unseen.add(key)
    emulator.log.clear()
    await go(emulator, tmp_path)
    base = f"/v1/accounts/acc/{path}"
    assert emulator.log[:3] == [("GET", f"{base}/{key}"), ("POST", base), ("GET", f"{base}/{key}")]
    assert ending(emulator, tmp_path) == undisturbed


async def test_interrupted_while_it_samples_a_run_ends_in_the_same_place(
    emulator: Emulator, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed.pop("requests")
    await go(emulator, tmp_path, steps=1)
    HELD.set()
    task = asyncio.create_task(go(emulator, tmp_path))
    # The sampler of the first step's model is made when that is served, and holds what it is asked.
    made = len(SAMPLERS)
    await asyncio.to_thread(lambda: _next_sampler(made).waiting.acquire(timeout=HANGS))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    HELD.clear()
    await go(emulator, tmp_path)
    assert ending(emulator, tmp_path) == undisturbed


HANGS = 300.0
"""Seconds after which what a test waits for never comes."""


def _next_sampler(made: int) -> ScriptedSampler:
    deadline = time.monotonic() + HANGS
    while len(SAMPLERS) == made and time.monotonic() < deadline:
        time.sleep(0.01)
    return SAMPLERS[made]


# Jobs that fail


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "EXPIRED", "EARLY_STOPPED"])
async def test_a_job_that_ends_badly_is_named_with_its_reason(
    emulator: Emulator, tmp_path: Path, state: str
) -> None:
    emulator.account.failing[1] = state
    message = rf"rlorTrainerJobs/sums-step1 is JOB_STATE_{state}: out of memory on node 3"
    with pytest.raises(JobFailedError, match=message) as caught:
        await go(emulator, tmp_path)
    assert caught.value.job == "accounts/acc/rlorTrainerJobs/sums-step1"
    assert emulator.account.datasets == {}
    emulator.log.clear()
    with pytest.raises(JobFailedError, match=r"out of memory.*step1\.jsonl.*retry_failed=True"):
        await go(emulator, tmp_path)
    assert emulator.log == []


async def test_a_failed_step_is_trained_again_on_the_same_data_when_asked_to(
    emulator: Emulator, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    emulator.account.failing[1] = "FAILED"
    with pytest.raises(JobFailedError):
        await go(emulator, tmp_path)
    reports = await go(emulator, tmp_path, retry_failed=True)
    assert reports[-1].output_model == "accounts/acc/models/sums-step1-try1"
    assert ending(emulator, tmp_path)["trained"] == undisturbed["trained"]
    assert emulator.account.datasets == {}


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_killed_around_a_failure_it_still_fails_and_leaves_no_data(
    emulator: Emulator, tmp_path: Path, answered: bool
) -> None:
    emulator.account.failing[0] = "FAILED"
    with pytest.raises(JobFailedError):
        asyncio.run(go(emulator, tmp_path / "undisturbed"))
    requests = len(emulator.log)
    for at in range(1, requests + 1):
        emulator.account.reset()
        emulator.account.failing[0] = "FAILED"
        folder = tmp_path / f"killed-{at}"
        with pytest.raises(Killed):
            asyncio.run(go(emulator, folder, transport=DyingTransport(at, answered=answered)))
        with pytest.raises(JobFailedError, match="out of memory"):
            asyncio.run(go(emulator, folder))
        assert (emulator.account.datasets, len(emulator.account.jobs)) == ({}, 1), f"at {at}"


async def test_a_paused_job_is_waited_for_again_once_it_was_resumed(
    emulator: Emulator, tmp_path: Path
) -> None:
    emulator.account.failing[0] = "PAUSED"
    with pytest.raises(ControlPlaneError, match=r"is JOB_STATE_PAUSED: .*Resume it"):
        await go(emulator, tmp_path)
    emulator.account.failing.clear()
    emulator.account.jobs["sums-step0"]["state"] = "RUNNING"
    assert len(await go(emulator, tmp_path)) == STEPS
    assert len(emulator.account.trained) == STEPS


async def test_a_job_that_takes_too_long_is_waited_for_again_later(
    emulator: Emulator, tmp_path: Path
) -> None:
    with pytest.raises(ControlPlaneError, match=r"is still .* after 0 s; start again"):
        await go(emulator, tmp_path, timeout_seconds=0.0)
    assert len(await go(emulator, tmp_path)) == STEPS


# What is refused


async def test_a_folder_belongs_to_one_run_with_its_settings(
    emulator: Emulator, tmp_path: Path
) -> None:
    await go(emulator, tmp_path, steps=1)
    with pytest.raises(RunFolderError, match="run='sums', and this is run='other'"):
        await go(emulator, tmp_path, run="other")
    with pytest.raises(RunFolderError, match="deployment='dep'"):
        await go(emulator, tmp_path, deployment="another")


async def test_a_folder_is_worked_on_by_one_process(emulator: Emulator, tmp_path: Path) -> None:
    outcomes = await asyncio.gather(
        go(emulator, tmp_path), go(emulator, tmp_path), return_exceptions=True
    )
    refused = [o for o in outcomes if isinstance(o, RunFolderError)]
    assert len(refused) == 1
    assert len(emulator.account.trained) == STEPS


async def test_somebody_elses_job_of_the_same_name_is_not_taken_for_ours(
    emulator: Emulator, tmp_path: Path
) -> None:
    await go(emulator, tmp_path, steps=1)
    emulator.account.jobs["sums-step1"] = {
        "name": "accounts/acc/rlorTrainerJobs/sums-step1",
        "dataset": "accounts/acc/datasets/theirs",
        "state": "RUNNING",
        "looks": 0,
        "trainingConfig": {"baseModel": BASE_MODEL, "outputModel": "accounts/acc/models/theirs"},
        "rows": [],
    }
    with pytest.raises(ControlPlaneError, match="take another run name"):
        await go(emulator, tmp_path)


async def test_a_new_run_does_not_take_what_an_older_one_of_its_name_left(
    emulator: Emulator, tmp_path: Path
) -> None:
    await go(emulator, tmp_path / "old", steps=1)
    with pytest.raises(ControlPlaneError, match=r"a job .*sums-step0 already.*another name"):
        await go(emulator, tmp_path / "new", steps=1)
    with pytest.raises(Killed):
        await go(emulator, tmp_path / "r", run="r", transport=DyingAfterPost("datasets"))
    with pytest.raises(ControlPlaneError, match=r"a data set .*r-step0 already"):
        await go(emulator, tmp_path / "again", run="r")
    assert len(emulator.account.trained) == 1


async def test_a_service_that_does_not_answer_for_a_while_is_waited_for(
    emulator: Emulator, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed.pop("requests")
    await go(emulator, tmp_path, transport=Faltering(r"GET .*/rlorTrainerJobs/", after=2))
    assert ending(emulator, tmp_path) == undisturbed


async def test_a_refused_request_is_named_with_its_step(emulator: Emulator, tmp_path: Path) -> None:
    with pytest.raises(ControlPlaneError, match=r"step 0, train: .*overloaded.*Start again"):
        await go(emulator, tmp_path, transport=Faltering(r"POST .*/rlorTrainerJobs", after=0))
    assert len(await go(emulator, tmp_path)) == STEPS


async def test_a_deployment_of_another_model_is_not_sampled_from(
    emulator: Emulator, tmp_path: Path
) -> None:
    await go(emulator, tmp_path / "ours", steps=1)
    emulator.account.deployments["dep"]["baseModel"] = "accounts/fireworks/models/other"
    with pytest.raises(ControlPlaneError, match="serves accounts/fireworks/models/other"):
        await go(emulator, tmp_path / "theirs", run="theirs")


async def test_a_completion_without_a_score_ends_the_run_or_is_counted(
    emulator: Emulator, tmp_path: Path
) -> None:
    def picky(row: Any) -> Any:
        if row.messages[0].content == "10+13=":
            raise ValueError("cannot judge this one")
        return right_sum(row)

    with pytest.raises(TrainingDataError, match="has no score"):
        await go(emulator, tmp_path, evaluator=picky, steps=1)
    assert emulator.account.jobs == {}
    (report,) = await go(emulator, tmp_path, evaluator=picky, steps=1, failures="drop")
    assert (report.completions, report.dropped) == ((ROWS - 1) * N, {"unscored": N})
