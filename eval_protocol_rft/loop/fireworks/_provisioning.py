"""The trainer jobs and the deployment of one trainer on the service: made, waited for, left or
deleted.

Invariant: what was there before is never deleted here, and what was made here is deleted or named.
A job that stopped is not resumed over and over. Nobody waits in a thread that cannot be told to
stop: the SDK's own waits, of up to two days, are cut into slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx

from eval_protocol_rft.data import OnWait
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop.fireworks._control_plane import deployment_verdict, job_verdict
from eval_protocol_rft.loop.fireworks._waiting import Wait, deletion, left_running
from eval_protocol_rft.sampling import FireworksAddress

logger = logging.getLogger(__name__)
T = TypeVar("T")

SLICE_SECONDS = 1.0
"""Of the SDK's waits: it looks at least once in each, and sleeps 5 to 15 s between two looks."""
SLICED = {
    "trainer_timeout_s": SLICE_SECONDS,
    "trainer_pending_timeout_s": SLICE_SECONDS,
    "deployment_timeout_s": SLICE_SECONDS,
    "reattach_settle_timeout_s": SLICE_SECONDS,
}
QUEUED_SECONDS = 48 * 3600.0
"""Most time to wait for machines, and ..."""
READY_SECONDS = 5400.0
"""... once there are some, for what runs on them: the SDK's own limits."""

