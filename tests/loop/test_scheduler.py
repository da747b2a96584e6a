"""What the scheduler promises, over simulated runs of every shape."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.loop._scheduler import Scheduler


class Simulated:
    """A run: groups that take a random time and may be dropped, steps that take a random time."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        rng: random.Random,
        rows: int | None,
        drop: float,
        tail: float,
        step_time: float,
    ) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.rows = rows
        self.drop = drop
        self.tail = tail
        self.step_time = step_time
        self.now = 0.0
        self.ends: dict[int, float] = {}
        self.step_ends: float | None = None
        self.fate: Counter[int] = Counter()
        self.dropped = 0
        self.staleness: list[int] = []
        self.sizes: list[int] = []
        self.most_outstanding = 0

    def duration(self) -> float:
        return 10.0 if self.rng.random() < self.tail else self.rng.uniform(0.1, 1.0)

    def run(self, steps: int) -> None:
        """Until the steps are done, or the rows; nothing to wait for before that is a deadlock."""
        while self.scheduler.version < steps:
            while self.scheduler.may_start():
                if self.rows == 0:
                    self.scheduler.exhausted = True
                    break
                if self.rows is not None:
                    self.rows -= 1
                self.ends[self.scheduler.start()] = self.now + self.duration()
            self.most_outstanding = max(self.most_outstanding, self.scheduler.outstanding)
            if self.step_ends is None and (batch := self.scheduler.take()) is not None:
                self.staleness += [self.scheduler.staleness(number) for number in batch]
                self.sizes.append(len(batch))
                self.fate.update(batch)
                self.step_ends = self.now + self.step_time * self.rng.uniform(0.5, 1.5)
            events = list(self.ends.values())
            if self.step_ends is not None:
                events.append(self.step_ends)
            if not events:
                break
            self.now = min(events)
            for number in [n for n, end in self.ends.items() if end == self.now]:
                del self.ends[number]
                trains = self.rng.random() >= self.drop
                self.scheduler.sampled(number, trains=trains)
                if not trains:
                    self.dropped += 1
                    self.fate[number] += 1
            if self.step_ends == self.now:
                self.step_ends = None
                self.scheduler.trained()


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 6),
    staleness=st.integers(0, 4),
    drop=st.sampled_from([0.0, 0.2, 0.7]),
    tail=st.sampled_from([0.0, 0.1, 0.5]),
    step_time=st.sampled_from([0.01, 1.0, 5.0]),
    rows=st.none() | st.integers(0, 60),
)
def test_no_group_is_trained_beyond_the_bound_and_none_is_lost(
    seed: int,
    groups: int,
    staleness: int,
    drop: float,
    tail: float,
    step_time: float,
    rows: int | None,
) -> None:
    steps = 12
    scheduler = Scheduler(groups, staleness, last_version=steps)
    simulated = Simulated(
        scheduler, rng=random.Random(seed), rows=rows, drop=drop, tail=tail, step_time=step_time
    )

    simulated.run(steps)

    assert max(simulated.staleness, default=0) <= staleness
    assert simulated.most_outstanding <= (staleness + 1) * groups
    assert all(times == 1 for times in simulated.fate.values())
    assert scheduler.outstanding == 0  # all that started were trained or dropped
    started = sum(simulated.sizes) + simulated.dropped
    assert len(simulated.fate) == started
    if rows is None:
        assert scheduler.version == steps
        assert simulated.sizes == [groups] * steps
    else:
        assert started == rows or scheduler.version == steps
        assert all(size == groups for size in simulated.sizes[:-1])


def test_strictly_on_policy_nothing_is_sampled_during_a_step() -> None:
    scheduler = Scheduler(2)
    numbers = [scheduler.start(), scheduler.start()]
    assert not scheduler.may_start()
    for number in numbers:
        scheduler.sampled(number, trains=True)

    assert scheduler.take() == numbers
    assert not scheduler.may_start()

    scheduler.trained()
    assert scheduler.may_start()


def test_a_straggler_is_overtaken_as_long_as_it_is_in_time() -> None:
    scheduler = Scheduler(1, max_staleness=2)
    straggler, second, third = (scheduler.start() for _ in range(3))
    scheduler.sampled(second, trains=True)
    scheduler.sampled(third, trains=True)

    assert scheduler.take() == [second]
    scheduler.trained()
    assert scheduler.take() == [third]
    scheduler.trained()
    fourth = scheduler.start()
    scheduler.sampled(fourth, trains=True)
    assert scheduler.take() is None  # a third step without it would make it too old

    scheduler.sampled(straggler, trains=True)
    assert scheduler.take() == [straggler]
    assert scheduler.staleness(straggler) == 2


def test_waits_are_short_of_the_whole_tail() -> None:
    """One group in ten takes ten times as long: sampling ahead hides most of that."""

    def makespan(staleness: int) -> float:
        simulated = Simulated(
            Scheduler(8, staleness, last_version=40),
            rng=random.Random(5),
            rows=None,
            drop=0.0,
            tail=0.1,
            step_time=0.5,
        )
        simulated.run(40)
        return simulated.now

    assert makespan(0) > 1.5 * makespan(2)


def test_a_last_step_may_be_smaller() -> None:
    scheduler = Scheduler(4)
    number = scheduler.start()
    scheduler.exhausted = True
    assert scheduler.take() is None  # it is still being sampled
    scheduler.sampled(number, trains=True)
    assert scheduler.take() == [number]


@pytest.mark.parametrize(("groups", "staleness"), [(0, 0), (-1, 0), (1, -1)])
def test_bounds_that_make_no_sense_are_refused(groups: int, staleness: int) -> None:
    with pytest.raises(ValueError, match="must"):
        Scheduler(groups, staleness)


def test_calls_out_of_order_are_refused() -> None:
    scheduler = Scheduler(1)
    number = scheduler.start()
    with pytest.raises(ValueError, match="no group may start"):
        scheduler.start()
    with pytest.raises(ValueError, match="no step"):
        scheduler.trained()
    scheduler.sampled(number, trains=False)
    with pytest.raises(ValueError, match="is not sampling"):
        scheduler.sampled(number, trains=True)
