"""What a model call of an agent costs in the gateway, beside a bare completion of the same tokens.

    python benchmarks/gateway.py [--agents 256] [--turns 8] [--tokens 128] [--repeats 5]
    python benchmarks/gateway.py --sessions 20000      # memory over many sessions

Three processes: an instant engine, agents that post JSON and read it (no client package), and this
one, which is the gateway, or, as its peer, samples the prompts of the same turns with `HttpSampler`
alone. CPU is that of this process; the peers alternate, and the ratio is the median of those within
a repeat. A run that ends with fewer sampled tokens than were served ends the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from episodes import SAID, ratios, serve, server
from episodes import Run as BaseRun
from peer_kit import MODEL
from rich.console import Console
from rich.table import Table

from eval_protocol_rft.local.models import bundled_model_path

QUESTION = "Where to, in world {}?"


async def agents(turns: int) -> None:
    """For each line of standard input, a list of base URLs and keys, run that many agents."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        while line := await asyncio.to_thread(sys.stdin.readline):
            await asyncio.gather(
                *(agent(http, url, key, i, turns) for i, (url, key) in enumerate(json.loads(line)))
            )
            print("done", flush=True)


async def agent(http: Any, url: str, key: str, number: int, turns: int) -> None:
    messages = [{"role": "user", "content": QUESTION.format(number)}]
    for _ in range(turns):
        async with http.post(
            f"{url}/chat/completions",
            json={"model": MODEL, "messages": messages},
            headers={"authorization": f"Bearer {key}"},
        ) as response:
            reply = await response.json()
        messages += [reply["choices"][0]["message"], {"role": "user", "content": SAID}]


@contextmanager
def agent_process(turns: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--run-agents", str(turns)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


class Bench:
    """Both peers over one engine."""

    def __init__(self, url: str, tokenizer: Any, tokens: int, process: Any) -> None:
        from eval_protocol_rft.episodes.gateway import SessionSettings
        from eval_protocol_rft.sampling import Endpoint, HttpSampler, SamplingParams

        self.sampler = HttpSampler(Endpoint(base_url=url))
        self.params = SamplingParams(model=MODEL, max_tokens=tokens)
        self.settings = SessionSettings(params=self.params)
        self.tokenizer, self.process = tokenizer, process

    async def gateway(self, count: int, *, repeats: int = 1) -> tuple[BaseRun, list[Any]]:
        """`count` agents at once, `repeats` times."""
        from eval_protocol_rft.episodes.gateway import Gateway

        async with Gateway(self.sampler, self.tokenizer, settings=self.settings) as gateway:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats):
                sessions = [gateway.session(str(i)) for i in range(count)]
                line = json.dumps([(one.base_url, one.api_key) for one in sessions])
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
                await asyncio.to_thread(self.process.stdout.readline)
                done = [await session.finish() for session in sessions]
            return BaseRun(time.process_time() - cpu, time.perf_counter() - wall, []), done

    async def bare(self, prompts: Sequence[Any]) -> BaseRun:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        slots = asyncio.Semaphore(256)

        async def one(ids: Any) -> None:
            async with slots:
                await self.sampler.sample(type(ids)(ids), self.params)

        await asyncio.gather(*map(one, prompts))
        return BaseRun(time.process_time() - cpu, time.perf_counter() - wall, [])


async def measure(options: argparse.Namespace, url: str, tokenizer: Any) -> Table:
    with agent_process(options.turns) as process:
        bench = Bench(url, tokenizer, options.tokens, process)
        await bench.gateway(8)
        gc.collect()
        gc.freeze()  # what was imported is looked through by no collection, for both peers
        ours, theirs = [], []
        for repeat in range(options.repeats):
            run, done = await bench.gateway(options.agents)
            sampled = sum(one.sampled_tokens for one in done)
            if sampled != options.agents * options.turns * options.tokens:
                raise RuntimeError(f"{sampled} tokens sampled")
            prompts = [turn.prompt.ids for one in done for turn in one.path]
            bare = await bench.bare(prompts)
            if repeat:  # the first one warms both
                ours.append(run)
                theirs.append(bare)
        await bench.sampler.aclose()
    calls = options.agents * options.turns
    mean = statistics.mean(map(len, prompts))
    table = Table(
        *["mean prompt", "gateway", "bare", "ratio", "calls/s"],
        title=f"{options.agents} agents x {options.turns} calls, ms of CPU per call",
    )
    table.add_row(
        f"{mean:.0f}",
        *(f"{1e3 * statistics.median(r.cpu for r in runs) / calls:.2f}" for runs in (ours, theirs)),
        f"{statistics.median(ratios(ours, theirs)):.2f}",
        f"{calls / statistics.median(run.wall for run in ours):.0f}",
    )
    return table


async def memory(options: argparse.Namespace, url: str, tokenizer: Any) -> Table:
    """Resident memory after each tenth of the sessions."""
    table = Table("sessions", "MiB", "highest MiB")
    with agent_process(options.turns) as process:
        bench = Bench(url, tokenizer, options.tokens, process)
        for tenth in range(1, 11):
            await bench.gateway(options.agents, repeats=options.sessions // options.agents // 10)
            gc.collect()
            with open("/proc/self/statm") as file:  # noqa: ASYNC230 - a measurement
                resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            table.add_row(f"{tenth * options.sessions // 10}", f"{resident:.0f}", f"{highest:.0f}")
        await bench.sampler.aclose()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--agents", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="sampled per call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sessions", type=int, help="look at memory instead")
    parser.add_argument("--tokenizer", default=str(bundled_model_path("arithmetic")))
    parser.add_argument("--run-agents", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_agents:
        asyncio.run(agents(options.run_agents))
        return
    if options.serve:
        asyncio.run(serve([int(token) for token in options.serve.split(",")]))
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    word = tokenizer(" 7", add_special_tokens=False)["input_ids"]
    ids = [*(word * options.tokens)[: options.tokens - 1], tokenizer.eos_token_id]
    with server(ids) as url:
        work = memory if options.sessions else measure
        Console(width=110).print(asyncio.run(work(options, url, tokenizer)))


if __name__ == "__main__":
    main()
