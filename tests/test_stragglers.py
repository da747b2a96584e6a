"""Groups that do not wait for their slowest: over-sampling and the straggler deadline."""

from __future__ import annotations

import asyncio
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RetryPolicy
from eval_protocol_rft.loop._rollout_fn import RolloutFnError, make_group_rollout_fn
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.rollout._processor import RolloutError
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._fanout import Group, StragglerPolicy, derive_seeds, sample_group
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._limiter import RunLimiter
from eval_protocol_rft.sampling._types import (
    Completion,
    RefusedError,
    SamplingError,
    SamplingParams,
)
from eval_protocol_rft.training._batch import build_batch, iter_batches
from eval_protocol_rft.training._prompt_groups import group_rows, iter_groups
from eval_protocol_rft.training._types import BiasedSamplingWarning, TrainingDataError
from tests.rollouts import (
    assert_is_what_the_server_sampled,
    chat_tokenizer,
    params_for,
    record_of_row,
    roll_out,
    row_of,
)
from tests.stub_server import Hang, Late, Seen, Status, sampled
from tests.training_rows import scored
from tests.waiting import PATIENCE

PARAMS = SamplingParams(model="m", max_tokens=32)
QUICK = RetryPolicy(base_seconds=0, max_attempts=3)
NEVER = 3600.0


@dataclass(frozen=True)
class Fate:
    """What becomes of the completion with a given seed."""

    seconds: float = 0.0
    error: Callable[[str], Exception] | None = None
    stubborn: bool = False
    """Takes cancellation for the end of its time: answers, or fails."""


