"""The few things that a run asks of Fireworks' control plane, each safe to ask again.

Invariant: what is already there is found, not made again (GET first, and again where making it
answers 409), and it must be what would have been made. Deleting what is gone is not an error. A job
counts as done in one state alone, COMPLETED. A state that says that it will not get there is an
error; one that we do not know is waited in, up to the caller's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from eval_protocol_rft._options import check_options
from eval_protocol_rft.data import OnWait
from eval_protocol_rft.loop.fireworks._answers import (
    ControlPlaneError,
    is_absence,
    plain_line,
    service_errors,
    service_problem,
)
from eval_protocol_rft.loop.fireworks._waiting import Wait
from eval_protocol_rft.sampling import FireworksAddress, fireworks_address

Verdict = Literal["wait", "done", "failed", "stopped"]

_JOB: dict[str, Verdict] = {
    "COMPLETED": "done",
    "FAILED": "failed",
    "CANCELLED": "failed",
    "CANCELLING": "failed",
    "EXPIRED": "failed",
    "DELETING": "failed",
    "DELETING_CLEANING_UP": "failed",
    # Whether such a job leaves a model is not documented, so it is not taken for done.
    "EARLY_STOPPED": "failed",
    "PAUSED": "stopped",
}


class JobFailedError(ControlPlaneError):
    """A fine-tuning step ended without a model."""

    def __init__(self, message: str, *, job: str, state: str) -> None:
        super().__init__(message)
        self.job = job
        """Resource name."""
        self.state = state
        """As the service spells it."""


def job_verdict(state: str | None) -> Verdict:
    """Read a `JOB_STATE_...`; "stopped" needs a person, and may go on after that."""
    return _JOB.get((state or "").removeprefix("JOB_STATE_"), "wait")


def deployment_verdict(state: str | None) -> Verdict:
    """Read the state of a deployment; it serves while UPDATING."""
    if state in ("READY", "UPDATING"):
        return "done"
    return "failed" if state in ("FAILED", "DELETED", "DELETING") else "wait"


def adapter_verdict(state: str | None) -> Verdict:
    """Read the state of an adapter on a deployment."""
    if state == "DEPLOYED":
        return "done"
    return "failed" if state == "UNDEPLOYING" else "wait"


def ready_verdict(state: str | None) -> Verdict:
    """Read the state of a data set or a model, which only ever becomes READY."""
    return "done" if state == "READY" else "wait"


logger = logging.getLogger(__name__)


async def _look(look: Callable[[], Awaitable[Any]]) -> Any:
    """Look once. A service that does not answer is one that is still at it: a job of hours must not
    be given up for a minute without a network."""
    errors = service_errors()
    try:
        return await look()
    except (errors.APIConnectionError, errors.InternalServerError, errors.RateLimitError) as error:
        logger.warning("no answer, looking again: %s", error)
        return SimpleNamespace(state=f"unknown ({error})")


async def found_or_made(
    get: Callable[[], Awaitable[Any]], make: Callable[[], Awaitable[Any]]
) -> Any:
    """What `get` finds, or what `make` makes where it finds nothing."""
    errors = service_errors()
    try:
        return await get()
    except errors.NotFoundError as error:
        if not is_absence(error):
            raise
        try:
            return await make()
        except errors.ConflictError:  # an earlier try went through, but its answer was lost
            return await get()


MAX_UPLOAD_BYTES = 150 * 10**6
"""Of one request to `:upload`, as documented."""
UPLOAD_SECONDS = 600.0
_LONG_UPLOAD_BYTES = 10**6
"""What is worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How one reinforcement fine-tuning step trains: what its job is created with."""

    learning_rate: Annotated[float, Gt(0)]
    lora_rank: Annotated[int, Ge(1)]
    """At least 1: the next step starts from an adapter, and so does the deployment."""
    epochs: Annotated[int, Ge(1)] = 1
    """Passes over the step's data. After the first the data is no longer of the policy."""
    loss_method: Literal["GRPO", "DAPO", "GSPO_TOKEN"] = "GRPO"
    kl_beta: Annotated[float | None, Ge(0)] = None
    """Penalty to the reference; None leaves it to the method (GRPO is documented with 0.001)."""
    max_context_length: Annotated[int | None, Ge(1)] = None
    """Tokens of the longest sample; None leaves it to the server."""
    batch_size: Annotated[int | None, Ge(1)] = None
    """Tokens of a packed batch; None leaves it to the server."""
    node_count: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """The client's resources.

    Args:
        client: an `AsyncFireworks` with an account id.
        poll_seconds: between looks at something that is being made.
        timeout_seconds: most time to wait for one thing.
        on_wait: told what is waited for, at each look.
    """

    client: Any
    poll_seconds: float
    timeout_seconds: float
    on_wait: OnWait | None = None

    @property
    def address(self) -> FireworksAddress:
        """Of the client, which may have it from the environment."""
        ours, theirs = (fireworks_address(u) for u in (None, str(self.client.base_url)))
        return ours if ours.url == theirs.url else replace(theirs, source="the client's base_url")

    def problem(self, error: Any) -> str:
        """What an `APIError` of the client says."""
        return service_problem(
            error, self.address, key=self.client.api_key, key_source="the client's"
        )

    def _resource(self, answer: Any) -> Any:
        """The client gives as text what is no JSON."""
        if isinstance(answer, str):
            raise ControlPlaneError(
                f"{self.address} is no Fireworks: it answered with a page: {plain_line(answer)}. "
                "See that this is the service's address"
            )
        return answer

    @property
    def _account(self) -> str:
        return f"accounts/{self.client.account_id}"

    def dataset_name(self, dataset: str) -> str:
        return f"{self._account}/datasets/{dataset}"

    def model_name(self, model: str) -> str:
        return f"{self._account}/models/{model}"

    def job_name(self, job: str) -> str:
        return f"{self._account}/rlorTrainerJobs/{job}"

    def deployment_name(self, deployment: str) -> str:
        return f"{self._account}/deployments/{deployment}"

    async def refuse_leftovers(self, name: str) -> None:
        """Raise a ControlPlaneError where a data set or a job of this name is there already."""
        kinds = (
            ("data set", self.client.datasets),
            ("job", self.client.reinforcement_fine_tuning_steps),
        )
        for kind, resource in kinds:
            try:
                leftover = self._resource(await resource.get(name))
            except service_errors().NotFoundError as error:
                if not is_absence(error):
                    raise
                continue
            raise ControlPlaneError(
                f"this run is new, and there is a {kind} {leftover.name} already, of another run "
                "of this name: take another name, or the folder of that run"
            )

    async def deploy(self, deployment: str, base_model: str, options: Mapping[str, Any]) -> None:
        """See that a deployment of `base_model` serves; make it where it is not there."""
        deployments = self.client.deployments
        answer = await found_or_made(
            lambda: deployments.get(deployment),
            lambda: deployments.create(
                deployment_id=deployment,
                base_model=base_model,
                **{"enable_addons": True, **options},
            ),
        )
        if answer.base_model not in (None, base_model):
            raise ControlPlaneError(
                f"deployment {deployment} serves {answer.base_model}, not {base_model}: name "
                "another"
            )
        await self._until(
            f"deployment {deployment}",
            lambda: deployments.get(deployment),
            deployment_verdict,
            answer,
        )

    async def put_adapter(self, deployment: str, model: str) -> None:
        """See that `model` is on the deployment, in the place of any other."""
        lora, target = self.client.lora, self.deployment_name(deployment)
        await self._until(
            f"model {model}", lambda: self.client.models.get(_id(model)), ready_verdict
        )
        answer = None
        async for deployed in lora.list():
            if (deployed.model, deployed.deployment) == (model, target):
                answer = deployed
        if answer is None:
            answer = await lora.load(deployment=target, model=model, replace_merged_addon=True)
        deployed_id = _id(answer.name)
        await self._until(
            f"{model} on {deployment}", lambda: lora.get(deployed_id), adapter_verdict, answer
        )

    async def put_dataset(self, dataset: str, file: Path, *, rows: int) -> None:
        """See that the data set is there with the contents of `file`."""
        data = await asyncio.to_thread(file.read_bytes)
        if len(data) > MAX_UPLOAD_BYTES:
            raise ControlPlaneError(
                f"{file} has {len(data)} bytes and at most {MAX_UPLOAD_BYTES} can be uploaded at "
                "once: take fewer rows per step"
            )
        datasets = self.client.datasets
        answer = await found_or_made(
            lambda: datasets.get(dataset),
            lambda: datasets.create(
                dataset_id=dataset,
                dataset={
                    "user_uploaded": {},
                    "example_count": str(rows),
                    "format": "RL",
                    "display_name": dataset,
                },
            ),
        )
        if ready_verdict(answer.state) != "done":
            wait = Wait(f"upload of data set {dataset}", self.on_wait)
            if len(data) >= _LONG_UPLOAD_BYTES:
                wait.see(f"{len(data) / 1e6:.1f} MB")
            await datasets.upload(dataset, file=(file.name, data), timeout=UPLOAD_SECONDS)
            wait.done("uploaded")
        await self._until(f"data set {dataset}", lambda: datasets.get(dataset), ready_verdict)

    async def delete_dataset(self, dataset: str) -> None:
        try:
            await self.client.datasets.delete(dataset)
        except service_errors().NotFoundError as error:
            if not is_absence(error):
                raise
            logger.debug("data set %s is gone already", dataset)

    async def train(self, job: str, *, start: Mapping[str, str], settings: StepSettings) -> str:
        """See that the job `job` trains on the data set of its name, and wait for its end.

        Args:
            job: id of the job, of its data set and of the model that it makes.
            start: `base_model` or `warm_start_from`.
            settings: see there.

        Returns:
            Name of the model.

        Raises:
            JobFailedError: it ended without one.
        """
        steps, dataset, model = (
            self.client.reinforcement_fine_tuning_steps,
            self.dataset_name(job),
            self.model_name(job),
        )
        answer = await found_or_made(
            lambda: steps.get(job),
            lambda: steps.create(
                rlor_trainer_job_id=job,
                dataset=dataset,
                reward_weights=["score=1.0"],
                node_count=settings.node_count,
                loss_config=_given(method=settings.loss_method, kl_beta=settings.kl_beta),
                training_config=_given(
                    **start,
                    output_model=model,
                    epochs=settings.epochs,
                    learning_rate=settings.learning_rate,
                    lora_rank=settings.lora_rank,
                    max_context_length=settings.max_context_length,
                    batch_size=settings.batch_size,
                ),
            ),
        )
        if answer.dataset not in (None, dataset):
            raise ControlPlaneError(
                f"there is a job {answer.name} already, on {answer.dataset}: take another run name"
            )
        await self._until(f"job {job}", lambda: steps.get(job), job_verdict, answer)
        return model

    async def _until(
        self,
        what: str,
        look: Callable[[], Awaitable[Any]],
        verdict_on: Callable[[str | None], Verdict],
        answer: Any = None,
    ) -> None:
        """Look until `verdict_on` says that it is done.

        Args:
            what: for messages.
            look: asks the service.
            verdict_on: reads a state.
            answer: what the service said just now.

        Raises:
            JobFailedError: a job failed.
            ControlPlaneError: something else did, somebody paused it, or the time is up.
        """
        deadline = time.monotonic() + self.timeout_seconds
        wait = Wait(what, self.on_wait)
        answer = answer if answer is not None else await _look(look)
        while (verdict := verdict_on(answer.state)) == "wait":
            if time.monotonic() >= deadline:
                raise ControlPlaneError(
                    f"{what} is still {answer.state} after {self.timeout_seconds:g} s; start again "
                    "to go on waiting"
                )
            wait.see(str(answer.state))
            await asyncio.sleep(self.poll_seconds)
            answer = await _look(look)
        if verdict == "done":
            wait.done(answer.state)
            return
        status = getattr(answer, "status", None)
        reason = getattr(status, "message", None) or "no reason given"
        message = f"{answer.name or what} is {answer.state}: {reason}"
        if verdict == "stopped":
            raise ControlPlaneError(f"{message}. Resume it, then start again")
        if verdict_on is job_verdict:
            raise JobFailedError(message, job=answer.name or what, state=answer.state)
        raise ControlPlaneError(message)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _id(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]
