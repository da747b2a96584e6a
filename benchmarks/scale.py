"""What a cluster of 100 nodes asks of the one process that samples from it, and what breaks first.

    python -m benchmarks.scale [--quick] [--json FILE]        # in the root of the repository

10^7 completions of 2,000 tokens are 2 * 10^10 tokens: nobody writes them for a table. So there are
two parts:

- *stages*: what a completion of 2,000 tokens takes the head, measured here with the real parts:
  HTTP and checks, reading the ids, rows and arrays, the job's store on this disk. CPU, so that
  other work beside it counts little.
- *runs*: our own `SamplingRun`, limiter, breaker, budget and retries over simulated engines in
  simulated time (`tests/simulated_cluster.py`), each in a process of its own. What the stages take
  is spent in simulated time. Real are the CPU and the memory of the decisions.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, PROMPT = 2000, 150
GOAL = 10_000_000
NODES, EACH = 100, 500
"""Nodes, and requests in flight on each."""
RATE = 15_000
"""Tokens per second of a node with so many."""
SAMPLED = 400
"""Completions that a stage is measured with."""


@dataclass(frozen=True)
class Case:
    """A run of the simulation."""

    name: str
    completions: int
    nodes: int
    head_seconds: float = 0.0
    outages: list[tuple[float, float, int, int]] = field(default_factory=list)
    """(from, to, first node, last node + 1)."""
    dies_at: list[float] = field(default_factory=list)


def run(case: Case) -> dict[str, Any]:
    """Simulate, in this process."""
    from eval_protocol_rft.sampling import FixedLimit
    from tests.simulated_cluster import Cluster, Outage, simulate

    in_flight = case.nodes * EACH
    outages = [Outage(start, end, range(*nodes)) for start, end, *nodes in case.outages]
    cluster = Cluster(
        nodes=case.nodes,
        mean_tokens=TOKENS,
        outages=outages,
        head_seconds=case.head_seconds,
    )
    before, began = _peak_mb(), time.process_time()
    head = simulate(
        cluster,
        case.completions,
        lambda: FixedLimit(in_flight),
        highest=in_flight,
        dies_at=case.dies_at,
    )
    cpu = time.process_time() - began - head.thread_cpu
    rate = cluster.tokens_per_second(in_flight)
    lost = sum(
        (end - start) * rate / case.nodes * len(range(*ns)) for start, end, *ns in case.outages
    )
    ends = np.array(head.ends)
    late = ends[len(ends) // 4 : -len(ends) // 4]
    return {
        "seconds": head.seconds,
        "bound": (head.tokens + lost) / rate,
        "steady": (len(late) - 1) * 100 / (late[-1] - late[0]),
        "sampled": head.completions,
        "attempts": head.attempts,
        "failed": head.failed,
        "cpu_us": cpu / case.completions * 1e6,
        "mb": _peak_mb() - before,
        "tasks": head.most_tasks,
    }


def stages() -> dict[str, float]:
    """CPU milliseconds of the head per completion of `TOKENS`, by stage."""
    from eval_protocol_rft.local import load_tokenizer
    from eval_protocol_rft.local.models import bundled_model_path
    from eval_protocol_rft.rollout import AnswerReader, VocabularyWitness
    from eval_protocol_rft.sampling import Completion, SamplingParams, TokenIds

    tokenizer = load_tokenizer(str(bundled_model_path("arithmetic")))
    ids = (tokenizer.encode("12+34=46 and so on. ") * TOKENS)[:TOKENS]
    logprobs = [-0.5 - 1e-4 * i for i in range(TOKENS)]
    completion = Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop")
    params = SamplingParams(model="m", max_tokens=TOKENS)
    prompt, witness = TokenIds(ids[:PROMPT]), VocabularyWitness()
    text = tokenizer.read(completion, params).text or ""
    measured = {"HTTP, reply read and checked": _http()}
    measured["text and vocabulary"] = _cpu(lambda: tokenizer.read(completion, params, witness.look))
    measured["message"] = _cpu(
        lambda: AnswerReader(prompt, tokenizer, tools=None).read_to_record(text)
    )
    measured["arrays"] = _cpu(lambda: (np.array(ids, np.int32), np.array(logprobs, np.float32)))
    measured |= _store()
    return measured


def _http() -> float:
    """A server in another process answers at once."""
    sys.path.insert(0, str(Path(__file__).parent))
    import client_stages
    import msgspec
    from clients import slow_server
    from workload import build_workload

    from eval_protocol_rft.local.models import bundled_model_path
    from eval_protocol_rft.sampling import SamplingParams, TokenIds
    from eval_protocol_rft.sampling._endpoint import Endpoint
    from eval_protocol_rft.sampling._http import HttpSampler

    workload = build_workload(
        str(bundled_model_path("arithmetic")),
        rows=1,
        n=1,
        tokens=TOKENS,
        prompt_characters=PROMPT,
        concurrency=client_stages.IN_FLIGHT,
    )
    workload = msgspec.structs.replace(workload, replies=workload.replies[:1])
    prompt = TokenIds(workload.prompt_ids[0])
    params = SamplingParams(model="m", max_tokens=TOKENS, stream=False)

    async def flood(url: str) -> float:
        sampler = HttpSampler(Endpoint(url))

        async def one() -> None:
            await sampler.sample(prompt, params, seed=1)

        seconds = await client_stages._flood(one, SAMPLED)
        await sampler.aclose()
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        workload.save(path)
        with slow_server(path, "--seconds", "0") as url:
            return asyncio.run(flood(url))


def _store() -> dict[str, float]:
    """The store's thread: 64 rows at a time, as they come from such a cluster; and what follows."""
    from eval_protocol_rft.data._files import write_file
    from eval_protocol_rft.data._format import CompletionRow, FileMetadata, schema
    from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
    from eval_protocol_rft.data._row_groups import to_record_batch

    rng, form = np.random.default_rng(0), schema(FileMetadata(), {})
    count, at_once = 16 * SAMPLED // 64 * 64, 64

    def row(i: int) -> CompletionRow:
        return CompletionRow(
            row_id=f"row-{i // 8}",
            data_idx=i // 8,
            sample_idx=i % 8,
            prompt="question " * 60,
            response="word and " * 900,
            prompt_ids=np.arange(PROMPT, dtype=np.int32),
            completion_ids=(rng.zipf(1.2, TOKENS) % 150_000).astype(np.int32),
            logprobs=-rng.exponential(0.5, TOKENS).astype(np.float32),
            finish_reason="stop",
            truncated=False,
            seed=i,
            attempts=1,
            seconds=60.0,
        )

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x.parquet"
        keys_of = functools.partial(row_keys, position=None)
        store = JobStore(parts_folder(target), form, keys_of)
        cpu = wall = 0.0
        for first in range(0, count, at_once):
            rows = [row(i) for i in range(first, first + at_once)]
            start = time.process_time(), time.perf_counter()
            store.append(to_record_batch(rows, form))
            cpu += time.process_time() - start[0]
            wall += time.perf_counter() - start[1]
        on_disk = sum(path.stat().st_size for path in store.folder.iterdir())
        looked = _cpu(lambda: [None for _ in store.stored()], 1)
        began = time.process_time()
        write_file(target, form, store.merged())
        merged = time.process_time() - began
        size = target.stat().st_size
        store.close()
    return {
        "store (a thread)": cpu / count * 1e3,
        "store, with waiting for this disk": wall / count * 1e3,
        "looking up what is there": looked / count,
        "finished file": merged / count * 1e3,
        "bytes while it runs": on_disk / count,
        "bytes in the file": size / count,
    }


