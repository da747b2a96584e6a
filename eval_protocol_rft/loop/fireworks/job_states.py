"""What the control plane's states mean for a run. Pure.

Invariant: a job counts as done in one state alone, COMPLETED. A state that says that it will not
get there is an error; one that we do not know is waited in, up to the caller's deadline.
"""

from __future__ import annotations

from typing import Literal

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


class ControlPlaneError(RuntimeError):
    """The control plane did not give what was asked for; the message says what to do next."""


class JobFailedError(ControlPlaneError):
    """A fine-tuning step ended without a model."""

    def __init__(self, message: str, *, job: str, state: str) -> None:
        super().__init__(message)
        self.job = job
        """Resource name."""
        self.state = state
        """As the service spells it."""


def judge_job(state: str | None) -> Verdict:
    """Read a `JOB_STATE_...`; "stopped" needs a person, and may go on after that."""
    return _JOB.get((state or "").removeprefix("JOB_STATE_"), "wait")


def judge_deployment(state: str | None) -> Verdict:
    """Read the state of a deployment; it serves while UPDATING."""
    if state in ("READY", "UPDATING"):
        return "done"
    return "failed" if state in ("FAILED", "DELETED", "DELETING") else "wait"


def judge_deployed_model(state: str | None) -> Verdict:
    """Read the state of an adapter on a deployment."""
    if state == "DEPLOYED":
        return "done"
    return "failed" if state == "UNDEPLOYING" else "wait"


def judge_ready(state: str | None) -> Verdict:
    """Read the state of a data set or a model, which only ever becomes READY."""
    return "done" if state == "READY" else "wait"
