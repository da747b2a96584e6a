"""Where the client's time goes: each stage by itself, CPU milliseconds per completion.

    python benchmarks/client_stages.py [--completions 1500]

The server answers at once and the client is busy all the time, so these are the least a stage
takes, best of three; with a second between request and reply caches are colder, see clients.py.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec
import orjson
from clients import TOKENS, N, slow_server
from peer_kit import MODEL
from slow_stub import Answers
from workload import Workload, build_workload

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.sampling._endpoint import Endpoint, request_body
from eval_protocol_rft.sampling._exactness import decode_reply, decode_stream
from eval_protocol_rft.sampling._fanout import sample_group
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._replies import parse_reply
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import SamplingParams, TokenIds

IN_FLIGHT = 64
PARAMS = SamplingParams(model=MODEL, max_tokens=TOKENS, stream=False)


def decoding(workload: Workload) -> dict[str, float]:
    """What it takes to read one reply that has arrived."""
    prompt = TokenIds(workload.prompt_ids[0])
    answers = Answers(workload)
    asked = request_body(prompt, PARAMS, 1)
    body = _body(answers, asked)
    plain = _body(answers, b'{"prompt":%s}' % prompt.json)
    stream = _body(answers, request_body(prompt, PARAMS, 1, stream=True))

    def bare() -> list[list[float]]:
        content = orjson.loads(plain)["choices"][0]["logprobs"]["content"]
        return [[e["token_id"] for e in content], [e["sampling_logprob"] for e in content]]

    return {
        "our request's body": _time(lambda: request_body(prompt, PARAMS, 1)),
        f"orjson and two lists, {len(plain) // 1000} kB": _time(bare),
        f"our parsing, {len(body) // 1000} kB": _time(lambda: parse_reply(body)),
        "our parsing and checks": _time(lambda: decode_reply(body, prompt, PARAMS)),
        f"the same streamed, {len(stream) // 1000} kB": _time(
            lambda: decode_stream(stream, prompt, PARAMS)
        ),
    }


async def transport(workload: Workload, url: str, count: int) -> dict[str, float]:
    """What it takes to ask and to get the reply, or with decoding and fan-out as well."""
    prompt = TokenIds(workload.prompt_ids[0])
    body = request_body(prompt, PARAMS, 1)
    sampler = HttpSampler(Endpoint(url))
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def group() -> None:
        got = await sample_group(
            sampler, prompt, PARAMS, seeds=[1] * N, slots=slots, retry=RetryPolicy()
        )
        if len(got.survivors) != N:
            raise RuntimeError(f"a group failed: {got.failures[0].message}")

    async def sample() -> None:
        await sampler.sample(prompt, PARAMS, seed=1)

    measured = {"socket, reply thrown away": await _sockets(url, body, count)}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post() -> None:
            async with session.post(f"{url}/completions", data=body) as response:
                await response.read()

        measured["aiohttp, reply thrown away"] = await _flood(post, count)
    measured["HttpSampler"] = await _flood(sample, count)
    measured["HttpSampler and sample_group"] = await _flood(group, count // N, each=N)
    gc.disable()
    measured["the same without garbage collection"] = await _flood(group, count // N, each=N)
    gc.enable()
    await sampler.aclose()
    return measured


async def _sockets(url: str, body: bytes, count: int) -> float:
    """The floor: asyncio's streams, the reply read by its length."""
    port = urlsplit(url).port
    request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    free = [await asyncio.open_connection("127.0.0.1", port) for _ in range(IN_FLIGHT)]

    async def one() -> None:
        reader, writer = free.pop()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.rpartition(b":")[2]))
        free.append((reader, writer))

    cpu = await _flood(one, count)
    for _, writer in free:
        writer.close()
    return cpu


async def _flood(once: Callable[[], Awaitable[None]], count: int, *, each: int = 1) -> float:
    """CPU milliseconds per completion of `count` calls, `IN_FLIGHT` completions at a time."""

    async def some(calls: int) -> None:
        for _ in range(calls):
            await once()

    workers = IN_FLIGHT // each
    times = []
    for calls in (1, *[count // workers] * 3):
        start = time.process_time()
        await asyncio.gather(*(some(calls) for _ in range(workers)))
        times.append((time.process_time() - start) / (calls * workers * each) * 1e3)
    return min(times[1:])


def _body(answers: Answers, request: bytes) -> bytes:
    return answers.answer(request)[0].partition(b"\r\n\r\n")[2]


def _time(once: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.process_time()
        for _ in range(100):
            once()
        times.append((time.process_time() - start) * 10)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--completions", type=int, default=1500)
    options = parser.parse_args()
    workload = build_workload(
        str(bundled_model_path("arithmetic")),
        rows=1,
        n=N,
        tokens=TOKENS,
        prompt_characters=200,
        concurrency=IN_FLIGHT,
    )
    workload = msgspec.structs.replace(workload, replies=workload.replies[:1])
    measured = decoding(workload)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        workload.save(path)
        with slow_server(path, "--seconds", "0") as url:
            measured |= asyncio.run(transport(workload, url, options.completions))
    for stage, milliseconds in measured.items():
        print(f"{stage:40}{milliseconds:8.3f} ms")


if __name__ == "__main__":
    main()
