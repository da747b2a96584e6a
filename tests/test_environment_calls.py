"""Calls of a user's code in threads: side by side where they block, in one thread where not."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from eval_protocol_rft.episodes import _calling as calling
from eval_protocol_rft.episodes._calling import EnvironmentFaultError
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "_THREADS", calling._Threads())


async def call(function, *arguments, seconds: float = PATIENCE):
    return await calling.call(function, *arguments, what="it", seconds=seconds)


async def test_calls_that_block_run_side_by_side():
    together = threading.Barrier(24, timeout=PATIENCE)
    assert sorted(await asyncio.gather(*(call(together.wait) for _ in range(24)))) == [*range(24)]


async def test_calls_that_do_not_block_share_a_thread(monkeypatch):
    monkeypatch.setattr(calling, "PATIENCE_SECONDS", 60.0)
    used = await asyncio.gather(*(call(threading.get_ident) for _ in range(300)))
    assert len(set(used)) == 1
    assert used[0] != threading.get_ident()
    # It is idle now and is woken again.
    assert await call(threading.get_ident) == used[0]


async def test_a_call_that_hangs_keeps_no_other_from_running():
    let_go = threading.Event()
    hanging = [asyncio.create_task(call(let_go.wait, seconds=0.2)) for _ in range(3)]
    for n in range(50):
        assert await call(lambda n=n: n) == n
    for one in hanging:
        with pytest.raises(EnvironmentFaultError, match=r"it took longer than 0\.2 s"):
            await one
    let_go.set()
    assert await asyncio.gather(*(call(abs, -n) for n in range(50))) == [*range(50)]


async def test_a_call_that_nobody_waits_for_any_more_is_not_made(monkeypatch):
    monkeypatch.setattr(calling, "PATIENCE_SECONDS", 60.0)
    let_go, made = threading.Event(), []
    first = asyncio.create_task(call(let_go.wait))
    second = asyncio.create_task(call(made.append, 1))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.sleep(0)
    let_go.set()
    assert await first
    await call(made.append, 2)
    assert made == [2]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), StopIteration(1)])
async def test_what_a_call_raises_is_told(error):
    def fails():
        raise error

    with pytest.raises(EnvironmentFaultError, match=f"it raised .*{type(error).__name__}"):
        await call(fails)


def test_every_event_loop_has_its_answers():
    def work() -> None:
        async def many() -> list[int]:
            return await asyncio.gather(*(call(abs, -n) for n in range(200)))

        assert asyncio.run(many()) == [*range(200)]
        done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(done) == 4


async def test_a_call_that_hangs_is_not_counted_on(monkeypatch):
    """While one hangs for ever, others are not made to wait until patience is over."""
    let_go = threading.Event()
    with pytest.raises(EnvironmentFaultError, match="took longer"):
        await call(let_go.wait, seconds=0.05)
    monkeypatch.setattr(calling, "PATIENCE_SECONDS", 60.0)
    assert await call(abs, -1) == 1
    let_go.set()
    for n in range(20):
        assert await call(abs, -n) == n
        await asyncio.sleep(0.002)
    threads = calling._THREADS
    async with asyncio.timeout(PATIENCE):
        while threads._working or threads._idle != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_thread_that_cannot_start_fails_its_call_alone(monkeypatch):
    made = []

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EnvironmentFaultError, match="can't start new thread"):
            await call(made.append, 1)
    await call(made.append, 2)
    assert made == [2]


async def test_a_users_own_timeout_is_told_as_what_it_is():
    def fails():
        raise TimeoutError("connect to db")

    with pytest.raises(EnvironmentFaultError, match="it raised TimeoutError: connect to db"):
        await call(fails)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_fork_calls_are_made():
    assert asyncio.run(call(abs, -1)) == 1
    child = os.fork()
    if not child:
        try:
            os._exit(0 if asyncio.run(call(abs, -2, seconds=10)) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
