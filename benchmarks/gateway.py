"""What a model call of an agent costs in the gateway, beside a bare completion of the same tokens.

    python benchmarks/gateway.py [--agents 256] [--turns 8] [--tokens 128] [--repeats 5]
    python benchmarks/gateway.py --sessions 20000      # memory over many sessions

Three processes: an instant engine, agents with the `openai` package, and this one, which is the
gateway, or, as its peer, samples the prompts of the same turns with `HttpSampler` alone. Agents
with a gateway have agents as their peer that ask the engine for the same completions themselves.
The peers take turns, and a ratio is the median of those within a repeat. A run that ends with fewer
sampled tokens than were served ends the benchmark.
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

from episodes import SAID, Run, serve, server
from peer_kit import MODEL
from rich.console import Console
from rich.table import Table

from eval_protocol_rft.local.models import bundled_model_path

QUESTION = "Where to, in world {}?"


async def agents(turns: int) -> None:
    """For each line of standard input: run agents in sessions (base URLs and keys), or have as many
    sample prompts at an engine. Prints the seconds of CPU that it took."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        began = time.process_time()
        if isinstance(asked, dict):
            count, prompts = asked["agents"], asked["prompts"]
            work = [complete(asked, prompts[number::count]) for number in range(count)]
        else:
            work = [agent(url, key, i, turns) for i, (url, key) in enumerate(asked)]
        await asyncio.gather(*work)
        print(time.process_time() - began, flush=True)


def client_of(url: str, key: str) -> Any:
    """One for each agent, as agents have them; it loads no certificates."""
    import openai

    http = openai.DefaultAsyncHttpxClient(verify=False)
    return openai.AsyncOpenAI(base_url=url, api_key=key, http_client=http)


async def agent(url: str, key: str, number: int, turns: int) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION.format(number)}]
    async with client_of(url, key) as client:
        for _ in range(turns):
            reply = await client.chat.completions.create(model=MODEL, messages=messages)
            messages += [reply.choices[0].message, {"role": "user", "content": SAID}]


async def complete(asked: Any, prompts: list[list[int]]) -> None:
    """What an agent would do that asks the engine itself."""
    async with client_of(asked["url"], "none") as client:
        for ids in prompts:
            await client.completions.create(
                model=MODEL, prompt=ids, max_tokens=asked["tokens"], logprobs=1
            )


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
    """All peers over one engine."""

    def __init__(self, url: str, tokenizer: Any, tokens: int, process: Any) -> None:
        from eval_protocol_rft.episodes.gateway import SessionSettings
        from eval_protocol_rft.sampling import Endpoint, HttpSampler, SamplingParams

        self.url, self.tokens = url, tokens
        self.sampler = HttpSampler(Endpoint(base_url=url))
        self.params = SamplingParams(model=MODEL, max_tokens=tokens)
        self.settings = SessionSettings(params=self.params)
        self.tokenizer, self.process = tokenizer, process

    async def tell(self, asked: Any) -> float:
        """What the agents' process took."""
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return float(await asyncio.to_thread(self.process.stdout.readline))

    async def gateway(self, count: int, *, repeats: int = 1) -> tuple[Run, float, list[Any]]:
        """`count` agents at once, `repeats` times; with the CPU of the agents, and what is left of
        the last ones."""
        from eval_protocol_rft.episodes.gateway import Gateway

        async with Gateway(self.sampler, self.tokenizer, settings=self.settings) as gateway:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            theirs = 0.0
            for _ in range(repeats):
                sessions = [gateway.session(str(i)) for i in range(count)]
                theirs += await self.tell([(one.base_url, one.api_key) for one in sessions])
                done = [await session.finish() for session in sessions]
            run = Run(time.process_time() - cpu, time.perf_counter() - wall, [])
            return run, theirs, done

    async def bare(self, prompts: Sequence[Any]) -> Run:
        """Those prompts, with the sampler that the gateway has."""
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        slots = asyncio.Semaphore(256)

        async def one(ids: Any) -> None:
            async with slots:
                await self.sampler.sample(type(ids)(ids), self.params)

        await asyncio.gather(*map(one, prompts))
        return Run(time.process_time() - cpu, time.perf_counter() - wall, [])


async def measure(options: argparse.Namespace, url: str, tokenizer: Any) -> Table:
    with agent_process(options.turns) as process:
        bench = Bench(url, tokenizer, options.tokens, process)
        await bench.gateway(8)
        gc.collect()
        gc.freeze()  # what was imported is looked through by no collection, for all peers
        rows = []
        for repeat in range(options.repeats):
            run, clients, done = await bench.gateway(options.agents)
            sampled = sum(one.sampled_tokens for one in done)
            if sampled != options.agents * options.turns * options.tokens:
                raise RuntimeError(f"{sampled} tokens sampled")
            prompts = [turn.prompt.ids for one in done for turn in one.path]
            bare = await bench.bare(prompts)
            alone = await bench.tell(
                {
                    "url": url,
                    "tokens": options.tokens,
                    "prompts": prompts,
                    "agents": options.agents,
                }
            )
            if repeat:  # the first one warms all
                rows.append((run.cpu, bare.cpu, clients, alone, run.wall))
        await bench.sampler.aclose()
    calls = options.agents * options.turns
    ours, bare_cpu, with_us, without_us, wall = zip(*rows, strict=True)

    def ms(values: Sequence[float]) -> str:
        return f"{1e3 * statistics.median(values) / calls:.2f}"

    def times(values: Sequence[float], floor: Sequence[float]) -> str:
        return f"{statistics.median(a / b for a, b in zip(values, floor, strict=True)):.2f}"

    table = Table(
        *["", "ms of CPU per call", "times"],
        title=f"{options.agents} agents x {options.turns} calls, "
        f"prompts of {statistics.mean(map(len, prompts)):.0f} tokens on average, "
        f"{calls / statistics.median(wall):.0f} calls/s",
    )
    table.add_row("HttpSampler, the same prompts", ms(bare_cpu), "1.00")
    table.add_row("gateway", ms(ours), times(ours, bare_cpu))
    table.add_section()
    both = [a + b for a, b in zip(ours, with_us, strict=True)]
    table.add_row("openai package, /v1/completions of the engine", ms(without_us), "1.00")
    table.add_row("openai package, /v1/chat/completions of the gateway", ms(with_us), "")
    table.add_row("the same and the gateway", ms(both), times(both, without_us))
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
