"""What a completion costs the client beside its peers, when the server takes a second for each.

    python benchmarks/clients.py [--in-flight 32 128 512 1024] [--repeats 2] [--json FILE]

Every peer runs in a process of its own, the server in another, both on this machine. A peer that
does not end with exactly the tokens that were served ends the benchmark. See README.md beside this
file, and docs/performance.md for what came out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import msgspec
from client_peers import PEERS, Job, Level
from report import machine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rollouts import HERE, BenchmarkError, _python
from workload import Measurement, Workload, build_workload

from eval_protocol_rft.local.models import bundled_model_path

LABELS = {
    "bare": "bare aiohttp + orjson",
    "sampler": "ours: HttpSampler",
    "bare_streamed": "bare, streamed",
    "streamed": "ours: HttpSampler, streamed",
    "bare_streamed_32": "bare, streamed by 32",
    "streamed_32": "ours: streamed by 32",
    "processor": "ours: processor",
    "deployment_sampler": "Fireworks' DeploymentSampler",
    "openai": "openai client",
    "ep_client": "Eval Protocol's client",
    "litellm": "litellm, SingleTurn",
}
FLOORS = {"streamed": "bare_streamed", "streamed_32": "bare_streamed_32"}
"""What a peer is compared with, where that is not `bare`: the least that reads the same stream."""
REPEATED = ("bare", "sampler", "processor", *FLOORS, *FLOORS.values())
"""Their ratios are near one, so they run in every repeat; the others differ by much more than any
noise and run in the first."""
WAVES = 3
"""Completions of one run over those in flight."""
WAVES_OF_OTHERS = {32: 2, 128: 2}
"""One wave of the slower peers is enough where it takes them ten seconds and more."""
N = 8
TOKENS = 512
NO_IDS = ("litellm",)
"""Peers whose replies hold no token ids to be summed up."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One peer at one number in flight; medians over the repeats."""

    peer: str
    in_flight: int
    completions: int
    per_second: float
    cpu_ms: float
    """Of the client process, per completion."""
    speed_over_bare: float
    """Throughput over its floor's in the same repeat."""
    cpu_over_bare: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What charts.py draws."""

    seconds: float
    tokens: int
    points: list[Point]
    machine: dict[str, str | int | None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the peers and print a table."""
    options = _options(arguments)
    runs: dict[tuple[str, int], list[Measurement]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        workload = build_workload(
            options.tokenizer or str(bundled_model_path("arithmetic")),
            rows=WAVES * max(options.in_flight) // N,
            n=N,
            tokens=options.tokens,
            prompt_characters=200,
            concurrency=1,
        )
        # One reply: the sum over a run says by itself whether all of it arrived.
        workload = msgspec.structs.replace(workload, replies=workload.replies[:1])
        workload.save(path)
        for repeat in range(options.repeats):
            # In turn from the other end, so that a drift of the machine favours none.
            for peer in options.peers[:: -1 if repeat % 2 else 1]:
                if repeat and peer not in REPEATED:
                    continue
                levels = [_level(peer, in_flight) for in_flight in options.in_flight]
                for level, run in zip(levels, _run(peer, path, levels, options), strict=True):
                    _check(peer, level, run, workload)
                    _progress(peer, level, run)
                    runs.setdefault((peer, level.in_flight), []).append(run)
    result = Result(
        seconds=options.seconds, tokens=options.tokens, points=_points(runs), machine=machine()
    )
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    _print_table(result)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="latency of a reply")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each completion")
    parser.add_argument("--tokens-per-second", type=float, help="of a stream; default: all at once")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokenizer", help="folder or hub id; default: the bundled model's")
    parser.add_argument("--json", type=Path, help="write the result here, for charts.py")
    return parser.parse_args(arguments)


def _level(peer: str, in_flight: int) -> Level:
    waves = WAVES if peer in REPEATED else WAVES_OF_OTHERS.get(in_flight, 1)
    return Level(in_flight=in_flight, rows=waves * in_flight // N)


@contextmanager
def slow_server(workload: Path, *arguments: str) -> Iterator[str]:
    """A fresh server's base URL; it ends when its standard input is closed."""
    command = [sys.executable, str(HERE / "slow_stub.py"), str(workload), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/inference/v1"


def _run(
    peer: str, workload: Path, levels: list[Level], options: argparse.Namespace
) -> list[Measurement]:
    result, job = workload.with_name("result.json"), workload.with_name("job.json")
    result.unlink(missing_ok=True)
    pace = options.tokens_per_second
    paced = ["--tokens-per-second", str(pace)] if pace else []
    with slow_server(workload, "--seconds", str(options.seconds), *paced) as url:
        job.write_bytes(
            msgspec.json.encode(
                Job(workload=str(workload), url=url, levels=levels, result=str(result))
            )
        )
        _python([str(HERE / "client_peers.py"), peer, str(job)])
    return msgspec.json.decode(result.read_bytes(), type=list[Measurement])


def _check(peer: str, level: Level, run: Measurement, workload: Workload) -> None:
    completions = level.rows * workload.n
    if (run.completions, run.tokens) != (completions, completions * workload.max_tokens):
        raise BenchmarkError(f"{peer} got {run.completions} completions, {run.tokens} tokens")
    [reply] = workload.replies
    expected = completions * (sum(reply.token_ids) + sum(reply.sampling_logprobs))
    if peer not in NO_IDS and abs(run.checksum - expected) > 1e-9 * expected:
        raise BenchmarkError(f"{peer} got other tokens: they sum to {run.checksum}, not {expected}")


def _points(runs: dict[tuple[str, int], list[Measurement]]) -> list[Point]:
    points = []
    for (peer, in_flight), of_peer in runs.items():
        floor = runs[FLOORS.get(peer, "bare"), in_flight]
        pairs = list(zip(of_peer, floor, strict=False))
        points.append(
            Point(
                peer=peer,
                in_flight=in_flight,
                completions=of_peer[0].completions,
                per_second=median(map(_speed, of_peer)),
                cpu_ms=median(map(_cpu_ms, of_peer)),
                speed_over_bare=median(_speed(run) / _speed(bare) for run, bare in pairs),
                cpu_over_bare=median(_cpu_ms(run) / _cpu_ms(bare) for run, bare in pairs),
            )
        )
    return points


def _speed(run: Measurement) -> float:
    return run.completions / run.wall_s


def _cpu_ms(run: Measurement) -> float:
    return 1e3 * run.cpu_s / run.completions


def _progress(peer: str, level: Level, run: Measurement) -> None:
    print(
        f"{peer:20}{level.in_flight:5} in flight, {_speed(run):6.0f} completions/s, "
        f"{_cpu_ms(run):6.2f} ms of CPU each, {1e6 * run.cpu_s / run.tokens:.2f} us a token",
        file=sys.stderr,
        flush=True,
    )


def _print_table(result: Result) -> None:
    table = Table(
        title=f"{result.tokens} tokens after {result.seconds:g} s: completions/s, CPU ms of each, "
        "times its floor's",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    levels = sorted({point.in_flight for point in result.points})
    table.add_column("in flight", no_wrap=True)
    for level in levels:
        table.add_column(str(level), justify="right", no_wrap=True)
    by_key = {(point.peer, point.in_flight): point for point in result.points}
    for peer in dict.fromkeys(point.peer for point in result.points):
        points = [by_key[peer, level] for level in levels]
        cells = [f"{p.per_second:,.0f} {p.cpu_ms:6.2f} {p.cpu_over_bare:5.2f}x" for p in points]
        table.add_row(LABELS[peer], *cells)
    Console(width=124).print(table)


if __name__ == "__main__":
    main()
