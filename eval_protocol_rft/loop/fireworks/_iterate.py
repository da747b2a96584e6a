r"""`iterate`: on the control plane sample, score, fine-tune a step, switch to the new model, again.

Invariant: a run can be stopped anywhere, killed included, and started again with the same
arguments: no step trains twice, no data set stays behind, and what was generated is not generated
again. What a phase leaves (a file, a data set, a job, a model) is there before the state says that
the next one has begun, and every completion that was asked for is in the lines of the data set or
counted in the report.

So a phase is written down before its first request is made, and left after its last was answered;
each can be repeated from its beginning without doing anything twice, and a process that dies
anywhere goes on where the file says. `RunState` is that file, and a pure state machine over it:

    serve -> generate -> upload -> train -> clean -> serve (next step), or done
                                     \-> failed -> upload (another attempt)
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from eval_protocol.models import EvaluationRow
from eval_protocol.pytest.rollout_processor import RolloutProcessor

from eval_protocol_rft._durable import write_whole
from eval_protocol_rft.data import OnWait, waits
from eval_protocol_rft.loop._rollouts import RowRunner
from eval_protocol_rft.loop._run_directory import RunFolderError
from eval_protocol_rft.loop.fireworks import _control_plane as control
from eval_protocol_rft.loop.fireworks._answers import ControlPlaneError, service_errors
from eval_protocol_rft.loop.fireworks._control_plane import ControlPlane, StepSettings
from eval_protocol_rft.loop.fireworks._waiting import left_running
from eval_protocol_rft.rollout import RolloutError
from eval_protocol_rft.training.export import rl_step

Phase = Literal["serve", "generate", "upload", "train", "clean", "failed", "done"]
SCHEMA = 1
STATE_FILE = "run.json"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
Failures = Literal["raise", "drop"]
POLL_SECONDS = 15.0
TIMEOUT_SECONDS = 24 * 3600.0


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one step saw and made."""

    step: int
    """From 0."""
    model: str
    """What was sampled from, as requests name it."""
    groups: int
    """Prompt groups that were trained on."""
    completions: int
    """Completions that were trained on."""
    mean_score: float
    """Over those completions, before the step."""
    dropped: dict[str, int]
    """Reason -> completions, or whole rows (`failed_row`), that were left out."""
    output_model: str | None = None
    """The model that the step made; None until it has."""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run must remember."""

    schema: int = SCHEMA
    run: str
    """Its name; resources are named after it."""
    settings: dict[str, str | int | float | None]
    """What may not change while the run goes on."""
    step: int = 0
    phase: Phase = "serve"
    attempt: int = 0
    """Of this step's job: 0, and one more after each that failed."""
    model: str | None = None
    """The adapter to sample from and to start the next step from; None: the base model."""
    reports: list[StepReport] = []
    """One per step that has generated, the current one included."""
    failure: str | None = None
    """Why the phase is `failed`."""

    @property
    def name(self) -> str:
        """Of this step's data set, job and model: the same after any restart."""
        again = f"-try{self.attempt}" if self.attempt else ""
        return f"{self.run}-step{self.step}{again}"

    def entered(self, phase: Phase) -> RunState:
        return msgspec.structs.replace(self, phase=phase)

    def generated(self, report: StepReport) -> RunState:
        return msgspec.structs.replace(self, phase="upload", reports=[*self.reports, report])

    def trained(self, output_model: str) -> RunState:
        """The job is done. What it trained on is still to be deleted."""
        report = msgspec.structs.replace(self.reports[-1], output_model=output_model)
        return msgspec.structs.replace(
            self, phase="clean", model=output_model, reports=[*self.reports[:-1], report]
        )

    def cleaned(self, steps: int) -> RunState:
        """The step left nothing behind; on to the next of `steps`."""
        done = self.step + 1
        return msgspec.structs.replace(
            self, step=done, attempt=0, phase="serve" if done < steps else "done"
        )

    def failed(self, why: str) -> RunState:
        return msgspec.structs.replace(self, phase="failed", failure=why)

    def retried(self) -> RunState:
        """Train again on the data that the failed job had, under another name."""
        return msgspec.structs.replace(self, phase="upload", attempt=self.attempt + 1, failure=None)


def check_run_name(run: str) -> None:
    """Raise a ValueError unless `run` can begin the id of a resource."""
    if not _NAME.fullmatch(run):
        raise ValueError(
            f"run is {run!r}: it begins the ids of resources, so at most 40 lower-case letters, "
            "digits and hyphens, a letter first and no hyphen last"
        )


def write_state(folder: Path, state: RunState) -> None:
    """Put `state` in the place of the one before, on disk when this returns."""
    write_whole(folder / STATE_FILE, msgspec.json.format(msgspec.json.encode(state)) + b"\n")


