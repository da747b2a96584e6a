"""`iterate`: sample, score, fine-tune a step, switch to the new model, again: on the control plane.

Invariant: a run can be stopped anywhere, killed included, and started again with the same
arguments: no step trains twice, no data set stays behind, and what was generated is not generated
again. `run_state` says how.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.loop.fireworks.control_plane import ControlPlane
from eval_protocol_rft.loop.fireworks.generating import Failures
from eval_protocol_rft.loop.fireworks.run_state import RunStateError, StepReport, check_run_name
from eval_protocol_rft.loop.fireworks.running import Run
from eval_protocol_rft.loop.fireworks.settings import StepSettings
from eval_protocol_rft.loop.fireworks.waiting import Waiting

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow
    from eval_protocol.pytest.rollout_processor import RolloutProcessor

POLL_SECONDS = 15.0
TIMEOUT_SECONDS = 24 * 3600.0


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
        poll_seconds: between looks at something that is being made.
        timeout_seconds: most time to wait for one thing, a step's job for instance.

    Returns:
        One report per step, those of earlier calls included.

    Raises:
        JobFailedError: a step's job ended without a model. The run stands on it until
            `retry_failed`; its data set is deleted, its data stays in `folder`.
        ControlPlaneError: something else was not to be had, start again to go on; or the run is
            new and there is a job or a data set of its name.
        RunStateError: `folder` is of a run with other settings, or another process runs it.
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
        raise RunStateError(f"another process runs {folder}") from error
    try:
        return await Run(
            evaluator=evaluator,
            rows=rows,
            plane=ControlPlane(
                client=client,
                waiting=Waiting(poll_seconds=poll_seconds, timeout_seconds=timeout_seconds),
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
