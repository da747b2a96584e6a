"""What a rollout costs: our processor, Eval Protocol's own client, a bare loop, and nothing at all.

    python benchmarks/rollouts.py [--rows 200] [--completions 8] [--tokens 500] [--json]

Every peer runs in a process of its own against an instant server in another, with Eval Protocol's
database off; the order rotates from repeat to repeat. A peer that does not end with exactly the
tokens and logprobs that were served ends the benchmark. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
from report import Imports, Report, Settings, print_table
from workload import WARM_UP_ROWS, Measurement, Workload, build_workload

from eval_protocol_rft.local.models import bundled_model_path

HERE = Path(__file__).parent
PEERS = ("ours", "client", "bare", "canned")


class BenchmarkError(RuntimeError):
    """A peer failed, or its tokens are not the ones that were served."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every peer `--repeats` times and print medians."""
    options = _options(arguments)
    settings = Settings(
        rows=options.rows,
        completions=options.completions,
        tokens=options.tokens,
        prompt_characters=options.prompt_characters,
        concurrency=options.concurrency,
        repeats=options.repeats,
        tokenizer=options.tokenizer or "arithmetic (bundled)",
    )
    runs: dict[str, list[Measurement]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        workload = build_workload(
            options.tokenizer or str(bundled_model_path("arithmetic")),
            rows=options.rows,
            n=options.completions,
            tokens=options.tokens,
            prompt_characters=options.prompt_characters,
            concurrency=options.concurrency,
        )
        workload.save(path)
        for repeat in range(options.repeats):
            first = repeat % len(PEERS)
            for peer in (*PEERS[first:], *PEERS[:first]):
                runs[peer].append(_run(peer, path))
                _progress(repeat, peer, runs[peer][-1])
                _check(peer, runs, workload)
    report = Report(
        settings=settings, runs=runs, imports=[_time_imports() for _ in range(options.repeats)]
    )
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report.as_dict())).decode())
    else:
        print_table(report)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--completions", type=int, default=8, help="per row")
    parser.add_argument("--tokens", type=int, default=500, help="per completion")
    parser.add_argument("--prompt-characters", type=int, default=200, help="per user message")
    parser.add_argument("--concurrency", type=int, default=96, help="requests in flight")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tokenizer", help="folder or hub id; default: the bundled model's")
    parser.add_argument("--json", action="store_true", help="everything as JSON, no table")
    return parser.parse_args(arguments)


@contextmanager
def _stub(workload: Path) -> Iterator[str]:
    """A fresh server; it ends when its standard input is closed."""
    command = [sys.executable, str(HERE / "stub.py"), str(workload)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/inference"


def _run(peer: str, workload: Path) -> Measurement:
    result = workload.with_name("result.json")
    result.unlink(missing_ok=True)
    with _stub(workload) as url:
        if peer == "bare":
            _python([str(HERE / "bare_loop.py"), str(workload), url, str(result)])
        else:
            _python(
                ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "evaluation.py")],
                ROLLOUT_PEER=peer,
                ROLLOUT_WORKLOAD=str(workload),
                ROLLOUT_URL=url,
                ROLLOUT_RESULT=str(result),
            )
    return msgspec.json.decode(result.read_bytes(), type=Measurement)


def _python(arguments: list[str], **variables: str) -> str:
    """Run this interpreter with no setting of the user's that changes what is measured."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EP_", "FIREWORKS_", "PYTEST_"))
    }
    environment = {
        **kept,
        "DISABLE_EP_SQLITE_LOG": "1",
        "EP_NO_UPLOAD": "1",
        "EP_DISABLE_AUTO_BROWSER": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _check(peer: str, runs: dict[str, list[Measurement]], workload: Workload) -> None:
    run = runs[peer][-1]
    completions = (len(workload.questions) - WARM_UP_ROWS) * workload.n
    if (run.completions, run.tokens) != (completions, completions * workload.max_tokens):
        raise BenchmarkError(f"{peer} got {run.completions} completions, {run.tokens} tokens")
    sums = {r.checksum for of_peer in runs.values() for r in of_peer}
    if len(sums) > 1:
        raise BenchmarkError(f"{peer} got other tokens or logprobs: the sums are {sorted(sums)}")


def _time_imports() -> Imports:
    under_test, on_top = _import_seconds(
        "from eval_protocol.pytest import evaluation_test",
        "from eval_protocol_rft import FireworksTrainingRolloutProcessor",
    )
    (alone,) = _import_seconds("import eval_protocol_rft")
    return Imports(eval_protocol_s=under_test, on_top_s=on_top, alone_s=alone)


def _import_seconds(*statements: str) -> list[float]:
    """CPU seconds of each statement, one after the other in a fresh process."""
    clock = "times.append(time.process_time())"
    code = "; ".join(
        ["import time", "times = []", clock, *(f"{line}; {clock}" for line in statements)]
    )
    times = json.loads(_python(["-c", f"{code}; print(times)"]).splitlines()[-1])
    return [after - before for before, after in pairwise(times)]


def _progress(repeat: int, peer: str, run: Measurement) -> None:
    print(
        f"{repeat + 1}: {peer:8} {run.completions / run.wall_s:7.0f} completions/s, "
        f"{1e3 * run.cpu_s / run.completions:6.2f} ms of CPU each",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
