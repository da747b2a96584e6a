"""One run, phase by phase, as `run_state` draws it.

Invariant: what a phase leaves (a file, a data set, a job, a model) is there before the state says
that the next one has begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.durable import write_whole
from eval_protocol_rft.loop.fireworks.control_plane import ControlPlane
from eval_protocol_rft.loop.fireworks.generating import Failures, generate
from eval_protocol_rft.loop.fireworks.job_states import ControlPlaneError, JobFailedError
from eval_protocol_rft.loop.fireworks.run_state import (
    RunState,
    StepReport,
    read_state,
    write_state,
)
from eval_protocol_rft.loop.fireworks.settings import StepSettings
from eval_protocol_rft.loop.fireworks.waiting import service_errors

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow
    from eval_protocol.pytest.rollout_processor import RolloutProcessor


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
            with _named("beginning"):
                await self.plane.refuse_leftovers(fresh.name)
            state = self._enter(fresh)
        if state.phase == "failed":
            if not retry_failed:
                raise JobFailedError(
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
            with _named(f"step {state.step}, {phase}"):
                after = await self._next(state)
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
        client = self.plane.client
        params = {
            "api_base": f"{str(client.base_url).rstrip('/')}/inference/v1",
            "api_key": client.api_key,
            **self.completion_params,
            "model": self._sampled_model(state),
        }
        data, report = await generate(
            self.evaluator,
            self.rows,
            step=state.step,
            completion_params=params,
            processor=self.processor,
            failures=self.failures,
        )
        write_whole(self._data(state), data)
        return state.generated(report)

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
        except JobFailedError as error:
            # First: were it to happen after the state is written, it might not happen at all.
            await self.plane.delete_dataset(state.name)
            self._enter(state.failed(str(error)))
            raise
        return state.trained(model)

    def _data(self, state: RunState) -> Path:
        return self.folder / f"step{state.step}.jsonl"


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Say during what the service refused."""
    try:
        yield
    except service_errors().APIError as error:
        raise ControlPlaneError(f"{what}: {error}. Start again to go on from here") from error
