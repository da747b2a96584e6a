"""Which groups are sampled ahead, and which of them make a step. Pure.

Invariant: a group trains at most `max_staleness` versions after the one it was started under;
every group that is started ends trained or dropped, once; and at most
(max_staleness + 1) * groups_per_step are outstanding, the ones in the step included.

Each step uses up `groups_per_step` groups, so those outstanding have a slot each in this step and
the next `max_staleness` ones. Which of the ready ones go first is decided by deadline (the last
version that may train a group); a step waits only where going ahead without a straggler would
leave some deadline more groups than slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["sampling", "ready", "training"]


@dataclass(slots=True)
class _Group:
    version: int
    """The policy version when it was started."""
    state: State = "sampling"


@dataclass(slots=True)
class Scheduler:
    """Numbers stand for groups, in the order in which they started."""

    groups_per_step: int
    max_staleness: int = 0
    version: int = 0
    """Steps trained and published."""
    last_version: int | None = None
    """After so many steps all is over; None: when there is nothing more to start."""
    exhausted: bool = False
    """There is nothing more to start: the last steps may be smaller."""
    _groups: dict[int, _Group] = field(default_factory=dict)
    _next: int = 0

    def __post_init__(self) -> None:
        if self.groups_per_step < 1:
            raise ValueError(f"groups_per_step must be at least 1, got {self.groups_per_step}")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must not be negative, got {self.max_staleness}")

    @property
    def outstanding(self) -> int:
        """Groups started that are neither trained nor dropped."""
        return len(self._groups)

    @property
    def sampling(self) -> int:
        return self._count("sampling")

    @property
    def ready(self) -> int:
        return self._count("ready")

    @property
    def training(self) -> bool:
        """A step is under way."""
        return self._count("training") > 0

    def may_start(self) -> bool:
        """Whether one more group would still be trained in time."""
        steps = self.max_staleness + 1
        if self.last_version is not None:
            steps = min(steps, self.last_version - self.version)
        return not self.exhausted and self.outstanding < steps * self.groups_per_step

    def start(self) -> int:
        """Take in a group, which is being sampled from now on; its number."""
        if not self.may_start():
            raise ValueError("no group may start now")
        number, self._next = self._next, self._next + 1
        self._groups[number] = _Group(self.version)
        return number

    def sampled(self, number: int, *, trains: bool) -> None:
        """A group is there. `trains`: filters left something of it; else it is dropped here."""
        group = self._in(number, "sampling")
        if trains:
            group.state = "ready"
        else:
            del self._groups[number]

    def staleness(self, number: int) -> int:
        """Versions between the one it was started under and today's."""
        return self.version - self._groups[number].version

    def take(self) -> list[int] | None:
        """The groups of the next step, which begins with this call; None: wait, or all is done."""
        if self.training:
            return None
        ready = sorted(n for n, group in self._groups.items() if group.state == "ready")
        # By version, and so by deadline: numbers rise with versions.
        batch = ready[: self.groups_per_step]
        full = len(batch) == self.groups_per_step
        last = self.exhausted and not self.sampling
        if not batch or not (full or last) or not self._in_time_without(set(batch)):
            return None
        for number in batch:
            self._groups[number].state = "training"
        return batch

    def trained(self) -> None:
        """The step that began is done, and its weights are those sampled from."""
        if not self.training:
            raise ValueError("no step is under way")
        self._groups = {n: g for n, g in self._groups.items() if g.state != "training"}
        self.version += 1

    def _in_time_without(self, batch: set[int]) -> bool:
        """Whether the steps after this one have slots enough before each deadline."""
        left = sorted(g.version for n, g in self._groups.items() if n not in batch)
        for slots_before, version in enumerate(left):
            steps_left = version + self.max_staleness - self.version
            if slots_before >= steps_left * self.groups_per_step:
                return False
        return True

    def _in(self, number: int, state: State) -> _Group:
        group = self._groups.get(number)
        if group is None or group.state != state:
            raise ValueError(f"group {number} is not {state}")
        return group

    def _count(self, state: State) -> int:
        return sum(group.state == state for group in self._groups.values())