@dataclass
class FatedSampler:
    """Ends each completion as its fate says; seeds are places in `fates`."""

    fates: list[Fate]
    ended: list[int] = field(default_factory=list)
    """Seeds of the completions that were returned, in order."""
    cancelled: list[int] = field(default_factory=list)
    in_flight: int = 0

    async def sample(self, prompt_ids, params, *, seed=None) -> Completion:
        fate = self.fates[seed]
        self.in_flight += 1
        try:
            await asyncio.sleep(fate.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(seed)
            if not fate.stubborn:
                raise
        finally:
            self.in_flight -= 1
        if fate.error is not None:
            raise fate.error(f"fate of {seed}")
        self.ended.append(seed)
        return Completion(token_ids=[seed], logprobs=[-0.5], finish_reason="stop")

    async def aclose(self) -> None: ...


async def group_of(sampler, asked: int, *, slots=None, retry=QUICK, **options) -> Group:
    stragglers = {name: options.pop(name) for name in StragglerPolicy.__slots__ if name in options}
    return await sample_group(
        sampler,
        [1, 2],
        PARAMS,
        seeds=list(range(asked)),
        slots=slots or asyncio.Semaphore(asked or 1),
        retry=retry,
        stragglers=StragglerPolicy(**stragglers),
        **options,
    )


def places(group: Group) -> tuple[list[int], list[int], list[int]]:
    """Indices of survivors, failures and surplus."""
    return (
        [survivor.index for survivor in group.survivors],
        [failure.index for failure in group.failures],
        group.cancelled,
    )


delays = st.sampled_from([0.0, 0.001, 0.002, 0.004, NEVER])
unavailable = functools.partial(SamplingError, kind="unavailable")
errors = st.sampled_from([None, None, RefusedError, unavailable])
fates = st.builds(Fate, delays, errors, st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    fates=st.lists(fates, min_size=1, max_size=9),
    surplus=st.integers(0, 4),
    slots=st.integers(1, 9),
)
def test_every_one_that_was_asked_for_is_a_survivor_a_failure_or_surplus(fates, surplus, slots):
    surplus = min(surplus, len(fates) - 1)
    n = len(fates) - surplus
    sampler = FatedSampler(fates)

    async def run() -> Group:
        before = asyncio.all_tasks()
        bound, limiter = asyncio.Semaphore(slots), RunLimiter()
        group = await group_of(
            sampler,
            len(fates),
            slots=bound,
            limiter=limiter,
            over_sample=surplus,
            straggler_seconds=0.02,
        )
        assert asyncio.all_tasks() == before
        assert sampler.in_flight == limiter.limits.in_flight == 0
        # All slots are free again.
        for _ in range(slots):
            await asyncio.wait_for(bound.acquire(), PATIENCE)
        return group

    group = asyncio.run(run())
    survivors, failures, cancelled = places(group)
    assert all(part == sorted(part) for part in (survivors, failures, cancelled))
    assert sorted(survivors + failures + cancelled) == list(range(len(fates)))
    assert len(survivors) <= n
    # Nobody is surplus before n have survived, and a straggler of a group that has n is surplus.
    stragglers = [f.index for f in group.failures if f.kind == "cancelled"]
    if len(survivors) == n:
        assert not stragglers
    else:
        assert not cancelled
    assert set(survivors) == set(sampler.ended[: len(survivors)])
    for survivor in group.survivors:
        assert survivor.completion.token_ids == [survivor.seed] == [survivor.index]
    for failure in group.failures:
        assert failure.seed == failure.index
        own = fates[failure.index].error
        assert failure.kind == "cancelled" or (own is not None and failure.kind == own("").kind)
    if all(fate.seconds < NEVER and fate.error is None for fate in fates) and slots == len(fates):
        # Not one fails, and none has to wait: the deadline of 20 ms is only met by a stalled host.
        assert len(survivors) == n or stragglers


async def test_the_first_n_are_kept_and_the_rest_is_not_waited_for():
    sampler = FatedSampler([Fate(NEVER), Fate(0.03), Fate(0), Fate(NEVER), Fate(0.01)])
    group = await asyncio.wait_for(group_of(sampler, 5, over_sample=2), PATIENCE)
    assert places(group) == ([1, 2, 4], [], [0, 3])
    assert [survivor.seed for survivor in group.survivors] == [1, 2, 4]
    assert sorted(sampler.cancelled) == [0, 3]


async def test_surplus_that_ends_in_the_same_instant_is_surplus():
    group = await group_of(FatedSampler([Fate()] * 5), 5, over_sample=3)
    assert places(group) == ([0, 1], [], [2, 3, 4])
    stubborn = [Fate(), Fate(NEVER, stubborn=True), Fate(NEVER, unavailable, stubborn=True)]
    sampler = FatedSampler(stubborn)
    group = await asyncio.wait_for(group_of(sampler, 3, over_sample=2), PATIENCE)
    assert places(group) == ([0], [], [1, 2])
    # No further attempt is made for one that was cancelled.
    assert sampler.cancelled == [1, 2]


async def test_surplus_makes_up_for_completions_that_fail_for_good():
    lost = Fate(error=RefusedError)
    group = await group_of(FatedSampler([lost, Fate(), lost, Fate()]), 4, over_sample=2)
    assert places(group) == ([1, 3], [0, 2], [])
    group = await group_of(FatedSampler([lost, Fate(), lost, lost]), 4, over_sample=2)
    assert places(group) == ([1], [0, 2, 3], [])


async def test_surplus_that_waits_for_a_slot_asks_nothing():
    sampler = FatedSampler([Fate(), Fate(), Fate()])
    group = await group_of(sampler, 3, over_sample=2, slots=asyncio.Semaphore(1))
    assert places(group) == ([0], [], [1, 2])
    assert sampler.ended == [0]
    assert sampler.cancelled == []


async def test_the_deadline_keeps_the_survivors_and_says_what_became_of_the_others():
    sampler = FatedSampler([Fate(), Fate(NEVER), Fate(), Fate(NEVER)])
    group = await group_of(sampler, 4, straggler_seconds=0.05, slots=asyncio.Semaphore(3))
    # Index 3 got the slot of 0 or 2.
    assert places(group) == ([0, 2], [1, 3], [])
    for failure in group.failures:
        assert (failure.kind, failure.attempts, failure.status) == ("cancelled", 1, None)
        assert failure.seed == failure.index
        assert 0 < failure.seconds < NEVER
        assert failure.message == (
            "cancelled straggler_seconds=0.05 after the group's first request, with no reply yet"
        )


async def test_a_straggler_tells_of_its_attempts():
    class Away(FatedSampler):
        async def sample(self, prompt_ids, params, *, seed=None):
            if seed == 1:
                raise SamplingError("busy", kind="unavailable", status=503, retry_after=NEVER / 10)
            return await super().sample(prompt_ids, params, seed=seed)

    sampler = Away([Fate(NEVER)] * 3)
    retry = RetryPolicy(base_seconds=0, retry_after_cap_seconds=NEVER, max_seconds=NEVER)
    slots = asyncio.Semaphore(2)
    # The pause of 1 lets 2 have its slot; 0 holds the other one, so 3 never gets one.
    sampler.fates.append(Fate(NEVER))
    group = await group_of(sampler, 4, straggler_seconds=0.05, slots=slots, retry=retry)
    assert places(group) == ([], [0, 1, 2, 3], [])
    told = [(f.attempts, f.status, f.message.split(", ", 1)[1]) for f in group.failures]
    assert told == [
        (1, None, "with no reply yet"),
        (1, 503, "not done after 1 attempt (1x unavailable 503)"),
        (1, None, "with no reply yet"),
        (0, None, "still waiting for its first slot"),
    ]
    assert group.failures[3].seconds == 0


async def test_the_deadline_counts_from_the_first_slot_and_not_from_the_call():
    slots = asyncio.Semaphore(1)
    await slots.acquire()
    sampler = FatedSampler([Fate()])
    task = asyncio.create_task(group_of(sampler, 1, straggler_seconds=0.3, slots=slots))
    await asyncio.sleep(0.4)
    slots.release()
    assert places(await task) == ([0], [], [])


async def test_a_group_that_is_done_does_not_meet_its_deadline():
    sampler = FatedSampler([Fate(), Fate(NEVER)])
    group = await group_of(sampler, 2, over_sample=1, straggler_seconds=0.02)
    await asyncio.sleep(0.05)
    assert places(group) == ([0], [], [1])


async def test_cancelling_the_group_leaves_no_task_and_no_request():
    sampler = FatedSampler([Fate(NEVER)] * 4)
    before = asyncio.all_tasks()
    task = asyncio.create_task(group_of(sampler, 4, over_sample=2, straggler_seconds=NEVER))
    await asyncio.sleep(0.02)
    assert sampler.in_flight == 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    assert sampler.in_flight == 0
    assert sorted(sampler.cancelled) == [0, 1, 2, 3]


@pytest.mark.parametrize("bug", [ZeroDivisionError, KeyError])
async def test_a_bug_is_raised_whatever_the_straggler_policy(bug):
    sampler = FatedSampler([Fate(NEVER), Fate(0, bug), Fate(NEVER)])
    with pytest.raises(bug):
        await group_of(sampler, 3, over_sample=1, straggler_seconds=NEVER)
    assert sampler.in_flight == 0


async def test_causes_of_the_attempts_before_the_successful_one_are_kept():
    errors = {
        1: [SamplingError("x", kind="unavailable", status=503), SamplingError("x", kind="timeout")],
        2: [],
    }

    class Flaky(FatedSampler):
        async def sample(self, prompt_ids, params, *, seed=None):
            if errors.get(seed):
                raise errors[seed].pop(0)
            return await super().sample(prompt_ids, params, seed=seed)

    group = await group_of(Flaky([Fate()] * 3), 3)
    assert [survivor.causes for survivor in group.survivors] == [
        (),
        ("unavailable 503", "timeout"),
        (),
    ]
    assert [survivor.attempts for survivor in group.survivors] == [1, 3, 1]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "2", None])
