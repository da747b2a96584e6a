"""The hostile server does what each fault's name says, and `HttpSampler` answers rightly."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._types import Completion, SamplingError, SamplingParams, TokenIds
from tests.hostile.exchange import Request
from tests.hostile.faults import FAULTS, Fault, Mode
from tests.hostile.plan import FaultPlan, Scripted
from tests.hostile.replies import Dialect, Truth, truth_of
from tests.hostile.server import HostileServer
from tests.waiting import PATIENCE, until

PROMPT = TokenIds([1, 2, 3, 151644])
SEED = 5
LONGEST_ERROR = 800
"""Characters that a person is told of one failure."""
BOUND = 1 << 26
"""Bytes of one reply that a bounded client may take at the very most."""


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"model": "m", "max_tokens": 64, "timeout": PATIENCE, **changes})


def exact(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.logprobs, completion.finish_reason


def exact_truth(truth: Truth) -> tuple[Any, ...]:
    return list(truth.token_ids), list(truth.logprobs), truth.finish_reason


@asynccontextmanager
async def sampler_of(server: HostileServer) -> AsyncIterator[HttpSampler]:
    sampler = HttpSampler(Endpoint(f"{server.url}/v1"))
    try:
        yield sampler
    finally:
        await sampler.aclose()


async def outcome_of(work: Awaitable[Completion]) -> Completion | SamplingError:
    try:
        return await work
    except SamplingError as error:
        return error


def every_fault() -> Iterator[Any]:
    for name, fault in FAULTS.items():
        for mode in fault.modes:
            for dialect in fault.dialects:
                yield pytest.param(name, mode, dialect, id=f"{name}-{mode}-{dialect}")


@dataclasses.dataclass(slots=True)
class OfOneSeed:
    """A fault that strikes every request of `SEED` (or every connection), until it is over: a
    request that its client gave up may be read long afterwards, on a busy machine, and then the
    first that arrives is not the one that is looked at."""

    fault: Fault
    over: bool = False

    def of_request(self, request: Request, dialect: Dialect) -> Fault | None:
        if self.fault.at_accept or request.seed != SEED:
            return None
        assert self.fault.strikes(request, dialect), f"{self.fault.name} cannot strike this request"
        return self.fault

    def of_connection(self, number: int) -> Fault | None:
        return self.fault if self.fault.at_accept and not self.over else None


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[Dialect, HostileServer]]:
    """One of each dialect: starting one for every fault would be most of the time."""
    with HostileServer(dialect="fireworks") as fireworks, HostileServer(dialect="vllm") as vllm:
        yield {"fireworks": fireworks, "vllm": vllm}


@pytest.mark.parametrize(("name", "mode", "dialect"), list(every_fault()))
async def test_a_fault_is_the_right_failure_and_leaves_the_next_request_alone(
    servers: dict[Dialect, HostileServer], name: str, mode: Mode, dialect: Dialect
) -> None:
    fault, server = FAULTS[name], servers[dialect]
    plan = OfOneSeed(fault)
    server.begin(plan)
    # Little time where the server is known never to end.
    asked = params(stream=mode == "stream", timeout=0.1 if "timeout" in fault.sees else PATIENCE)
    async with sampler_of(server) as sampler:
        outcome = await outcome_of(sampler.sample(PROMPT, asked, seed=SEED))
        while "timeout" in fault.sees and not await was_read(server):
            asked = dataclasses.replace(asked, timeout=4 * asked.timeout)
            outcome = await outcome_of(sampler.sample(PROMPT, asked, seed=SEED))
        if isinstance(outcome, Completion):
            assert "accept" in fault.sees, f"accepted in spite of {name}"
            assert exact(outcome) == exact_truth(truth_of(PROMPT, SEED, 64))
            assert (outcome.request_id or "").encode()  # what is no UTF-8 costs its characters
        else:
            assert len(str(outcome)) < LONGEST_ERROR, str(outcome)
            assert str(outcome).isprintable(), repr(str(outcome))
            assert outcome.kind in fault.sees, f"{outcome.kind}: {outcome}"
            assert re.search(fault.says, str(outcome), re.IGNORECASE), str(outcome)
        await until(lambda: server.ledger[0].done)
        await asyncio.sleep(0.002)  # what else it said arrives
        plan.over = True
        after = await outcome_of(sampler.sample(PROMPT, params(), seed=SEED + 2))
        assert isinstance(after, Completion), after
        assert exact(after) == exact_truth(truth_of(PROMPT, SEED + 2, 64))
    await until(lambda: server.open_connections == 0)
    *struck, second = server.ledger
    assert [entry.fault for entry in server.ledger] == [*[name] * len(struck), ""]
    assert len(struck) == 1 or "timeout" in fault.sees
    assert (all(entry.whole for entry in struck), second.whole) == (fault.harmless, True)
    assert all(entry.sent < BOUND for entry in struck)


async def was_read(server: HostileServer) -> bool:
    """Whether a request that timed out had reached the server: on a busy machine it need not."""
    await until(lambda: bool(server.ledger) or not server.open_connections)
    return bool(server.ledger)


async def test_an_honest_server_serves_many_requests_over_one_connection() -> None:
    with HostileServer() as server:
        async with sampler_of(server) as sampler:
            for seed in range(20):
                for stream in (False, True):
                    got = await sampler.sample(PROMPT, params(stream=stream), seed=seed)
                    assert exact(got) == exact_truth(truth_of(PROMPT, seed, 64))
            await until(lambda: server.ledger[-1].done)
        assert server.connections_made == 1
        assert all(entry.whole and not entry.fault for entry in server.ledger)
        told = [(entry.request.seed, entry.request.attempt) for entry in server.ledger]
        assert told == [(seed, attempt) for seed in range(20) for attempt in (1, 2)]


async def test_without_a_seed_every_request_draws_anew_and_the_ledger_knows_what() -> None:
    with HostileServer() as server:
        async with sampler_of(server) as sampler:
            got = [await sampler.sample(PROMPT, params()) for _ in range(3)]
        truths = [server.truth(entry.request) for entry in server.ledger]
    assert [exact(one) for one in got] == [exact_truth(truth) for truth in truths]
    assert len({truth.token_ids for truth in truths}) == 3


async def test_a_dead_server_refuses_and_comes_back_on_its_port() -> None:
    with HostileServer(plan=Scripted(["stall_before_reply"])) as server:
        async with sampler_of(server) as sampler:
            waiting = asyncio.ensure_future(sampler.sample(PROMPT, params(), seed=1))
            await until(lambda: bool(server.ledger))
            await asyncio.to_thread(server.die)
            ends = [await outcome_of(waiting)]
            ends.append(await outcome_of(sampler.sample(PROMPT, params(), seed=2)))
            await asyncio.to_thread(server.rise)
            after = await sampler.sample(PROMPT, params(), seed=3)
        told = [(entry.request.seed, entry.cut) for entry in server.ledger]
    assert [end.kind for end in ends] == ["connection", "connection"]
    assert "Cannot connect" in str(ends[1])
    assert exact(after) == exact_truth(truth_of(PROMPT, 3, 64))
    assert told == [(1, True), (3, False)]


def requests(count: int) -> list[Request]:
    return [
        Request(
            connection=0,
            body={"stream": number % 2},
            headers={},
            prompt=(1, number // 3),
            seed=number,
            attempt=1 + number % 4,
        )
        for number in range(count)
    ]


def test_a_plan_draws_by_what_is_asked_and_not_by_when() -> None:
    asked = requests(400)
    plan = FaultPlan(seed=3, share=0.5)
    drawn = {number: plan.of_request(one, "vllm") for number, one in enumerate(asked)}
    again = FaultPlan(seed=3, share=0.5)
    assert {n: again.of_request(asked[n], "vllm") for n in reversed(range(400))} == drawn
    other = FaultPlan(seed=4, share=0.5)
    assert [other.of_request(one, "vllm") for one in asked] != list(drawn.values())
    struck = [fault for fault in drawn.values() if fault is not None]
    assert 150 < len(struck) < 250  # of 400 at one half: five standard deviations
    assert not any(fault.costly or fault.at_accept for fault in struck)
    assert all(fault.strikes(asked[n], "vllm") for n, fault in drawn.items() if fault)


def test_weights_leave_faults_out_or_draw_nothing_else() -> None:
    one = "gzip_bomb"
    only = FaultPlan(seed=1, share=1.0, weights=dict.fromkeys(FAULTS, 0.0) | {one: 2.0})
    assert {only.of_request(asked, "vllm").name for asked in requests(20)} == {one}
    with pytest.raises(AssertionError, match="no such fault"):
        FaultPlan(seed=1, weights={"gzip_bom": 1.0})


async def test_a_wait_until_a_date_counts_from_the_servers_own_clock(
    servers: dict[Dialect, HostileServer],
) -> None:
    server = servers["fireworks"]
    server.begin(Scripted(["retry_after_of_a_fast_clock"]))
    async with sampler_of(server) as sampler:
        outcome = await outcome_of(sampler.sample(PROMPT, params(), seed=SEED))
    assert isinstance(outcome, SamplingError)
    assert outcome.retry_after == 1.0
