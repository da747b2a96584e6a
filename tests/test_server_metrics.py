"""What a vLLM server says of its queue reaches the limit, and nothing that it says ends a run."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling import _limiter
from eval_protocol_rft.sampling._adaptive import AdaptiveLimit, ServerLoad
from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._limiter import StandingQueue, parse_metrics, polling
from eval_protocol_rft.sampling._limits import FixedLimit
from tests.stub_server import Hang, Status, StubServer
from tests.waiting import PATIENCE

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 3.0
vllm:num_requests_running{engine="1",model_name="Qwen/Qwen3-8B"} 4.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-8B"} 1.2e+01
vllm:num_requests_waiting{engine="1",model_name="Qwen/Qwen3-8B"} 0.0 1760000000000
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="a \\"quoted\\" } name"} 5.0
vllm:num_preemptions_created{engine="0"} 1.76e+09
process_resident_memory_bytes 1.0e+09
"""


def page(running: int, waiting: int, preemptions: int = 0) -> str:
    return (
        f'vllm:num_requests_running{{engine="0"}} {running}.0\n'
        f'vllm:num_requests_waiting{{engine="0"}} {waiting}.0\n'
        f'vllm:num_preemptions_total{{engine="0"}} {preemptions}.0\n'
    )


class Listening(AdaptiveLimit):
    """An adaptive limit that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[ServerLoad] = []

    def observe(self, load: ServerLoad) -> None:
        self.told.append(load)
        super().observe(load)


def endpoint(server: StubServer, **fields) -> Endpoint:
    return Endpoint(f"{server.url}/v1", **fields)


def test_a_page_is_summed_over_engines():
    assert parse_metrics(PAGE) == ServerLoad(running=7, waiting=12, preempted=5)


@given(*[st.integers(0, 10_000)] * 3)
def test_a_page_without_labels_reads_too(running, waiting, preemptions):
    text = page(running, waiting, preemptions).replace('{engine="0"}', "")
    assert parse_metrics(text) == ServerLoad(running, waiting, preemptions)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>vllm:num_requests_running 3</html>",
        page(3, 4).replace("vllm:", "sglang:"),
        page(3, 4).replace("waiting", "wanting"),
        page(3, 4).replace(" 4.0", " NaN"),
        page(3, 4).replace(" 4.0", " +Inf"),
        page(3, 4).replace(" 4.0", " -1"),
        page(3, 4).replace(" 4.0", " many"),
    ],
)
def test_what_is_no_page_of_vllms_says_nothing(text):
    assert parse_metrics(text) is None


@given(st.text() | st.text('vllm:num_requests_running{}"\\= 0.9e+\n'))
def test_whatever_stands_on_a_page_is_read_or_ignored(text):
    found = parse_metrics(text + page(1, 2))
    assert found is None or min(found) >= 0


def test_preemptions_are_those_since_the_last_poll():
    queue = StandingQueue()
    counts = [10, 10, 13, 2, 4]
    told = [queue.saw(ServerLoad(1, 0, count)).preempted for count in counts]
    assert told == [0, 0, 3, 0, 2], "between 13 and 2 the server began anew"


def test_a_burst_is_no_queue_and_what_stays_is():
    queue = StandingQueue()
    waiting = [30, 30, 0, 30, 30, 24, 16]
    told = [queue.saw(ServerLoad(8, each, 0)) for each in waiting]
    assert [load.running for load in told[:2]] == [0, 0], "too few polls to say"
    assert [load.waiting for load in told[2:]] == [0, 0, 0, 24, 16]


polls = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12)


@given(polls)
def test_the_share_that_waits_is_the_least_of_three_polls(found):
    queue = StandingQueue()
    told = [queue.saw(ServerLoad(running, waiting, 0)) for running, waiting in found]
    shares = [waiting / (waiting + running) if waiting else 0.0 for running, waiting in found]
    for i, load in enumerate(told[2:], start=2):
        share = load.waiting / (load.waiting + load.running) if load.waiting else 0.0
        assert share == min(shares[i - 2 : i + 1])
        assert (load.running, load.waiting) in found[i - 2 : i + 1]


async def test_the_limit_hears_of_what_polls_show(server):
    pages = iter([page(8, 24, 1), page(8, 24, 1), page(8, 16, 5), page(8, 32, 5)])
    server.metrics = lambda: Status(200, next(pages, page(0, 0, 5)).encode())
    limit = Listening()
    own = endpoint(server, api_key="sk-own", headers=(("X-Team", "rl"),))
    async with polling(own, limit, every=0.01):
        await server.until(lambda: len(limit.told) >= 5)
    told = [(load.running, load.waiting, load.preempted) for load in limit.told]
    assert told[:5] == [(0, 0, 0), (0, 0, 0), (8, 16, 4), (8, 16, 0), (0, 0, 0)]
    assert {seen["Authorization"] for seen in server.polls} == {"Bearer sk-own"}
    assert {seen["X-Team"] for seen in server.polls} == {"rl"}
    asked = len(server.polls)
    await asyncio.sleep(0.05)
    assert len(server.polls) == asked, "it goes on after the run"


@pytest.mark.parametrize(
    "answer",
    [
        Status(404),
        Status(500, b"boom"),
        Status(302, headers={"Location": "/metrics"}),
        Status(200, b"not vLLM's"),
        Status(200, b"\xff\xfe\x00"),
        Status(200, b"no gzip", {"Content-Encoding": "gzip"}),
        Status(200, gzip.compress(b"x" * (8 << 20)), {"Content-Encoding": "gzip"}),
    ],
    ids=["404", "500", "redirect", "another", "bytes", "broken", "bomb"],
)
async def test_a_server_without_them_is_asked_once(answer, server):
    server.metrics = lambda: answer
    limit = Listening()
    async with polling(endpoint(server), limit, every=0.01):
        await server.until(lambda: len(server.polls) == 1)
        await asyncio.sleep(0.1)
    assert len(server.polls) == 1
    assert not limit.told


async def test_a_server_that_does_not_answer_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(_limiter, "ANSWER_SECONDS", 0.1)
    server.metrics = Hang
    limit = Listening()
    async with asyncio.timeout(PATIENCE), polling(endpoint(server), limit, every=0.01):
        await server.until(lambda: len(server.polls) == 1)
        await asyncio.sleep(0.3)
    assert (len(server.polls), limit.told) == (1, [])


async def test_the_end_of_a_run_does_not_wait_for_an_answer(server, monkeypatch):
    monkeypatch.setattr(_limiter, "ANSWER_SECONDS", 3600.0)
    server.metrics = Hang
    async with asyncio.timeout(PATIENCE), polling(endpoint(server), Listening(), every=0.01):
        await server.until(lambda: len(server.polls) == 1)


async def test_a_server_that_was_away_is_asked_again(server):
    answers = iter([Status(200, page(1, 0).encode()), Status(503), Status(503)])
    server.metrics = lambda: next(answers, Status(200, page(2, 0).encode()))
    limit = Listening()
    async with polling(endpoint(server), limit, every=0.01):
        await server.until(lambda: len(limit.told) >= 2)
    assert len(server.polls) >= 4


async def test_nothing_listens_on_the_port():
    with StubServer() as gone:
        nowhere = endpoint(gone)
    limit = Listening()
    async with polling(nowhere, limit, every=0.01):
        await asyncio.sleep(0.1)
    assert not limit.told


async def test_fireworks_and_a_fixed_limit_ask_for_nothing(server):
    server.metrics = lambda: Status(200, page(1, 0).encode())
    for own, limit in (
        (endpoint(server, is_fireworks=True), Listening()),
        (endpoint(server), FixedLimit(8)),
        (None, Listening()),
    ):
        async with polling(own, limit, every=0.01):
            await asyncio.sleep(0.05)
    assert not server.polls
