"""The floor: aiohttp, orjson and a loop. No Eval Protocol, no tokenizer, no check of anything.

python benchmarks/bare_loop.py WORKLOAD URL RESULT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp
import msgspec
import orjson
from workload import WARM_UP_ROWS, Measurement, Meter, Workload


async def fetch_rows(
    session: aiohttp.ClientSession,
    url: str,
    workload: Workload,
    prompts: list[list[int]],
    *,
    stream: bool = False,
    interval: int = 1,
) -> list[tuple[list[int], list[float]]]:
    """Token ids and sampling logprobs of n completions for each prompt. A stream is read to its end
    first, and then each event: what reads line by line as they come takes twice as much."""
    slots = asyncio.Semaphore(workload.concurrency)

    async def fetch(prompt: list[int]) -> tuple[list[int], list[float]]:
        body = {
            "model": "accounts/benchmark/models/stub",
            "prompt": prompt,
            "max_tokens": workload.max_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "logprobs": True,
        }
        if stream:
            # What ours ask for too, so that the streams are the same.
            body |= {"stream": True, "stream_interval": interval, "return_token_ids": True}
        async with slots, session.post(url, data=orjson.dumps(body)) as response:
            reply = await response.read()
        ids, logprobs = [], []
        for document in _events(reply) if stream else [reply]:
            for entry in orjson.loads(document)["choices"][0]["logprobs"]["content"]:
                ids.append(entry["token_id"])
                logprobs.append(entry["sampling_logprob"])
        return ids, logprobs

    return await asyncio.gather(*(fetch(p) for p in prompts for _ in range(workload.n)))


def _events(stream: bytes) -> list[bytes]:
    return [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]


async def run(workload: Workload, url: str) -> Measurement:
    meter = Meter()
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        url = f"{url}/v1/completions"
        await fetch_rows(session, url, workload, workload.prompt_ids[:WARM_UP_ROWS])
        with meter.running():
            completions = await fetch_rows(
                session, url, workload, workload.prompt_ids[WARM_UP_ROWS:]
            )
    return meter.measurement(completions)


if __name__ == "__main__":
    measured = asyncio.run(run(Workload.load(sys.argv[1]), sys.argv[2]))
    Path(sys.argv[3]).write_bytes(msgspec.json.encode(measured))
