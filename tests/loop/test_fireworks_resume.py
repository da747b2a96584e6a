"""An iterative run that dies anywhere ends where one that lives does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fireworks", reason="needs the extra `fireworks`")

from eval_protocol_rft.loop._run_directory import RunFolderError
from eval_protocol_rft.loop.fireworks import _iterate as running
from eval_protocol_rft.loop.fireworks._answers import ControlPlaneError
from eval_protocol_rft.loop.fireworks._control_plane import JobFailedError
from eval_protocol_rft.loop.service.control._steps import StepRunner, Trained
from eval_protocol_rft.training._types import TrainingDataError
from tests.faulty_service import FaultyService, faulty_service
from tests.fireworks_clients import DyingAfterPost, DyingTransport, Faltering, Killed, client
from tests.service import BASE
from tests.sums_run import right_sum, run_sums
from tests.waiting import PATIENCE

ROWS, N, STEPS = 2, 2, 2
REQUESTS = 20
"""At least, of a whole run."""


class Training:
    """In the place of training: what a run does around it is what is tested here."""

    def __init__(self) -> None:
        self.trained: list[list[dict[str, Any]]] = []
        """The rows of every training that took place."""
        self.failing: dict[int, str] = {}
        """How many-th job -> the state in which it ends, with no model."""

    def as_method(self) -> Any:
        """To stand in a class."""

        async def train(runner: StepRunner, row: dict[str, Any]) -> Trained:
            return await self._train(runner, row)

        return train

    async def _train(self, runner: StepRunner, row: dict[str, Any]) -> Trained:
        place = runner._store.names("rlorTrainerJobs").index(row["name"])
        match self.failing.get(place):
            case None:
                self.trained.append(runner._datasets.lines(row["dataset"]))
                return Trained(row["_weights"], [0.0], {})
            case "FAILED":
                raise RuntimeError("out of memory on node 3")
            case state:
                status = {"code": "INTERNAL", "message": "out of memory on node 3"}
                runner._change(row["name"], state=f"JOB_STATE_{state}", status=status)
                return Trained("none", [], {})


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, training: Training) -> Iterator[FaultyService]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "train", training.as_method())
        with faulty_service(tmp_path_factory.mktemp("state")) as running_server:
            yield running_server


@pytest.fixture
def account(server: FaultyService, training: Training) -> FaultyService:
    """In which nothing was made yet."""
    server.forget()
    training.trained.clear()
    training.failing.clear()
    return server


async def go(account: FaultyService, folder: Path, **options: Any) -> Any:
    return await run_sums(account.url, folder, rows=ROWS, n=N, **{"steps": STEPS, **options})


def ending(account: FaultyService, training: Training, folder: Path) -> dict[str, Any]:
    """Everything that a run leaves."""
    return {
        "state": json.loads((folder / "run.json").read_text()),
        "trained": list(training.trained),
        "jobs": [(job["name"], job["state"]) for job in account.rows("rlorTrainerJobs")],
        "models": account.ids("models"),
        "data sets": account.rows("datasets"),
        "deployments": account.ids("deployments"),
        "adapters": [(d["model"], d["state"]) for d in account.rows("deployedModels")],
    }


@pytest.fixture
def undisturbed(account: FaultyService, training: Training, tmp_path: Path) -> dict[str, Any]:
    """Where a run ends that nothing happens to."""
    folder = tmp_path / "undisturbed"
    asyncio.run(go(account, folder))
    end = ending(account, training, folder)
    forget(account, training)
    return end


def forget(account: FaultyService, training: Training) -> None:
    account.forget()
    training.trained.clear()


BEFORE_OR_AFTER = [pytest.param(False, id="before", marks=pytest.mark.slow)]
BEFORE_OR_AFTER += [pytest.param(True, id="after")]
"""Dying before a request is much like dying after the one before it."""


def dies_at(account: FaultyService, folder: Path, at: int, *, answered: bool) -> bool:
    """Whether the run died at its `at`-th request. How many it makes is a matter of how often it
    looks at what is not there yet."""
    try:
        asyncio.run(go(account, folder, transport=DyingTransport(at, answered=answered)))
    except Killed:
        return True
    return False


@pytest.mark.parametrize(
    ("answered", "every"),
    [
        pytest.param(True, 4, id="after some"),
        pytest.param(True, 1, id="after any", marks=pytest.mark.slow),
        pytest.param(False, 1, id="before any", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_request_a_run_ends_in_the_same_place(
    account: FaultyService,
    training: Training,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    answered: bool,
    every: int,
) -> None:
    assert undisturbed["data sets"] == []
    assert len(undisturbed["trained"]) == STEPS
    at = 1
    while dies_at(account, tmp_path / f"killed-{at}", at, answered=answered):
        asyncio.run(go(account, tmp_path / f"killed-{at}"))
        assert ending(account, training, tmp_path / f"killed-{at}") == undisturbed, f"at {at}"
        forget(account, training)
        at += every
    assert at > REQUESTS


@pytest.mark.parametrize("written", BEFORE_OR_AFTER)
def test_killed_at_any_transition_a_run_ends_in_the_same_place(
    account: FaultyService,
    training: Training,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: bool,
) -> None:
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

        forget(account, training)
        with monkeypatch.context() as patch:
            patch.setattr(running, "write_state", dying)
            with pytest.raises(Killed):
                asyncio.run(go(account, folder))
        asyncio.run(go(account, folder))
        assert ending(account, training, folder) == undisturbed, f"killed at transition {at}"


@pytest.mark.parametrize("path", ["datasets", "rlorTrainerJobs", "deployments"])
async def test_what_was_made_and_is_not_found_yet_is_not_made_twice(
    account: FaultyService,
    training: Training,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    path: str,
) -> None:
    with pytest.raises(Killed):
        await go(account, tmp_path, transport=DyingAfterPost(path))
    key = "dep" if path == "deployments" else "sums-step0"
    account.faults.unseen.add(f"/v1/accounts/acc/{path}/{key}")
    account.faults.log.clear()
    await go(account, tmp_path)
    base = f"/v1/accounts/acc/{path}"
    assert account.faults.log[:3] == [
        ("GET", f"{base}/{key}"),
        ("POST", base),
        ("GET", f"{base}/{key}"),
    ]
    assert ending(account, training, tmp_path) == undisturbed


async def test_interrupted_while_it_samples_a_run_ends_in_the_same_place(
    account: FaultyService, training: Training, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    await go(account, tmp_path, steps=1)
    account.faults.held.set()
    task = asyncio.create_task(go(account, tmp_path))
    assert await asyncio.to_thread(account.faults.waiting.acquire, timeout=PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    account.faults.held.clear()
    await go(account, tmp_path)
    assert ending(account, training, tmp_path) == undisturbed


# Jobs that fail


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "EXPIRED", "EARLY_STOPPED"])
async def test_a_job_that_ends_badly_is_named_with_its_reason(
    account: FaultyService, training: Training, tmp_path: Path, state: str
) -> None:
    training.failing[1] = state
    message = rf"rlorTrainerJobs/sums-step1 is JOB_STATE_{state}: out of memory on node 3"
    with pytest.raises(JobFailedError, match=message) as caught:
        await go(account, tmp_path)
    assert caught.value.job == "accounts/acc/rlorTrainerJobs/sums-step1"
    assert account.rows("datasets") == []
    account.faults.log.clear()
    with pytest.raises(JobFailedError, match=r"out of memory.*step1\.jsonl.*retry_failed=True"):
        await go(account, tmp_path)
    assert account.faults.log == []


async def test_a_failed_step_is_trained_again_on_the_same_data_when_asked_to(
    account: FaultyService, training: Training, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    training.failing[1] = "FAILED"
    with pytest.raises(JobFailedError):
        await go(account, tmp_path)
    reports = await go(account, tmp_path, retry_failed=True)
    assert reports[-1].output_model == "accounts/acc/models/sums-step1-try1"
    assert ending(account, training, tmp_path)["trained"] == undisturbed["trained"]
    assert account.rows("datasets") == []


@pytest.mark.parametrize("answered", BEFORE_OR_AFTER)
def test_killed_around_a_failure_it_still_fails_and_leaves_no_data(
    account: FaultyService, training: Training, tmp_path: Path, answered: bool
) -> None:
    training.failing[0] = "FAILED"
    with pytest.raises(JobFailedError):
        asyncio.run(go(account, tmp_path / "undisturbed"))
    forget(account, training)
    at = 1
    while True:
        folder = tmp_path / f"killed-{at}"
        try:
            died = dies_at(account, folder, at, answered=answered)
        except JobFailedError:
            break
        assert died
        with pytest.raises(JobFailedError, match="out of memory"):
            asyncio.run(go(account, folder))
        left = (account.ids("datasets"), account.ids("rlorTrainerJobs"))
        assert left == ([], ["sums-step0"]), f"at {at}"
        forget(account, training)
        at += 1
    assert at > REQUESTS / 4


async def test_a_paused_job_is_waited_for_again_once_it_was_resumed(
    account: FaultyService, training: Training, tmp_path: Path
) -> None:
    training.failing[0] = "PAUSED"
    with pytest.raises(ControlPlaneError, match=r"is JOB_STATE_PAUSED: .*Resume it"):
        await go(account, tmp_path)
    training.failing.clear()
    async with client(account.url) as fireworks:
        await fireworks.reinforcement_fine_tuning_steps.resume("sums-step0", body={})
    assert len(await go(account, tmp_path)) == STEPS
    assert len(training.trained) == STEPS


async def test_a_job_that_takes_too_long_is_waited_for_again_later(
    account: FaultyService, tmp_path: Path
) -> None:
    with pytest.raises(ControlPlaneError, match=r"is still .* after 0 s; start again"):
        await go(account, tmp_path, timeout_seconds=0.0)
    assert len(await go(account, tmp_path)) == STEPS


# What is refused


async def test_a_folder_belongs_to_one_run_with_its_settings(
    account: FaultyService, tmp_path: Path
) -> None:
    await go(account, tmp_path, steps=1)
    with pytest.raises(RunFolderError, match="run='sums', and this is run='other'"):
        await go(account, tmp_path, run="other")
    with pytest.raises(RunFolderError, match="deployment='dep'"):
        await go(account, tmp_path, deployment="another")


async def test_a_folder_is_worked_on_by_one_process(
    account: FaultyService, training: Training, tmp_path: Path
) -> None:
    outcomes = await asyncio.gather(
        go(account, tmp_path), go(account, tmp_path), return_exceptions=True
    )
    refused = [o for o in outcomes if isinstance(o, RunFolderError)]
    assert len(refused) == 1
    assert len(training.trained) == STEPS


async def test_somebody_elses_job_of_the_same_name_is_not_taken_for_ours(
    account: FaultyService, tmp_path: Path
) -> None:
    await go(account, tmp_path, steps=1)
    account.change(
        "rlorTrainerJobs",
        "sums-step1",
        dataset="accounts/acc/datasets/theirs",
        state="JOB_STATE_RUNNING",
        trainingConfig={"baseModel": BASE, "outputModel": "accounts/acc/models/theirs"},
    )
    with pytest.raises(ControlPlaneError, match="take another run name"):
        await go(account, tmp_path)


async def test_a_new_run_does_not_take_what_an_older_one_of_its_name_left(
    account: FaultyService, training: Training, tmp_path: Path
) -> None:
    await go(account, tmp_path / "old", steps=1)
    with pytest.raises(ControlPlaneError, match=r"a job .*sums-step0 already.*another name"):
        await go(account, tmp_path / "new", steps=1)
    with pytest.raises(Killed):
        await go(account, tmp_path / "r", run="r", transport=DyingAfterPost("datasets"))
    with pytest.raises(ControlPlaneError, match=r"a data set .*r-step0 already"):
        await go(account, tmp_path / "again", run="r")
    assert len(training.trained) == 1


async def test_a_service_that_does_not_answer_for_a_while_is_waited_for(
    account: FaultyService, training: Training, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    await go(account, tmp_path, transport=Faltering(r"GET .*/rlorTrainerJobs/", after=2))
    assert ending(account, training, tmp_path) == undisturbed


async def test_a_refused_request_is_named_with_its_step(
    account: FaultyService, tmp_path: Path
) -> None:
    with pytest.raises(ControlPlaneError, match=r"step 0, train: .*overloaded.*Start again"):
        await go(account, tmp_path, transport=Faltering(r"POST .*/rlorTrainerJobs", after=0))
    assert len(await go(account, tmp_path)) == STEPS


async def test_a_deployment_of_another_model_is_not_sampled_from(
    account: FaultyService, tmp_path: Path
) -> None:
    await go(account, tmp_path / "ours", steps=1)
    account.change("deployments", "dep", baseModel="accounts/fireworks/models/other")
    with pytest.raises(ControlPlaneError, match="serves accounts/fireworks/models/other"):
        await go(account, tmp_path / "theirs", run="theirs")


async def test_a_completion_without_a_score_ends_the_run_or_is_counted(
    account: FaultyService, tmp_path: Path
) -> None:
    def picky(row: Any) -> Any:
        if row.messages[0].content == "10+13=":
            raise ValueError("cannot judge this one")
        return right_sum(row)

    with pytest.raises(TrainingDataError, match="has no score"):
        await go(account, tmp_path, evaluator=picky, steps=1)
    assert account.rows("rlorTrainerJobs") == []
    (report,) = await go(account, tmp_path, evaluator=picky, steps=1, failures="drop")
    assert (report.completions, report.dropped) == ((ROWS - 1) * N, {"unscored": N})
