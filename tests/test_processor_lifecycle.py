"""How many requests are in flight, and what is left when a loop or a test ends."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from tests.rollouts import (
    chat_tokenizer,
    config_of,
    params_for,
    record_of_row,
    roll_out,
    row_of,
    text_of,
)
from tests.stub_server import Hang, Held, Status
from tests.waiting import PATIENCE


def rows_of(count: int) -> list:
    return [row_of(f"row {i}", row_id=str(i)) for i in range(count)]


async def peak_of(server, processor, rows, *, n: int, slots: int) -> int:
    """The most requests in flight, where none is answered before as many are as may be."""
    let_go = threading.Event()
    server.script = lambda seen: Held(let_go)
    done = asyncio.create_task(roll_out(processor, rows, params_for(server, n=n), slots=slots))
    count = len(rows) if isinstance(rows, list) else 1
    await server.until(lambda: server.in_flight == min(count * n, slots))
    let_go.set()
    await done
    return server.peak


async def test_the_semaphore_bounds_completions_in_flight_and_all_slots_are_used(server, processor):
    assert await peak_of(server, processor, rows_of(6), n=4, slots=5) == 5
    assert len(server.requests) == 24


async def test_one_row_may_use_every_slot(server, processor):
    assert await peak_of(server, processor, row_of(), n=8, slots=64) == 8


async def test_rows_of_one_completion_use_every_slot_too(server, processor):
    assert await peak_of(server, processor, rows_of(40), n=1, slots=30) == 30


async def test_a_slow_completion_holds_no_slot_but_its_own(server, processor):
    let_go = threading.Event()
    server.script = lambda seen: Held(let_go) if seen.place == 0 else None
    done = asyncio.create_task(roll_out(processor, rows_of(4), params_for(server, n=4), slots=2))
    await server.until(lambda: server.outcomes() == ["open"] + ["answered"] * 15)
    let_go.set()
    await done


async def test_a_pause_between_attempts_holds_no_slot(server, processor):
    busy = Status(429, headers={"Retry-After": "100000"})
    server.script = lambda seen: busy if (seen.place, seen.attempt) == (0, 1) else None
    done = asyncio.create_task(roll_out(processor, row_of(), params_for(server, n=4), slots=1))
    await server.until(lambda: server.outcomes().count("answered") == 4)
    # All others are done, and the one that was turned away has not come again.
    assert [seen.attempt for seen in server.requests] == [1] * 4
    done.cancel()
    await asyncio.wait({done})


async def test_many_rows_get_through_a_single_slot(server, processor):
    rows = await asyncio.wait_for(
        roll_out(processor, rows_of(60), params_for(server, n=3), slots=1), timeout=PATIENCE
    )
    assert [len(record_of_row(row)) for row in rows] == [3] * 60
    assert server.peak == 1


async def test_rows_that_fail_before_their_first_request_do_not_stop_the_others(server, processor):
    rows = rows_of(40)
    for row in rows[:30]:
        row.messages = []
    tasks = processor(rows, config_of(params_for(server), slots=1))
    outcomes = await asyncio.wait_for(
        asyncio.gather(*tasks, return_exceptions=True), timeout=PATIENCE
    )
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [True] * 30 + [False] * 10


async def test_rows_that_are_cancelled_while_they_wait_do_not_stop_the_others(server, processor):
    tasks = processor(rows_of(40), config_of(params_for(server), slots=1))
    await asyncio.sleep(0)
    for task in tasks[:30]:
        task.cancel()
    outcomes = await asyncio.wait_for(
        asyncio.gather(*tasks, return_exceptions=True), timeout=PATIENCE
    )
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[:30])
    assert [len(record_of_row(row)) for row in outcomes[30:]] == [1] * 10


def test_making_a_processor_needs_no_key_no_loop_and_no_network():
    code = """
        import sys
        from eval_protocol_rft import FireworksTrainingRolloutProcessor

        def refuse(event, arguments):
            assert not event.startswith("socket."), event

        sys.addaudithook(refuse)
        FireworksTrainingRolloutProcessor()
        FireworksTrainingRolloutProcessor(tokenizer="no/such", chat_template_kwargs={"a": 1})
        assert "transformers" not in sys.modules
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_option_is_refused_when_the_processor_is_made():
    with pytest.raises(ValueError, match="min_completions must be at least 1"):
        FireworksTrainingRolloutProcessor(min_completions=0)
    with pytest.raises(TypeError, match="temprature"):
        FireworksTrainingRolloutProcessor(temprature=1)


