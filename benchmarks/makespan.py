"""How long a job takes beyond what any schedule needs, when latencies differ a lot.

    python benchmarks/makespan.py [--rows 1000] [--in-flight 256] [--mean 0.6] [--json FILE]

The stub answers each completion after a latency of its own, drawn before and found by the request's
seed, so both policies have the same work whatever its order. Latencies are lognormal (sigma 1), or
bimodal: nine in ten take 1, one takes 10. Both policies go through our processor:

- completions: as it comes, a slot for each completion.
- rows: a slot for each row, held until its last completion is in, as a processor does that holds
  Eval Protocol's semaphore for a row; as many slots as fill the same number of requests.

The bound is max(sum of latencies / requests in flight, longest latency): no schedule ends before.
Beside it stands the list schedule of each policy, simulated without any overhead: how much of the
distance is the policy's, and how much is ours.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from clients import slow_server
from peer_kit import MODEL, config_of, row_of
from report import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rollouts import BenchmarkError
from workload import WARM_UP_ROWS, Workload, build_workload

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.sampling._fanout import derive_seeds

N = 8
POLICIES = ("completions", "rows")
TOKENS = 128
"""Latencies are scaled down so that a run takes seconds, and replies with them."""


class Makespan(msgspec.Struct, frozen=True, kw_only=True):
    """One job under one policy."""

    latencies: str
    policy: str
    seconds: float
    bound: float
    simulated: float
    """Seconds of the policy's list schedule."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What charts.py draws."""

    rows: int
    n: int
    in_flight: int
    mean: float
    makespans: list[Makespan]
    machine: dict[str, str | int | None]


def draw(name: str, count: int, mean: float) -> list[float]:
    """[count] latencies in seconds with exactly this mean."""
    rng = random.Random(0)
    if name == "lognormal":
        drawn = [rng.lognormvariate(0, 1) for _ in range(count)]
    else:
        drawn = [10.0 if rng.random() < 0.1 else 1.0 for _ in range(count)]
    return [mean * value * count / sum(drawn) for value in drawn]


def lower_bound(latencies: Sequence[float], machines: int) -> float:
    """No schedule on so many machines ends before (Graham 1966)."""
    longest = max(latencies)
    return max(sum(latencies) / machines, longest)


def list_schedule(latencies: Sequence[float], machines: int) -> float:
    """When the last job ends if each goes, in order, to the machine that is free first."""
    free = [0.0] * machines
    for latency in latencies:
        heapq.heapreplace(free, free[0] + latency)
    return max(free)


def simulate(policy: str, latencies: Sequence[float], machines: int) -> float:
    """The list schedule of completions, or of rows that hold N machines each."""
    if policy == "completions":
        return list_schedule(latencies, machines)
    rows = [max(latencies[first : first + N]) for first in range(0, len(latencies), N)]
    return list_schedule(rows, machines // N)


async def run_policy(policy: str, workload: Workload, url: str, in_flight: int) -> float:
    """Seconds that all rows but those of the warm-up take."""
    from eval_protocol_rft import FireworksTrainingRolloutProcessor

    processor = FireworksTrainingRolloutProcessor()
    parameters = {
        "model": MODEL,
        "api_base": url,
        "api_key": "none",
        "tokenizer": workload.tokenizer,
        "n": N,
        "temperature": 1.0,
        "max_tokens": TOKENS,
        "seed": 0,
    }
    config = config_of(in_flight, parameters)
    rows = [row_of(workload, number) for number in range(len(workload.questions))]
    await asyncio.gather(*processor(rows[:WARM_UP_ROWS], config))
    rows = rows[WARM_UP_ROWS:]
    start = time.perf_counter()
    if policy == "rows":
        slots = asyncio.Semaphore(in_flight // N)

        async def one(row: Any) -> None:
            async with slots:
                await asyncio.gather(*processor([row], config))

        await asyncio.gather(*map(one, rows))
    else:
        await asyncio.gather(*processor(rows, config))
    seconds = time.perf_counter() - start
    await processor.acleanup()
    if any(len((row.execution_metadata.extra or {})["completion_ids"]) != N for row in rows):
        raise BenchmarkError(f"{policy}: completions are missing")
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every policy on both kinds of latencies and print a table."""
    options = _options(arguments)
    makespans = []
    with tempfile.TemporaryDirectory() as folder:
        workload = build_workload(
            str(bundled_model_path("arithmetic")),
            rows=options.rows,
            n=N,
            tokens=TOKENS,
            prompt_characters=200,
            concurrency=options.in_flight,
        )
        workload = msgspec.structs.replace(workload, replies=workload.replies[:1])
        for name in ("lognormal", "bimodal"):
            latencies = draw(name, options.rows * N, options.mean)
            with _server(Path(folder), workload, latencies) as url:
                makespans += [
                    Makespan(
                        latencies=name,
                        policy=policy,
                        seconds=asyncio.run(run_policy(policy, workload, url, options.in_flight)),
                        bound=lower_bound(latencies, options.in_flight),
                        simulated=simulate(policy, latencies, options.in_flight),
                    )
                    for policy in POLICIES
                ]
    result = Result(
        rows=options.rows,
        n=N,
        in_flight=options.in_flight,
        mean=options.mean,
        makespans=makespans,
        machine=machine(),
    )
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    _print_table(result)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--mean", type=float, default=0.6, help="seconds")
    parser.add_argument("--json", type=Path, help="write the result here, for charts.py")
    return parser.parse_args(arguments)


@contextmanager
def _server(folder: Path, workload: Workload, latencies: list[float]) -> Iterator[str]:
    """A stub that knows the latency of every seed; those of the warm-up take none."""
    path, table = folder / "workload.json", folder / "latencies.json"
    workload.save(path)
    of_rows = [0.0] * (WARM_UP_ROWS * N) + latencies
    seeds = [
        seed
        for number in range(len(workload.questions))
        for seed in derive_seeds(0, f"row-{number}", N)
    ]
    by_seed = dict(zip(seeds, of_rows, strict=True))
    if len(by_seed) != len(of_rows):
        raise BenchmarkError("two completions have the same seed: take another number of rows")
    table.write_bytes(msgspec.json.encode(by_seed))
    with slow_server(path, "--seconds-of-seeds", str(table)) as url:
        yield url


def _print_table(result: Result) -> None:
    table = Table(
        title=f"{result.rows} rows x {result.n}, {result.mean:g} s on average, "
        f"{result.in_flight} in flight",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in (
        "latencies",
        "slots for",
        "seconds",
        "simulated",
        "bound",
        "x sim.",
        "x bound",
    ):
        table.add_column(heading, no_wrap=True)
    for m in result.makespans:
        table.add_row(
            m.latencies,
            m.policy,
            f"{m.seconds:.2f}",
            f"{m.simulated:.2f}",
            f"{m.bound:.2f}",
            f"{m.seconds / m.simulated:.3f}",
            f"{m.seconds / m.bound:.3f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
