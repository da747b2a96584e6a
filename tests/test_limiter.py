"""What all requests of a run go through: who waits, who is woken, and when the run stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from eval_protocol_rft.sampling._limiter import RunLimiter
from eval_protocol_rft.sampling._limits import FixedLimit, RunStoppedError
from eval_protocol_rft.sampling._types import Completion, RefusedError, SamplingError
from tests.rollouts import config_of, params_for, row_of
from tests.stub_server import Status
from tests.waiting import PATIENCE

NO_SLOTS = contextlib.nullcontext()
DONE = Completion(token_ids=[1], logprobs=[-0.5], finish_reason="stop")


async def request(
    limiter: RunLimiter, seconds: float = 0.0, *, error: Exception | None = None
) -> int:
    async with limiter.turn(NO_SLOTS, retry=False, prompt=None) as turn:
        peak = limiter.limits.in_flight
        await asyncio.sleep(seconds)
        if error is None:
            turn.succeeded(DONE)
        else:
            turn.failed(error)
    return peak


async def test_the_limit_is_reached_and_never_exceeded():
    limiter = RunLimiter(limit=FixedLimit(3))
    peaks = await asyncio.gather(*(request(limiter, 0.001) for _ in range(50)))
    assert max(peaks) == 3
    assert limiter.limits.in_flight == 0


async def test_those_who_wait_are_woken_although_the_first_of_them_was_cancelled():
    limiter = RunLimiter(limit=FixedLimit(1))
    running = asyncio.create_task(request(limiter, 0.01))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(request(limiter)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(running, *waiting[1:])


async def test_a_request_that_was_cancelled_leaves_its_place():
    limiter = RunLimiter(limit=FixedLimit(1))
    stuck = asyncio.create_task(request(limiter, 1000))
    await asyncio.sleep(0)
    stuck.cancel()
    async with asyncio.timeout(PATIENCE):
        await request(limiter)
    assert limiter.limits.in_flight == 0


async def test_a_wrong_key_stops_the_run_for_all_who_wait():
    limiter = RunLimiter(limit=FixedLimit(1))
    wrong = RefusedError("HTTP 401: bad key", status=401)
    outcomes = await asyncio.gather(
        *(request(limiter, error=wrong) for _ in range(30)), return_exceptions=True
    )
    stopped = [outcome for outcome in outcomes if isinstance(outcome, RunStoppedError)]
    assert len(outcomes) - len(stopped) == 8
    assert "HTTP 401: bad key" in str(stopped[0])


async def test_while_the_server_is_away_nearly_nobody_asks_and_the_user_is_told(caplog):
    limiter = RunLimiter(limit=FixedLimit(100))
    busy = SamplingError("HTTP 503: scaling up", kind="unavailable", status=503)
    await asyncio.gather(*(request(limiter, error=busy) for _ in range(16)))
    assert "the server is away" in caplog.text
    asked = [asyncio.create_task(request(limiter)) for _ in range(20)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in asked)
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert "the server is back" in caplog.text
    for task in asked:
        task.cancel()


async def test_what_is_wrong_for_all_completions_is_one_warning(server, processor, caplog):
    caplog.set_level(logging.INFO, logger="eval_protocol_rft.attempts")
    server.script = lambda seen: Status(400, {"error": f"request {seen.place} has no such model"})
    rows = [row_of(f"question {i}") for i in range(4)]
    await asyncio.gather(
        *processor(rows, config_of(params_for(server, n=3))), return_exceptions=True
    )
    await processor.acleanup()
    attempts = [one for one in caplog.records if one.name == "eval_protocol_rft.attempts"]
    assert len(attempts) == len(server.requests) > 1
    [warning] = [one for one in attempts if one.levelno >= logging.WARNING]
    assert "has no such model" in warning.getMessage()


async def test_rows_that_come_after_a_wrong_key_was_found_ask_nothing(server, processor):
    server.script = lambda seen: Status(401, {"error": "bad key"})
    rows = [row_of(f"question {i}") for i in range(12)]
    outcomes = await asyncio.gather(
        *processor(rows, config_of(params_for(server, n=2), slots=2)), return_exceptions=True
    )
    await processor.acleanup()
    assert len(server.requests) <= 10
    stopped = [outcome for outcome in outcomes if isinstance(outcome, RunStoppedError)]
    assert "bad key" in str(stopped[-1])
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)
