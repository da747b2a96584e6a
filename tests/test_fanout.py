"""n completions of one prompt, without rows, tokenizers or HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._fanout import Group, derive_seeds, sample_group
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import Completion, Failure, SamplingError, SamplingParams
from tests.serving import ScriptedSampler
from tests.waiting import PATIENCE

PARAMS = SamplingParams(model="m")
AT_ONCE = RetryPolicy(base_seconds=0, max_attempts=3)
KINDS = ("refused", "unavailable", "connection", "timeout")
seeds = st.integers(-(2**63), 2**63)
row_ids = st.text(max_size=20)


def of_seed(seed: int | None) -> Completion:
    return Completion(token_ids=[seed or 0, 1], logprobs=[-0.5, -0.5], finish_reason="stop")


def sampler_that(fails: Callable[[int, int], BaseException | None]) -> ScriptedSampler:
    """`fails(seed, attempt)` is what the attempt raises, or None."""
    attempts: dict[int | None, int] = {}

    def script(prompt, params, seed):
        attempts[seed] = attempts.get(seed, 0) + 1
        error = fails(seed, attempts[seed])
        if error is not None:
            raise error
        return of_seed(seed)

    return ScriptedSampler(script)


async def group_of(sampler, count: int, *, retry=AT_ONCE, slots=None, **options) -> Group:
    return await sample_group(
        sampler,
        [1, 2],
        PARAMS,
        seeds=list(range(count)),
        slots=slots or asyncio.Semaphore(3),
        retry=retry,
        **options,
    )


@given(seed=seeds, row=row_ids, n=st.integers(1, 12), run=st.integers(0, 5))
def test_seeds_depend_on_nothing_but_seed_row_index_and_run(seed, row, n, run):
    drawn = derive_seeds(seed, row, n, run=run)
    assert drawn == derive_seeds(seed, row, n, run=run)
    assert derive_seeds(seed, row, n + 3, run=run)[:n] == drawn
    assert len(drawn) == n
    assert all(0 <= one < 2**31 for one in drawn)


def test_seeds_of_different_rows_runs_and_completions_are_unrelated():
    drawn = [
        one
        for seed in range(5)
        for row in ("", "a", "b", "1", "1/1")
        for run in range(3)
        for one in derive_seeds(seed, row, 8, run=run)
    ]
    # 600 draws out of 2^31: a collision by chance has a probability of 8e-5.
    assert len(set(drawn)) == len(drawn) == 600


def test_without_a_seed_there_are_none():
    assert derive_seeds(None, "row", 3) == [None, None, None]


@given(
    fates=st.lists(
        st.none() | st.tuples(st.sampled_from(KINDS), st.integers(1, 5)), min_size=1, max_size=5
    )
)
def test_every_completion_is_a_survivor_or_a_failure_at_its_own_index(fates):
    """A fate: an error, and the number of attempts that meet it. Of five at most, with three
    attempts each: sixteen failures in a row would be an outage, whose probes do not count."""

    def fails(seed, attempt):
        if fates[seed] is None:
            return None
        kind, times = fates[seed]
        return SamplingError(f"{seed}/{attempt}", kind=kind) if attempt <= times else None

    group = asyncio.run(group_of(sampler_that(fails), len(fates)))
    assert [s.index for s in group.survivors] == sorted(s.index for s in group.survivors)
    assert [f.index for f in group.failures] == sorted(f.index for f in group.failures)
    for survivor in group.survivors:
        assert survivor.seed == survivor.index
        assert survivor.completion == of_seed(survivor.index)
    ended = {s.index: ("survivor", s.attempts) for s in group.survivors}
    ended |= {f.index: (f.kind, f.attempts) for f in group.failures}
    for index, fate in enumerate(fates):
        if fate is None:
            expected = ("survivor", 1)
        elif fate[0] == "refused":
            expected = ("refused", 1)
        elif fate[1] >= AT_ONCE.max_attempts:
            expected = (fate[0], 3)
        else:
            expected = ("survivor", fate[1] + 1)
        assert ended[index] == expected
    assert len(ended) == len(fates)


async def test_a_failure_tells_of_the_last_attempt():
    def fails(seed, attempt):
        if attempt < 3:
            return SamplingError("reset", kind="connection")
        return SamplingError("busy", kind="unavailable", status=503)

    group = await group_of(sampler_that(fails), 1)
    [failure] = group.failures
    assert failure == Failure(
        index=0,
        kind="unavailable",
        message="busy (3 attempts (2x connection, 1x unavailable 503))",
        attempts=3,
        seconds=failure.seconds,
        seed=0,
        status=503,
    )
    assert failure.seconds >= 0


async def test_a_slot_is_held_for_attempts_and_not_for_pauses():
    class Slots:
        held = peak = 0

        async def __aenter__(self):
            self.held += 1
            self.peak = max(self.peak, self.held)

        async def __aexit__(self, *exc):
            self.held -= 1

    slots = Slots()
    pausing = asyncio.Event()

    def fails(seed, attempt):
        pausing.set()
        return SamplingError("busy", kind="unavailable", retry_after=30) if attempt == 1 else None

    task = asyncio.create_task(group_of(sampler_that(fails), 1, slots=slots))
    await pausing.wait()
    await asyncio.sleep(0.01)
    assert (slots.held, slots.peak) == (0, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_each_completion_tells_once_that_it_has_started():
    started = []
    sampler = sampler_that(
        lambda seed, attempt: SamplingError("x", kind="connection") if attempt < 3 else None
    )
    group = await group_of(sampler, 4, on_start=lambda: started.append(1))
    assert len(group.survivors) == 4
    assert len(sampler.asked) == 12
    assert len(started) == 4


async def test_an_error_that_is_none_of_ours_is_raised_as_it_is_and_ends_the_siblings():
    bug = ZeroDivisionError("bug")
    sampler = sampler_that(lambda seed, attempt: bug)
    sampler.held = lambda seed: seed < 2
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError) as raised:
        await group_of(sampler, 3)
    assert raised.value is bug
    assert asyncio.all_tasks() == before
    assert all(sampler.cancelled.acquire(timeout=PATIENCE) for _ in range(2))


async def test_cancelling_a_group_cancels_and_awaits_every_attempt():
    sampler = sampler_that(lambda seed, attempt: None)
    sampler.held = lambda seed: True
    slots = asyncio.Semaphore(2)
    before = asyncio.all_tasks()
    task = asyncio.create_task(group_of(sampler, 5, slots=slots))
    assert await asyncio.to_thread(sampler.waiting.acquire, timeout=PATIENCE)
    assert await asyncio.to_thread(sampler.waiting.acquire, timeout=PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    assert len(sampler.asked) == 2
    assert not slots.locked()


async def test_a_group_of_none_is_empty():
    assert await group_of(sampler_that(lambda seed, attempt: None), 0) == Group([], [])
