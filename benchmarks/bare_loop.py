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
    session: aiohttp.ClientSession, url: str, workload: Workload, prompts: list[list[int]]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and sampling logprobs of n completions for each prompt."""
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
        async with slots, session.post(url, data=orjson.dumps(body)) as response:
            reply = orjson.loads(await response.read())
        content = reply["choices"][0]["logprobs"]["content"]
        return (
            [entry["token_id"] for entry in content],
            [entry["sampling_logprob"] for entry in content],
        )

    return await asyncio.gather(*(fetch(p) for p in prompts for _ in range(workload.n)))


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
