"""The loop that samples is blocked, as by a synchronous evaluator, while replies arrive: none of
them counts as late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from eval_protocol_rft.doctor._probe import ask_echo
from eval_protocol_rft.episodes._calling import call
from eval_protocol_rft.sampling import _http as bodies
from eval_protocol_rft.sampling._clock import (
    LONGEST_PASS,
    Alarm,
    Deadline,
    loop_clock,
    sampling_time,
)
from eval_protocol_rft.sampling._connections import TrustingConnector, last_connection
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._fanout import StragglerPolicy, Survivor, sample_group
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import Completion, SamplingError, SamplingParams, TokenIds
from tests.stub_server import reply_to

SECONDS = 0.25
"""Every deadline here."""
PROMPT = [70, 71]


def block(seconds: float = 2 * SECONDS) -> None:
    """What an evaluator does that asks a slow judge."""
    time.sleep(seconds)


class Gated:
    """A server of one reply, whose last piece it sends when told to."""

    def __init__(self, *, stream: bool) -> None:
        self.stream = stream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self.waits, self._open, self._sent = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as file:
            length = 0
            while line := file.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = json.loads(file.read(length))
            reply = json.dumps(reply_to(body, body.get("seed", 1))).encode()
            # Larger than one read of the loop, where the reply is whole.
            pieces = (
                [b"data: " + reply + b"\n\n", b"data: [DONE]\n\n"]
                if self.stream
                else [reply[:9], reply[9:] + b" " * (1 << 19)]
            )
            size = sum(map(len, pieces))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + pieces[0])
            self.waits.set()
            self._open.wait(30)
            with contextlib.suppress(OSError):  # the client may have gone
                connection.sendall(pieces[1])
                self._sent.set()
                file.read()

    def send(self) -> None:
        """Send the rest, and come back when it has left."""
        self._open.set()
        assert self._sent.wait(30)

    def __enter__(self) -> Gated:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        self._listener.close()
        self._thread.join(30)


@pytest.mark.parametrize("what", ["whole", "stream", "stall"])
async def test_a_reply_that_arrives_while_the_loop_is_blocked_is_no_timeout(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "STALL_SECONDS", SECONDS if what == "stall" else 60.0)
    with Gated(stream=what != "whole") as server:
        sampler = HttpSampler(Endpoint(server.url))
        params = SamplingParams(
            model="m",
            max_tokens=64,
            stream=server.stream,
            timeout=60.0 if what == "stall" else SECONDS,
        )
        asked = asyncio.ensure_future(sampler.sample(PROMPT, params, seed=1))
        # Not before the first piece is read, or the clock of stalls has not begun.
        await asyncio.to_thread(server.waits.wait, 30)
        server.send()
        block()
        completion = await asked
        await sampler.aclose()
    assert completion.request_id == "cmpl-1"


@pytest.mark.parametrize("what", ["attempt", "stall"])
async def test_a_stream_that_is_let_pile_up_is_read_before_a_deadline_is_judged(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "STALL_SECONDS", SECONDS if what == "stall" else 60.0)
    # From its first event on it would not be looked at for a minute.
    monkeypatch.setattr(bodies, "LONGEST_NAP", 60.0)
    monkeypatch.setattr(bodies, "_NAP_SHARE", 1e12)
    with Gated(stream=True) as server:
        sampler = HttpSampler(Endpoint(server.url))
        timeout = SECONDS if what == "attempt" else 60.0
        params = SamplingParams(model="m", max_tokens=64, stream=True, timeout=timeout)
        asked = asyncio.ensure_future(sampler.sample(PROMPT, params, seed=1))
        while not loop_clock()._naps:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
        await asyncio.to_thread(server.send)
        completion = await asked
        await sampler.aclose()
    assert completion.request_id == "cmpl-1"


async def test_nobody_naps_while_a_deadline_is_judged_and_everybody_may_afterwards() -> None:
    clock = loop_clock()
    with clock.runs():
        napping = asyncio.ensure_future(clock.nap(60))
        await asyncio.sleep(0)
        alarm = Alarm(0, lambda: None)
        await napping
        assert clock._judgements == 1
        await clock.nap(60)
        alarm.restart(60)
        again = asyncio.ensure_future(clock.nap(60))
        await asyncio.sleep(0)
        alarm.cancel()
        assert not again.done()
        again.cancel()
        await asyncio.wait([again])
        assert (clock._naps, clock._judgements) == (set(), 0)


async def test_the_doctors_own_question_goes_by_the_same_clock() -> None:
    with Gated(stream=False) as server:
        params = SamplingParams(model="m", max_tokens=64, timeout=SECONDS)
        asked = asyncio.ensure_future(ask_echo(Endpoint(server.url), TokenIds(PROMPT), params))
        await asyncio.to_thread(server.waits.wait, 30)
        server.send()
        block()
        _, count = await asked
        assert count == len(PROMPT)


async def test_a_reply_over_a_connection_that_nobody_looked_at_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with an aiohttp that gives them out elsewhere."""
    monkeypatch.delattr(TrustingConnector, "connect")
    with Gated(stream=False) as server:
        sampler = HttpSampler(Endpoint(server.url))
        params = SamplingParams(model="m", max_tokens=64)
        with pytest.raises(RuntimeError, match=r"aiohttp \S+ does not give out connections"):
            await sampler.sample(PROMPT, params, seed=1)
        await sampler.aclose()