FIRST_LOOK_SECONDS = 1.0
"""What is there sooner was not waited for."""
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before a request whose connection broke is sent again."""
CLOSE_SECONDS = 10.0
"""For each request at the end."""


@dataclass(slots=True, kw_only=True)
class Resources:
    """What one trainer needs on the service.

    Args:
        jobs, deployments: the SDK's managers.
        address: of the service.
        key: of the account.
        trainer_jobs: ids; the first one's is the policy, which the deployment belongs to.
        deployment: id.
        delete: delete what was made here when it is no longer needed. What is made for the
            reference, the second job, is deleted always.
        on_wait: told what is waited for, at each look.
        poll_seconds: between looks.
    """

    jobs: Any
    deployments: Any
    address: FireworksAddress
    key: str = field(repr=False)
    trainer_jobs: list[str]
    deployment: str
    delete: bool
    on_wait: OnWait | None
    poll_seconds: float
    before: set[str] = field(default_factory=set)
    """Resource names of what was there at first."""
    other_weights: bool = False
    """The deployment was there and belonged to another trainer, whose weights it may hold."""

    def look(self, *, can_make_deployment: bool) -> None:
        """See what is there, before anything is made. Blocks.

        Raises:
            TrainerError: the deployment is not there, and cannot be made.
        """
        for job in self.trainer_jobs:
            if persistently(partial(self.jobs.try_get, job)) is not None:
                self.before.add(self._job(job))
        info = persistently(partial(self.deployments.get, self.deployment))
        if info is not None and deployment_verdict(info.state) != "failed":
            self.before.add(self._deployment)
            self.other_weights = info.hot_load_trainer_job != self._job(self.trainer_jobs[0])
        elif not can_make_deployment:
            raise TrainerError(
                f"there is no deployment {self.deployment} at {self.address}, and to make one its "
                "hardware must be known: name a training shape (training_shape=, --training-shape)"
                ", or a deployment that is there"
            )

    async def started(self, start: Callable[[], T]) -> T:
        """What `start` returns, a call of the SDK with `SLICED` waits, once all is there.

        Raises:
            TrainerError: something stopped or failed, or took too long.
        """
        began = time.monotonic()
        placed: float | None = None
        async with self._told() as waits:
            while True:
                try:
                    # What is there already is found, so all of it may be asked again.
                    made = await in_thread(partial(persistently, start))
                    for wait in waits:
                        wait.done("ready")
                    return made
                except TimeoutError as error:
                    states = await in_thread(partial(persistently, self._states))
                    for what, (state, reason) in states.items():
                        verdict = (job_verdict if "job" in what else deployment_verdict)(state)
                        # A job in service mode runs until it is stopped.
                        if verdict in ("failed", "stopped") or state == "JOB_STATE_COMPLETED":
                            raise TrainerError(f"{what} is {state}: {reason}") from error
                    now = time.monotonic()
                    if all(state != "JOB_STATE_PENDING" for state, _ in states.values()):
                        placed = placed or now
                    if now - began > QUEUED_SECONDS or (placed and now - placed > READY_SECONDS):
                        raise TrainerError(f"it took too long: {error}") from error
                    await asyncio.sleep(self.poll_seconds)

    @contextlib.asynccontextmanager
    async def _told(self) -> AsyncIterator[Collection[Wait]]:
        """Within, who waits is told what for; gives what was seen to be waited for."""
        waits: dict[str, Wait] = {}

        async def tell() -> None:
            await asyncio.sleep(min(self.poll_seconds, FIRST_LOOK_SECONDS))
            while True:
                with contextlib.suppress(httpx.HTTPError, RuntimeError):  # the SDK raises these
                    for what, (state, _) in (await asyncio.to_thread(self._states)).items():
                        wait = waits.setdefault(what, Wait(what, self.on_wait))
                        if state in ("JOB_STATE_RUNNING", "READY", "UPDATING"):
                            wait.done(state)
                        else:
                            wait.see(state)
                await asyncio.sleep(self.poll_seconds)

        task = asyncio.ensure_future(tell())
        try:
            yield waits.values()
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _states(self) -> dict[str, tuple[str, str]]:
        """What is waited for -> its state, and what the service says of it. Blocks."""
        states = {}
        for job in self.trainer_jobs:
            found = self.jobs.try_get(job) or {}
            status = found.get("status")
            reason = status.get("message") if isinstance(status, dict) else None
            state = str(found.get("state") or "not there yet")
            states[f"trainer job {job}"] = (state, reason or "no reason given")
        info = self.deployments.get(self.deployment)
        state = "not there yet" if info is None else str(info.state)
        states[f"deployment {self.deployment}"] = (state, "no reason given")
        return states

    def close(self) -> None:
        """Delete what is to be deleted, and say what is left. Blocks, for seconds: what a service
        that is away has, is named as well."""
        left = []
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(headers=headers, timeout=CLOSE_SECONDS) as http:
            for name in [self._deployment, *map(self._job, self.trainer_jobs)]:
                is_reference = name in map(self._job, self.trainer_jobs[1:])
                goes = name not in self.before and (self.delete or is_reference)
                url = deletion(name, self.address) if goes else f"{self.address.url}/v1/{name}"
                try:
                    answer = http.request("DELETE" if goes else "GET", url)
                except httpx.HTTPError as error:
                    logger.debug("%s: %s", name, error)
                    left.append(name)
                    continue
                if answer.status_code != 404 and not (goes and answer.is_success):
                    left.append(name)
        if left:
            logger.warning("%s", left_running(left, self.address))
        self.jobs.close()
        self.deployments.close()

    def _job(self, job: str) -> str:
        return f"accounts/{self.jobs.account_id}/rlorTrainerJobs/{job}"

    @property
    def _deployment(self) -> str:
        return f"accounts/{self.jobs.account_id}/deployments/{self.deployment}"


def persistently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again where the connection breaks: the SDK does that for some of
    its requests, and not for one whose connection breaks in the midst. Blocks."""
    for seconds in _PAUSES:
        try:
            return ask()
        except httpx.TransportError as error:
            logger.warning("%s: asking again", error)
            time.sleep(seconds)
    return ask()


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` returns, which blocks. Cancelled, wait for it all the same: what it made after
    its caller has gone would run on and cost money."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            logger.warning("stopping once the SDK's call has returned, which may take 15 s")
        await asyncio.gather(task, return_exceptions=True)
        raise