def test_over_sample_is_a_count(wrong):
    with pytest.raises(ValueError, match="over_sample must be a whole number"):
        FireworksTrainingRolloutProcessor(over_sample=wrong)


@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, math.nan, True, "60"])
def test_the_deadline_is_a_time(wrong):
    with pytest.raises(ValueError, match="straggler_seconds must be a finite number"):
        FireworksTrainingRolloutProcessor(straggler_seconds=wrong)


async def test_seeds_for_the_surplus_alone_are_refused():
    with pytest.raises(ValueError, match="2 seeds with over_sample=2 leave no completion"):
        await group_of(FatedSampler([Fate()] * 2), 2, over_sample=2)
    assert await group_of(FatedSampler([]), 0, straggler_seconds=1) == Group([], [])


# Over real HTTP.


def processor_with(**options) -> FireworksTrainingRolloutProcessor:
    return FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), retry=RetryPolicy(base_seconds=0.01, max_attempts=3), **options
    )


def slow_seeds(*seeds: int | None) -> Callable[[Seen], Hang | None]:
    return lambda seen: Hang() if seen.seed in seeds else None


async def test_the_server_sees_at_once_that_surplus_is_cancelled(server):
    server.script = lambda seen: Hang() if seen.seed in (0, 3) else Late(0.1)
    sampler = HttpSampler(Endpoint(base_url=f"{server.url}/v1"))
    try:
        group = await sample_group(
            sampler,
            [1, 2, 3],
            PARAMS,
            seeds=[0, 1, 2, 3],
            slots=asyncio.Semaphore(4),
            retry=QUICK,
            stragglers=StragglerPolicy(over_sample=2),
        )
        assert places(group) == ([1, 2], [], [0, 3])
        for survivor in group.survivors:
            ids, logprobs = sampled([1, 2, 3], survivor.seed, 32)
            assert survivor.completion.token_ids == ids
            assert survivor.completion.logprobs == logprobs
        # With the client still open: it is the cancelled request that closes its connection.
        await server.until(lambda: Counter(server.outcomes())["disconnected"] == 2)
        ends = {seen.seed: seen.outcome for seen in server.requests}
        assert ends == {0: "disconnected", 1: "answered", 2: "answered", 3: "disconnected"}
    finally:
        await sampler.aclose()


