"""The long tail of a group: who is waited for, and until when.

Invariant: a group ends once. What has ended by then counts as it ended; whatever has not is
cancelled, and nothing that a cancelled completion still does changes the group.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval_protocol_rft.sampling.attempts import causes
from eval_protocol_rft.sampling.clock import Alarm
from eval_protocol_rft.sampling.retry import CompletionAttempts
from eval_protocol_rft.sampling.types import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPolicy:
    """Whom not to wait for. Either choice favours short completions: what takes long is what is
    cancelled."""

    over_sample: int = 0
    """k: ask for n + k, keep the first n that survive, cancel the others."""
    straggler_seconds: float | None = None
    """From the group's first request on; what has not ended by then is cancelled and fails."""

    def __post_init__(self) -> None:
        if type(self.over_sample) is not int or self.over_sample < 0:
            raise ValueError(
                f"over_sample must be a whole number of completions, 0 or more, got "
                f"{self.over_sample!r}"
            )
        seconds = self.straggler_seconds
        if seconds is not None and not (
            isinstance(seconds, int | float)
            and not isinstance(seconds, bool)
            and 0 < seconds < math.inf
        ):
            raise ValueError(
                f"straggler_seconds must be a finite number of seconds above 0, or None for no "
                f"deadline, got {seconds!r}"
            )

    def __bool__(self) -> bool:
        """Whether it may cancel anything."""
        return self.over_sample > 0 or self.straggler_seconds is not None


WAIT_FOR_ALL = TailPolicy()


class GroupEnd:
    """When a group of completions ends, and the cancelling that goes with it. Belongs to one event
    loop; the group's owner awaits the tasks."""

    def __init__(self, policy: TailPolicy, wanted: int) -> None:
        """`wanted`: n, the survivors after which the others are surplus."""
        self.reason: Literal["enough", "deadline"] | None = None
        """None while it has not ended early."""
        self.tasks: Sequence[asyncio.Task[None]] = ()
        """One per completion."""
        self._seconds = policy.straggler_seconds
        self._missing = wanted
        self._alarm: Alarm | None = None

    def started(self) -> None:
        """A completion got its first slot; the clock runs from the first one."""
        if self._alarm is None and self._seconds is not None:
            self._alarm = Alarm(self._seconds, lambda: self._end("deadline"))

    def survived(self) -> None:
        """A completion was had. The last one that was wanted ends the group."""
        self._missing -= 1
        if self._missing == 0:
            self._end("enough")

    async def all_ended(self) -> None:
        """Wait for all tasks, or raise what one of them raised. That the end of the group cancelled
        the rest is no error."""
        if not self.tasks:
            return
        done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in self.tasks:
            if task in done and not (task.cancelled() and self.reason is not None):
                task.result()

    def forget(self) -> None:
        """No deadline any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _end(self, reason: Literal["enough", "deadline"]) -> None:
        if self.reason is not None:
            return
        self.reason = reason
        current = asyncio.current_task()  # the survivor that was still wanted; None at the deadline
        for task in self.tasks:
            if task is not current:
                task.cancel()


def straggler(
    index: int, attempts: CompletionAttempts, policy: TailPolicy, *, now: float
) -> Failure:
    """The failure of a completion that the deadline cut off. `now`: clock seconds, of the clock of
    the attempts."""
    history = attempts.history
    failed = [attempt for attempt in history if attempt.kind is not None]
    told = f"straggler_seconds={policy.straggler_seconds:g} after the group's first request"
    if not attempts.requests:
        message = f"cancelled {told}, still waiting for its first slot"
    elif failed:
        message = f"cancelled {told}, not done after {causes(failed)}"
    else:
        message = f"cancelled {told}, with no reply yet"
    return Failure(
        index=index,
        kind="cancelled",
        message=message,
        attempts=attempts.requests,
        seconds=0.0 if attempts.first_began is None else now - attempts.first_began,
        seed=attempts.seed,
        status=history[-1].status if history and attempts.began is None else None,
    )