def _cpu(work: Callable[[], object], times: int = 100) -> float:
    """Milliseconds, best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(times):
            work()
        best = min(best, (time.process_time() - start) / times * 1e3)
    return best


def _peak_mb() -> float:
    # Not getrusage's: that begins with the peak of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def cases(head: float, *, quick: bool) -> list[Case]:
    """What is run. A tenth of the cluster stands for all of it where the decisions were shown to
    grow with the completions alone. `head`: seconds of its loop for a completion."""
    tenth, size = NODES // 10, 20_000
    whole = [
        Case("100 nodes", 5 * size, NODES),
        Case("100 nodes, with the head's CPU", 4 * size, NODES, head_seconds=head),
    ]
    return [
        Case("10 nodes", size // 2, tenth),
        Case("10 nodes", size, tenth),
        Case("10 nodes", 2 * size, tenth),
        Case("10 nodes, one is away for 300 s", size, tenth, outages=[(100, 400, 0, 1)]),
        Case("10 nodes, all are away for 120 s", size, tenth, outages=[(100, 220, 0, tenth)]),
        Case("10 nodes, the head is killed", size, tenth, dies_at=[150.0]),
        Case("25 nodes, one of four heads, with its CPU", size, 25, head_seconds=head),
        *([] if quick else whole),
    ]


def _apart(case: Case) -> tuple[Case, dict[str, Any]]:
    """Run in a process of its own: its memory is the case's."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(case, result, file=sys.stderr, flush=True)
    return case, result


def print_tables(measured: dict[str, float], results: list[tuple[Case, dict[str, Any]]]) -> None:
    per_second = NODES * RATE / TOKENS
    print(f"| a completion of {TOKENS:,} tokens | CPU ms | cores at {per_second:.0f}/s |")
    print("| --- | ---: | ---: |")
    for stage, value in measured.items():
        if not stage.startswith("bytes"):
            print(f"| {stage} | {value:.3f} | {value * per_second / 1e3:.2f} |")
    for stage in ("bytes while it runs", "bytes in the file"):
        value = measured[stage]
        print(f"\n{stage}: {value:,.0f} a completion, {value * GOAL / 1e9:,.0f} GB for all")
    print(
        "\n| run | completions | s | bound | x | completions/s in the middle | requests | "
        "decisions, µs | MB |"
        "\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for case, r in results:
        print(
            f"| {case.name} | {case.completions:,} | {r['seconds']:,.0f} | {r['bound']:,.0f} | "
            f"{r['seconds'] / r['bound']:.3f} | {r['steady']:.0f} | {r['attempts']:,} | "
            f"{r['cpu_us']:.0f} | {r['mb']:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="no run of all 100 nodes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(Case(**json.loads(options.case)))))
        return
    measured = stages()
    loop = ("HTTP, reply read and checked", "text and vocabulary", "message", "arrays")
    _, first = _apart(Case("10 nodes", 20_000, NODES // 10))
    measured["decisions: limiter, breaker, tasks, rows"] = first["cpu_us"] / 1e3
    head = (sum(measured[stage] for stage in loop) + first["cpu_us"] / 1e3) / 1e3
    results = [_apart(case) for case in cases(head, quick=options.quick)]
    if options.json:
        rows = [{**asdict(case), **result} for case, result in results]
        options.json.write_text(json.dumps({"stages": measured, "runs": rows}, indent=1))
    print_tables(measured, results)


if __name__ == "__main__":
    main()