async def test_the_record_of_an_over_sampled_row_says_so(server):
    seeds = derive_seeds(20, "row-1", 5)
    server.script = slow_seeds(seeds[0], seeds[3])
    [row] = await roll_out(
        processor_with(over_sample=2), row_of(), params_for(server, n=3), slots=5
    )
    record = record_of_row(row)
    sampling = record.sampling
    assert (sampling.n, sampling.over_sample, sampling.cancelled) == (3, 2, [0, 3])
    assert sampling.straggler_seconds is None
    assert sampling.indices == [1, 2, 4]
    assert sampling.seeds == [seeds[1], seeds[2], seeds[4]]
    assert record.failures == []
    assert_is_what_the_server_sampled(record)
    assert record.token_turn_traces[0]["completion_ids"] == record.completion_ids[0]
    await server.until(lambda: Counter(server.outcomes())["disconnected"] == 2)


async def test_rows_behind_an_over_sampled_one_are_rolled_out(server):
    """More rows than are prepared ahead, fewer slots than a row has completions."""
    rows = [row_of(f"q{i}", row_id=f"row-{i}") for i in range(20)]
    done = await roll_out(processor_with(over_sample=3), rows, params_for(server, n=2), slots=3)
    for row in done:
        record = record_of_row(row)
        assert len(record) == 2
        assert sorted(record.sampling.indices + record.sampling.cancelled) == list(range(5))
        assert_is_what_the_server_sampled(record)


async def test_the_deadline_leaves_a_partial_group_on_the_row(server):
    seeds = derive_seeds(20, "row-1", 4)
    server.script = slow_seeds(seeds[2])
    [row] = await roll_out(processor_with(straggler_seconds=1.0), row_of(), params_for(server, n=4))
    record = record_of_row(row)
    assert record.sampling.indices == [0, 1, 3]
    assert (record.sampling.straggler_seconds, record.sampling.cancelled) == (1.0, [])
    [failure] = record.failures
    assert (failure.index, failure.kind, failure.seed) == (2, "cancelled", seeds[2])
    assert "straggler_seconds=1" in failure.message
    await server.until(lambda: "disconnected" in server.outcomes())


async def test_too_few_at_the_deadline_fail_the_row(server):
    server.script = lambda seen: Hang()
    row = row_of()
    before = row.model_dump()
    with pytest.raises(RolloutError, match=r"0 of 2 completions survived, 1 are needed") as raised:
        await roll_out(processor_with(straggler_seconds=0.1), row, params_for(server, n=2))
    assert [failure.kind for failure in raised.value.failures] == ["cancelled", "cancelled"]
    after = row.model_dump()
    assert (after["messages"], after["execution_metadata"]) == (
        before["messages"],
        before["execution_metadata"],
    )


async def test_the_record_tells_why_completions_were_retried(server):
    seeds = derive_seeds(20, "row-1", 2)
    busy = Status(503, {"error": {"message": "overloaded"}})
    server.script = lambda seen: busy if seen.seed == seeds[1] and seen.attempt < 3 else None
    [row] = await roll_out(processor_with(), row_of(), params_for(server, n=2))
    sampling = record_of_row(row).sampling
    assert sampling.attempts == [1, 3]
    assert sampling.retry_causes == [[], ["unavailable 503", "unavailable 503"]]
    server.script = lambda seen: None
    [row] = await roll_out(processor_with(), row_of(), params_for(server, n=2))
    assert record_of_row(row).sampling.retry_causes == []