def read_state(folder: Path, fresh: RunState) -> RunState | None:
    """The state in `folder`, which must be of the run that began with `fresh`; None: there is none.

    Raises:
        RunFolderError: it is not readable, or of a run with another name or other settings.
    """
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RunFolderError(f"{path} is no state of a run: {error}") from error
    if state.schema != SCHEMA:
        raise RunFolderError(f"{path} has layout {state.schema}, this version reads {SCHEMA}")
    for name, ours, theirs in (
        ("run", fresh.run, state.run),
        *((name, value, state.settings.get(name)) for name, value in fresh.settings.items()),
    ):
        if ours != theirs:
            raise RunFolderError(
                f"{path} is of a run with {name}={theirs!r}, and this is {name}={ours!r}: take "
                "another folder, or the same value"
            )
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What `iterate` was asked for; see there."""

    evaluator: Callable[..., Any]
    rows: Sequence[EvaluationRow | Mapping[str, Any]]
    plane: ControlPlane
    folder: Path
    steps: int
    base_model: str
    deployment: str
    settings: StepSettings
    deployment_options: Mapping[str, Any]
    completion_params: Mapping[str, Any]
    processor: RolloutProcessor | None
    failures: Failures
    on_step: Callable[[StepReport], None] | None

    async def go(self, run: str, *, retry_failed: bool) -> list[StepReport]:
        """Go on from where the folder says, to the end."""
        fresh = RunState(
            run=run,
            settings={
                "account": self.plane.client.account_id,
                "base_model": self.base_model,
                "deployment": self.deployment,
                "lora_rank": self.settings.lora_rank,
            },
        )
        state = read_state(self.folder, fresh)
        if state is None:
            with self._named("beginning"):
                await self.plane.refuse_leftovers(fresh.name)
            state = self._enter(fresh)
        if state.phase == "failed":
            if not retry_failed:
                raise control.JobFailedError(
                    f"{state.failure}. Its data is {self._data(state)}; start again with "
                    "retry_failed=True to train on it once more, or take another run and folder",
                    job=state.name,
                    state="failed",
                )
            state = self._enter(state.retried())
        if state.phase == "done" and state.step < self.steps:
            state = self._enter(state.entered("serve"))
        while state.phase != "done":
            phase = state.phase
            try:
                with self._named(f"step {state.step}, {phase}"):
                    after = await self._next(state)
            except asyncio.CancelledError:
                control.logger.warning("%s", self._left(state))
                raise
            state = self._enter(after)
            if phase == "clean" and self.on_step is not None:
                self.on_step(state.reports[-1])
        return state.reports

    def _enter(self, state: RunState) -> RunState:
        write_state(self.folder, state)
        return state

    async def _next(self, state: RunState) -> RunState:
        """Do what the phase is for; return the state after it."""
        match state.phase:
            case "serve":
                await self._serve(state)
                return state.entered("generate")
            case "generate":
                return await self._generate(state)
            case "upload":
                rows = state.reports[-1].groups
                await self.plane.put_dataset(state.name, self._data(state), rows=rows)
                return state.entered("train")
            case "train":
                return await self._train(state)
            case "clean":
                await self.plane.delete_dataset(state.name)
                return state.cleaned(self.steps)
        raise AssertionError(f"nothing is to be done in {state.phase}")

    async def _serve(self, state: RunState) -> None:
        await self.plane.deploy(self.deployment, self.base_model, self.deployment_options)
        if state.model is not None:
            await self.plane.put_adapter(self.deployment, state.model)

    async def _generate(self, state: RunState) -> RunState:
        """Sample and score the rows, and write the lines of the data set.

        Raises:
            Exception: whatever a row raises, unless it is one that failed and may be dropped.
            TrainingDataError: a completion has no score, unless it may be dropped.
            EmptyBatchError: nothing is left.
        """
        client = self.plane.client
        params = {
            "api_base": self.plane.address.inference,
            "api_key": client.api_key,
            **self.completion_params,
            "model": self._sampled_model(state),
        }
        if params.get("seed") is not None:
            # Or every step would draw its completions with the same random numbers.
            params["seed"] += state.step
        runner = RowRunner(self.evaluator, processor=self.processor, completion_params=params)
        try:
            scored = await self._roll_out(runner)
        finally:
            await runner.aclose()
        done = [row for row in scored if row is not None]
        unscored: rl_step.Unscored = "drop" if self.failures == "drop" else "error"
        data = rl_step.to_lines(done, unscored=unscored)
        scores = [sample["evals"]["score"] for line in data.lines for sample in line["samples"]]
        dropped = Counter(data.dropped)
        dropped["failed_row"] += len(scored) - len(done)
        report = StepReport(
            step=state.step,
            model=params["model"],
            groups=len(data.lines),
            completions=len(scores),
            mean_score=sum(scores) / len(scores),
            dropped=dict(+dropped),
        )
        lines = b"".join(msgspec.json.encode(line) + b"\n" for line in data.lines)
        write_whole(self._data(state), lines)
        return state.generated(report)

    async def _roll_out(self, runner: RowRunner) -> list[EvaluationRow | None]:
        """The scored rows in their order; None for one that failed. The first error ends the
        rest."""

        async def one(row: EvaluationRow | Mapping[str, Any]) -> EvaluationRow | None:
            try:
                return await runner(row)
            except RolloutError:
                if self.failures == "drop":
                    return None
                raise

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(row)) for row in self.rows]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _sampled_model(self, state: RunState) -> str:
        """An adapter is asked for by name: a deployment that does not hold it answers 404, where
        it would answer for the deployment's own name with older weights."""
        deployment = self.plane.deployment_name(self.deployment)
        return deployment if state.model is None else f"{state.model}#{deployment}"

    async def _train(self, state: RunState) -> RunState:
        start = (
            {"base_model": self.base_model}
            if state.model is None
            else {"warm_start_from": state.model}
        )
        try:
            model = await self.plane.train(state.name, start=start, settings=self.settings)
        except control.JobFailedError as error:
            # First: were it to happen after the state is written, it might not happen at all.
            await self.plane.delete_dataset(state.name)
            self._enter(state.failed(str(error)))
            raise
        return state.trained(model)

    def _left(self, state: RunState) -> str:
        """What to tell of a run that is stopped here."""
        plane, names = self.plane, [self.plane.deployment_name(self.deployment)]
        if state.phase in ("upload", "train", "clean"):
            names.append(plane.dataset_name(state.name))
        if state.phase == "train":
            names.append(plane.job_name(state.name))
        return (
            f"stopped in step {state.step}, {state.phase}. The same call goes on from here; "
            f"{left_running(names, plane.address)}"
        )

    def _data(self, state: RunState) -> Path:
        return self.folder / f"step{state.step}.jsonl"

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Say during what the service refused."""
        try:
            yield
        except service_errors().APIError as error:
            raise ControlPlaneError(
                f"{what}: {self.plane.problem(error)}. Start again to go on from here"
            ) from error


async def iterate(
    evaluator: Callable[..., Any],
    rows: Sequence[EvaluationRow | Mapping[str, Any]],
    *,
    client: Any,
    run: str,
    folder: Path,
    steps: int,
    base_model: str,
    deployment: str,
    settings: StepSettings,
    deployment_options: Mapping[str, Any] | None = None,
    completion_params: Mapping[str, Any] | None = None,
    processor: RolloutProcessor | None = None,
    failures: Failures = "raise",
    retry_failed: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
    on_wait: OnWait | None = None,
    poll_seconds: float = POLL_SECONDS,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[StepReport]:
    """Improve a model on an evaluator, by `steps` reinforcement fine-tuning steps.

    Each step samples from the model that the step before made. The trainer gets text and
    tokenizes it anew (see `training.export.rl_step`); where ids must be exact, use
    `FireworksTrainer`.

    Args:
        evaluator: a function under `@evaluation_test`, or a plain evaluator.
        rows: sampled in every step; `EvaluationRow`s, or lines of the data set.
        client: a `fireworks.AsyncFireworks` with an account id; it stays the caller's to close.
        run: names the run; ids of data sets, jobs and models begin with it.
        folder: of this run: its state and its data. Made where it is not there.
        steps: how many in all. A finished run goes on when this is more than before.
        base_model: what the first step trains, `accounts/fireworks/models/...`.
        deployment: id of the deployment to sample from; made where it is not there, and left
            running at the end. New models are put on it as its one adapter.
        settings: of every step's job.
        deployment_options: of `client.deployments.create`, where it has to be made.
        completion_params: joined with those of the evaluation test, and before them. The model and
            where it is are set here; with a `seed`, every step has its own made from it.
        processor: in place of the one that the evaluation test names.
        failures: what a row without completions, or a completion without a score, is: an error, or
            dropped and counted.
        retry_failed: where the run stands on a job that failed, train again on the same data.
        on_step: called after each step that this call made.
        on_wait: told what is waited for (deployment, data set, job, model), at each look, with the
            state that the service says. Default: a line where stderr is a terminal. Changes are
            logged too.
        poll_seconds: between looks at something that is being made.
        timeout_seconds: most time to wait for one thing, a step's job for instance.

    Returns:
        One report per step, those of earlier calls included.

    Raises:
        JobFailedError: a step's job ended without a model. The run stands on it until
            `retry_failed`; its data set is deleted, its data stays in `folder`.
        ControlPlaneError: something else was not to be had, start again to go on; or the run is
            new and there is a job or a data set of its name.
        RunFolderError: `folder` is of a run with other settings, or another process runs it.
    """
    from filelock import FileLock, Timeout

    check_run_name(run)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not client.account_id:
        raise ValueError("the client has no account: AsyncFireworks(account_id=...)")
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(f"another process runs {folder}") from error
    try:
        with waits() if on_wait is None else contextlib.nullcontext(on_wait) as shown:
            return await Run(
                evaluator=evaluator,
                rows=rows,
                plane=ControlPlane(
                    client=client,
                    poll_seconds=poll_seconds,
                    timeout_seconds=timeout_seconds,
                    on_wait=shown,
                ),
                folder=folder,
                steps=steps,
                base_model=base_model,
                deployment=deployment,
                settings=settings,
                deployment_options=deployment_options or {},
                completion_params=completion_params or {},
                processor=processor,
                failures=failures,
                on_step=on_step,
            ).go(run, retry_failed=retry_failed)
    finally:
        lock.release()