async def test_cleaning_up_twice_or_without_need_is_nothing(processor):
    await processor.acleanup()
    await processor.acleanup()


async def test_cleaning_up_closes_every_socket_and_the_processor_works_again(server, processor):
    for _ in range(2):
        await asyncio.gather(*processor(rows_of(3), config_of(params_for(server, n=2))))
        assert server.connections > 0
        await processor.acleanup()
        await server.until(lambda: server.connections == 0)
        await processor.acleanup()


async def test_cleaning_up_ends_rollouts_in_flight(server, processor):
    server.script = lambda seen: Hang()
    before = asyncio.all_tasks()
    tasks = processor(rows_of(5), config_of(params_for(server, n=3), slots=4))
    await server.until(lambda: server.in_flight == 4)
    await processor.acleanup()
    assert all(task.cancelled() for task in tasks)
    assert asyncio.all_tasks() == before
    await server.until(lambda: server.outcomes() == ["disconnected"] * 4)
    await server.until(lambda: server.connections == 0)


async def test_cleaning_up_without_waiting_closes_once_the_last_rollout_has_ended(
    server, processor
):
    """All that the oldest versions of Eval Protocol call, after each of several runs."""
    processor.cleanup()
    let_go = threading.Event()
    server.script = lambda seen: Held(let_go) if "slow" in text_of(seen.prompt) else None
    rows = [row_of("slow", row_id="0"), row_of("quick", row_id="1")]
    tasks = processor(rows, config_of(params_for(server, n=2)))
    await server.until(lambda: sorted(server.outcomes()) == ["answered"] * 2 + ["open"] * 2)
    processor.cleanup()
    let_go.set()
    assert [len(record_of_row(row)) for row in await asyncio.gather(*tasks)] == [2, 2]
    await server.until(lambda: server.connections == 0)
    await asyncio.gather(*processor(rows_of(2), config_of(params_for(server, n=2))))
    assert server.connections > 0
    processor.cleanup()
    await server.until(lambda: server.connections == 0)


async def test_cleaning_up_after_a_run_ends_no_rollout_of_another(server, processor, monkeypatch):
    """Versions of Eval Protocol between the oldest and the newest do that."""
    monkeypatch.setattr("eval_protocol_rft.rollout._loop_states.CLEANS_UP_AFTER_EACH_RUN", True)
    let_go = threading.Event()
    server.script = lambda seen: Held(let_go) if "slow" in text_of(seen.prompt) else None

    async def run(text: str) -> list[int]:
        rows = await asyncio.gather(*processor([row_of(text)], config_of(params_for(server, n=2))))
        await processor.acleanup()
        return [len(record_of_row(row)) for row in rows]

    slow = asyncio.create_task(run("slow"))
    await server.until(lambda: server.in_flight == 2)
    assert await run("quick") == [2]
    let_go.set()
    assert await slow == [2]
    await server.until(lambda: server.connections == 0)


async def test_rows_whose_rollout_was_cancelled_are_as_they_were(server, processor):
    server.script = lambda seen: Hang() if seen.place == 3 else None
    row = row_of()
    before = row.model_dump()
    [task] = processor([row], config_of(params_for(server, n=4)))
    await server.until(lambda: server.in_flight == 1 and len(server.requests) == 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await processor.acleanup()
    assert row.model_dump() == before


def test_one_processor_serves_one_loop_after_another(server):
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    for _ in range(3):
        [row] = asyncio.run(roll_out(processor, row_of(), params_for(server, n=2)))
        assert len(record_of_row(row)) == 2


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore:Unclosed:ResourceWarning")
def test_a_loop_that_ends_without_clean_up_is_forgotten(server):
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
    loops = []

    async def forgetful() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        [row] = await asyncio.gather(*processor([row_of()], config_of(params_for(server))))
        assert len(record_of_row(row)) == 1

    for _ in range(3):
        asyncio.run(forgetful())
    asyncio.run(roll_out(processor, row_of(), params_for(server)))
    gc.collect()
    assert [loop() for loop in loops] == [None, None, None]
