"""Which rows are sampled next, which groups are sampled ahead, and which of them make a step. Pure.

Invariant: a group trains at most `max_staleness` versions after the one it was started under;
every group that is started ends trained or dropped, once; and at most
(max_staleness + 1) * groups_per_step are outstanding, the ones in the step included. The order of
rows follows from the seed alone, so a run that is resumed goes on with the very next row.

Each step uses up `groups_per_step` groups, so those outstanding have a slot each in this step and
the next `max_staleness` ones. Which of the ready ones go first is decided by deadline (the last
version that may train a group); a step waits only where going ahead without a straggler would
leave some deadline more groups than slots.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from eval_protocol_rft.loop._run_options import SetupError


class Draw(NamedTuple):
    """One turn of one row."""

    place: int
    """Of the row in the training set."""
    epoch: int
    """How often the row came before, which is also the number of its run."""


@dataclass(slots=True)
class RowStream:
    """Rows in a new random order every epoch."""

    rows: int
    seed: int
    epochs: float | None = None
    """None: without end."""
    taken: int = 0
    """Turns given out, those put back not counted."""
    put_back: list[Draw] = field(default_factory=list)
    _epoch: int = -1
    _order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SetupError("no rows to train on")

    def next(self) -> Draw | None:
        """The next turn, None where the epochs are over."""
        if self.put_back:
            return self.put_back.pop(0)
        if self.epochs is not None and self.taken >= round(self.epochs * self.rows):
            return None
        epoch, place = divmod(self.taken, self.rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(self.rows))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)  # noqa: S311
        self.taken += 1
        return Draw(self._order[place], epoch)


class Scheduler:
    """Numbers stand for groups, in the order in which they started."""

    def __init__(
        self, groups_per_step: int, max_staleness: int = 0, *, last_version: int | None = None
    ) -> None:
        """`last_version`: after so many steps all is over; None: when there is nothing more to
        start."""
        if groups_per_step < 1:
            raise ValueError(f"groups_per_step must be at least 1, got {groups_per_step}")
        if max_staleness < 0:
            raise ValueError(f"max_staleness must not be negative, got {max_staleness}")
        self.groups_per_step, self.max_staleness = groups_per_step, max_staleness
        self.last_version = last_version
        self.version = 0
        """Steps trained and published."""
        self.exhausted = False
        """There is nothing more to start: the last steps may be smaller."""
        self._sampling: dict[int, int] = {}
        """The policy version at the start of each group that is being sampled."""
        self._ready: dict[int, int] = {}
        """The same of those that are sampled."""
        self._training: dict[int, int] = {}
        """And of those in the step that is under way."""
        self._next = 0

    @property
    def outstanding(self) -> int:
        """Groups started that are neither trained nor dropped."""
        return len(self._sampling) + len(self._ready) + len(self._training)

    @property
    def training(self) -> bool:
        """A step is under way."""
        return bool(self._training)

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
        self._sampling[number] = self.version
        return number

    def sampled(self, number: int, *, trains: bool) -> None:
        """A group is there. `trains`: filters left something of it; else it is dropped here."""
        if number not in self._sampling:
            raise ValueError(f"group {number} is not sampling")
        version = self._sampling.pop(number)
        if trains:
            self._ready[number] = version

    def staleness(self, number: int) -> int:
        """Versions between the one that a group of this step was started under and today's."""
        return self.version - self._training[number]

    def take(self) -> list[int] | None:
        """The groups of the next step, which begins with this call; None: wait, or all is done."""
        if self._training:
            return None
        # By version, and so by deadline: numbers rise with versions.
        batch = sorted(self._ready)[: self.groups_per_step]
        full = len(batch) == self.groups_per_step
        last = self.exhausted and not self._sampling
        if not batch or not (full or last) or not self._in_time_without(set(batch)):
            return None
        self._training = {number: self._ready.pop(number) for number in batch}
        return batch

    def trained(self) -> None:
        """The step that began is done, and its weights are those sampled from."""
        if not self._training:
            raise ValueError("no step is under way")
        self._training = {}
        self.version += 1

    def _in_time_without(self, batch: set[int]) -> bool:
        """Whether the steps after this one have slots enough before each deadline."""
        groups = {**self._sampling, **self._ready}
        left = sorted(version for number, version in groups.items() if number not in batch)
        for slots_before, version in enumerate(left):
            steps_left = version + self.max_staleness - self.version
            if slots_before >= steps_left * self.groups_per_step:
                return False
        return True