async def test_tcp_asks_a_silent_connection_whether_the_other_end_is_there() -> None:
    """Whole replies are silent for as long as they take: a host that is gone shows in 30 s."""
    with Gated(stream=False) as server:
        sampler = HttpSampler(Endpoint(server.url))
        asked = sampler.sample(PROMPT, SamplingParams(model="m", max_tokens=64), seed=1)
        server._open.set()
        await asked
        transport = last_connection.get()
        assert transport is not None
        connection = transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, pause, count = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + pause * count == 30
        await sampler.aclose()


async def test_silence_is_still_a_timeout() -> None:
    with Gated(stream=False) as server:
        sampler = HttpSampler(Endpoint(server.url))
        params = SamplingParams(model="m", max_tokens=64, timeout=0.05)
        with pytest.raises(SamplingError, match=r"no whole reply within 0.05 s") as caught:
            await sampler.sample(PROMPT, params, seed=1)
        assert caught.value.kind == "timeout"
        await sampler.aclose()


async def test_what_had_arrived_at_the_deadline_is_read_to_its_end() -> None:
    """In as many passes of the loop as that takes."""
    size = 1 << 20
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        connection, _ = listener.accept()

    def arrive_late() -> None:
        threading.Thread(target=connection.sendall, args=(bytes(size),), daemon=True).start()
        block(LONGEST_PASS / 2)

    with connection:
        async with Deadline(0.01):
            asyncio.get_running_loop().call_soon(arrive_late)
            assert len(await reader.readexactly(size)) == size
        writer.close()


async def test_data_without_end_keeps_no_deadline_from_coming() -> None:
    async def read_on() -> None:
        for _ in range(1 << 30):
            await asyncio.sleep(0)

    limit = Deadline(0.01)
    with pytest.raises(TimeoutError):
        await within(limit, read_on())
    assert limit.expired()


async def within(limit: Deadline, work: Coroutine[Any, Any, None], *, moved: float = 0) -> None:
    async with limit:
        if moved:
            limit.restart(moved)
        await work


async def test_a_deadline_can_be_put_off_and_brought_forward() -> None:
    await within(Deadline(0.02), asyncio.sleep(0.05), moved=60)
    with pytest.raises(TimeoutError):
        await within(Deadline(60), asyncio.sleep(60), moved=0.01)


async def test_a_deadline_leaves_other_timeouts_and_cancelling_alone() -> None:
    async with Deadline(60) as limit:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
    assert not limit.expired()

    async def waits() -> None:
        async with Deadline(60):
            await asyncio.Event().wait()

    task = asyncio.ensure_future(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_clock_stands_still_while_the_loop_is_blocked_and_while_nobody_waits() -> None:
    with loop_clock().runs():
        before = sampling_time()
        block()
        await asyncio.sleep(0)
        assert sampling_time() - before <= LONGEST_PASS
        seen = sampling_time()
        await asyncio.sleep(0.002)
        assert sampling_time() > seen
    before = sampling_time()
    await asyncio.sleep(2 * SECONDS)
    assert sampling_time() - before <= LONGEST_PASS


class FromThread:
    """Answers from a thread, as another process would, once the loop is blocked."""

    def __init__(self, script: Callable[[int], Completion | Exception | None]) -> None:
        self.script = script
        self.calls = 0

    async def sample(self, prompt_ids: Any, params: Any, *, seed: int | None = None) -> Completion:
        self.calls += 1
        answer = self.script(self.calls)
        if isinstance(answer, Exception):
            raise answer
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        done = threading.Event()

        def send() -> None:
            loop.call_soon_threadsafe(future.set_result, answer)
            done.set()

        def blocked() -> None:
            threading.Thread(target=send, daemon=True).start()
            assert done.wait(30)
            block()

        if answer is not None:
            loop.call_soon(blocked)
        return await future  # type: ignore[no-any-return]

    async def aclose(self) -> None: ...


COMPLETION = Completion(token_ids=[1], logprobs=[-1.0], finish_reason="stop")


async def group_of(sampler: FromThread, retry: RetryPolicy, **options: Any) -> Any:
    params = SamplingParams(model="m", max_tokens=8)
    return await sample_group(
        sampler,
        PROMPT,
        params,
        seeds=[1],
        slots=asyncio.Semaphore(4),
        retry=retry,
        **options,
    )


async def test_a_completion_that_is_there_is_no_straggler() -> None:
    sampler = FromThread(lambda call: COMPLETION)
    group = await group_of(
        sampler, RetryPolicy(), stragglers=StragglerPolicy(straggler_seconds=SECONDS)
    )
    assert [one.index for one in group.survivors] == [0]


async def test_blocked_time_is_not_the_retries_time_nor_the_requests() -> None:
    """Neither the budget of a completion nor what the adaptive limit learns from goes by it."""
    events: list[Any] = []

    def script(call: int) -> Completion | Exception:
        if call == 3:
            return COMPLETION
        asyncio.get_running_loop().call_soon(block)
        return SamplingError("busy", kind="unavailable", status=503)

    retry = RetryPolicy(base_seconds=0.001, max_seconds=SECONDS)
    group = await group_of(FromThread(script), retry, observe=events.append)
    (survivor,) = group.survivors
    assert isinstance(survivor, Survivor)
    assert survivor.attempts == 3
    assert survivor.seconds < 2 * SECONDS  # all that was blocked is three times that
    assert [event.attempt.kind for event in events] == ["unavailable", "unavailable", None]


async def test_an_environments_answer_that_is_there_is_not_late() -> None:
    loop, began = asyncio.get_running_loop(), threading.Event()

    def step() -> str:
        began.set()
        return "done"

    def blocked() -> None:
        assert began.wait(30)
        block()

    loop.call_soon(blocked)
    assert await call(step, what="step()", seconds=SECONDS) == "done"