async def test_records_from_before_these_fields_still_read(server):
    [row] = await roll_out(processor_with(), row_of(), params_for(server, n=2))
    extra = row.execution_metadata.extra
    new = ("over_sample", "cancelled", "straggler_seconds", "retry_causes")
    old = {k: v for k, v in extra["sampling"].items() if k not in new}
    assert len(old) == len(extra["sampling"]) - len(new)
    assert RolloutRecord.from_extra({**extra, "sampling": old}) == record_of_row(row)
    wrong = {**extra, "sampling": {**old, "retry_causes": [["timeout"]]}}
    with pytest.raises(RecordError, match=r"sampling.retry_causes has 1 entries, not 2 or none"):
        RolloutRecord.from_extra(wrong)


# From rows to datums.


def late(index: int) -> dict:
    return {
        "index": index,
        "kind": "cancelled",
        "message": "-",
        "attempts": 1,
        "seconds": 1.0,
    }


def cut_off_row(row_id: str, **sampling) -> dict:
    """Two completions, wanted alone; the others as `sampling` says."""
    return scored(row_id, 1.0, 0.0, n=2, **sampling)


def with_straggler(row_id: str) -> dict:
    made = scored(row_id, 1.0, 0.0, n=3, straggler_seconds=60.0)
    made["execution_metadata"]["extra"]["failures"] = [late(2)]
    return made


@pytest.mark.parametrize(
    ("row", "cut_off"),
    [
        (cut_off_row("odd", over_sample=3, cancelled=[2, 3, 4]), 3),
        (with_straggler("odd"), 1),
    ],
)
def test_building_datums_warns_once_where_slow_completions_were_cancelled(row, cut_off):
    rows = [scored("fine", 1.0, 0.0), row, {**row, "input_metadata": {"row_id": "odd-2"}}]
    message = (
        r"in 2 of 3 groups slow completions were cancelled, which favours short ones; the first "
        rf"is group \('exp', 'odd', 'm'\), with {cut_off} cancelled and 2 kept"
    )
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        build_batch(rows)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        next(iter_batches(rows, max_groups=3))
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(TrainingDataError, match=message):
        build_batch(rows, biased_sampling="refuse")


def test_over_sampling_that_cancelled_nothing_is_no_bias():
    rows = [cut_off_row("a", over_sample=1), scored("b", 1.0, 0.0, straggler_seconds=60.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_batch(rows, biased_sampling="refuse")


def test_surplus_does_not_complete_a_group():
    """Completions per group are those wanted, as where nothing is over-sampled."""
    row = cut_off_row("a", over_sample=2, cancelled=[2, 3])
    other = cut_off_row("b", over_sample=2, cancelled=[0, 1])
    groups = list(iter_groups([row, other, row, other], completions_per_group=4))
    assert [(len(group), group.cancelled) for group in groups] == [(4, 4), (4, 4)]
    assert [group.cut_off for group in group_rows([row, with_straggler("c")])] == [2, 1]


def longest(rows):
    """A groupwise evaluator: more text is better."""
    from eval_protocol.models import EvaluateResult

    for row in rows:
        length = len(row.messages[-1].content)
        row.evaluation_result = EvaluateResult(score=float(length), is_score_valid=True)
    return rows


async def test_a_rollout_function_takes_failures_that_were_made_up_for_as_none(server):
    seeds = derive_seeds(20, "row-1", 3)
    refused = Status(400, {"error": {"message": "no"}})
    server.script = lambda seen: refused if seen.seed == seeds[0] else None
    params = params_for(server, n=2)
    with pytest.warns(BiasedSamplingWarning, match="cancels slow completions") as caught:
        rollout_fn = make_group_rollout_fn(
            longest, processor=processor_with(over_sample=1), completion_params=params
        )
    assert caught[0].filename == __file__
    try:
        rollout = await rollout_fn(row_of())
        assert len(rollout["runs"]) == 2
    finally:
        await rollout_fn.aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_fn = make_group_rollout_fn(
            longest, processor=processor_with(), completion_params=params
        )
    try:
        with pytest.raises(RolloutFnError, match="completion 0: refused"):
            await rollout_fn(row_of())
    finally:
        await rollout_fn.aclose()
