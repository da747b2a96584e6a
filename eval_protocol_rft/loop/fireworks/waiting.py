"""Waiting for what the service makes, and making it where it is not there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval_protocol_rft.loop.fireworks.job_states import (
    ControlPlaneError,
    JobFailedError,
    Verdict,
    judge_job,
)
from eval_protocol_rft.training.export.errors import require

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How often to look at something that is being made, and for how long."""

    poll_seconds: float
    timeout_seconds: float

    async def until(
        self,
        what: str,
        look: Callable[[], Awaitable[Any]],
        judge: Callable[[str | None], Verdict],
        found: Any = None,
    ) -> None:
        """Look until `judge` says that it is done.

        Args:
            what: for messages.
            look: asks the service.
            judge: reads a state.
            found: what the service said just now.

        Raises:
            JobFailedError: a job failed.
            ControlPlaneError: something else did, somebody paused it, or the time is up.
        """
        deadline = time.monotonic() + self.timeout_seconds
        found = found if found is not None else await _look(look)
        while (verdict := judge(found.state)) == "wait":
            if time.monotonic() >= deadline:
                raise ControlPlaneError(
                    f"{what} is still {found.state} after {self.timeout_seconds:g} s; start again "
                    "to go on waiting"
                )
            await asyncio.sleep(self.poll_seconds)
            found = await _look(look)
        if verdict == "done":
            return
        status = getattr(found, "status", None)
        reason = getattr(status, "message", None) or "no reason given"
        message = f"{found.name or what} is {found.state}: {reason}"
        if verdict == "stopped":
            raise ControlPlaneError(f"{message}. Resume it, then start again")
        if judge is judge_job:
            raise JobFailedError(message, job=found.name or what, state=found.state)
        raise ControlPlaneError(message)


class _NoAnswer(NamedTuple):
    """In place of what a look that failed would have seen."""

    state: str


async def _look(look: Callable[[], Awaitable[Any]]) -> Any:
    """Look once. A service that does not answer is one that is still at it: a job of hours must not
    be given up for a minute without a network."""
    errors = service_errors()
    try:
        return await look()
    except (errors.APIConnectionError, errors.InternalServerError, errors.RateLimitError) as error:
        logger.warning("no answer, looking again: %s", error)
        return _NoAnswer(f"unknown ({error})")


async def found_or_made(
    get: Callable[[], Awaitable[Any]], make: Callable[[], Awaitable[Any]]
) -> Any:
    """What `get` finds, or what `make` makes where it finds nothing."""
    errors = service_errors()
    try:
        return await get()
    except errors.NotFoundError:
        try:
            return await make()
        except errors.ConflictError:  # an earlier try went through, but its answer was lost
            return await get()


def service_errors() -> Any:
    """The module with the client's exceptions."""
    return require("fireworks", install="eval-protocol-rft[fireworks]")
