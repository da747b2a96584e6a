"""Our clients in the client benchmark, and the floor: how each gets n completions per row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from peer_kit import MODEL, Fetch, Pair, config_of, flat, row_of
from workload import Workload


@asynccontextmanager
async def _bare(
    workload: Workload, url: str, *, stream: bool = False, interval: int = 1
) -> AsyncIterator[Fetch]:
    import aiohttp
    from bare_loop import fetch_rows

    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def fetch(rows: range) -> list[Pair]:
            prompts = [workload.prompt_ids[row] for row in rows]
            replies = fetch_rows(
                session,
                f"{url}/completions",
                workload,
                prompts,
                stream=stream,
                interval=interval,
            )
            return list(await replies)

        yield fetch


def bare(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """aiohttp and orjson, no checks: see bare_loop.py."""
    return _bare(workload, url)


def bare_streamed(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """The same over event streams, one token an event."""
    return _bare(workload, url, stream=True)


def bare_streamed_32(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """And of 32 tokens an event."""
    return _bare(workload, url, stream=True, interval=32)


@asynccontextmanager
async def _sampler(
    workload: Workload, url: str, *, stream: bool, interval: int = 1
) -> AsyncIterator[Fetch]:
    from eval_protocol_rft.sampling._endpoint import Endpoint
    from eval_protocol_rft.sampling._fanout import derive_seeds, sample_group
    from eval_protocol_rft.sampling._http import HttpSampler
    from eval_protocol_rft.sampling._retry import RetryPolicy
    from eval_protocol_rft.sampling._types import SamplingParams, TokenIds

    params = SamplingParams(
        model=MODEL,
        max_tokens=workload.max_tokens,
        stream=stream,
        extra={"stream_interval": interval} if stream else {},
    )
    sampler = HttpSampler(Endpoint(url))
    slots = asyncio.Semaphore(workload.concurrency)

    async def one(row: int) -> list[Pair]:
        group = await sample_group(
            sampler,
            TokenIds(workload.prompt_ids[row]),
            params,
            seeds=derive_seeds(0, str(row), workload.n),
            slots=slots,
            retry=RetryPolicy(),
        )
        return [(s.completion.token_ids, s.completion.logprobs) for s in group.survivors]

    yield lambda rows: flat(one(row) for row in rows)
    await sampler.aclose()


def sampler(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """`HttpSampler` and `sample_group`."""
    return _sampler(workload, url, stream=False)


def streamed(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """The same over event streams, as of a server that knows no `stream_interval`."""
    return _sampler(workload, url, stream=True)


def streamed_32(workload: Workload, url: str) -> AbstractAsyncContextManager[Fetch]:
    """And of one that does."""
    return _sampler(workload, url, stream=True, interval=32)


@asynccontextmanager
async def processor(workload: Workload, url: str) -> AsyncIterator[Fetch]:
    """`FireworksTrainingRolloutProcessor`, called as Eval Protocol calls it."""
    from eval_protocol_rft import FireworksTrainingRolloutProcessor

    ours = FireworksTrainingRolloutProcessor()
    config = config_of(
        workload.concurrency,
        {
            "model": MODEL,
            "api_base": url,
            "api_key": "none",
            "tokenizer": workload.tokenizer,
            "n": workload.n,
            "temperature": 1.0,
            "max_tokens": workload.max_tokens,
            "seed": 0,
        },
    )

    async def fetch(rows: range) -> list[Pair]:
        done = await asyncio.gather(*ours([row_of(workload, row) for row in rows], config))
        extras = [row.execution_metadata.extra or {} for row in done]
        return [
            pair
            for extra in extras
            for pair in zip(extra["completion_ids"], extra["inference_logprobs"], strict=True)
        ]

    yield fetch
    await ours.acleanup()
