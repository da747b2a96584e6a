"""What `stats`, `filter` and `sql` cost on a large rollout file, beside another checkout.

    python benchmarks/bulk_statistics.py [--completions 1000000] [--tokens 64] [--before FOLDER]

Every measurement is a process of its own; the two checkouts take turns. Wall time, CPU time and
what the peak of memory adds to that of an interpreter with its imports. The results of both
checkouts must be the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

HERE = Path(__file__).resolve().parent.parent
GROUP = 8
"""Completions of a prompt."""
TABLE_ROWS = 4096

_MEASURED = """
import re, sys, time
path, output = sys.argv[1:]
import numpy, pyarrow, msgspec
from eval_protocol_rft import data
from eval_protocol_rft.data import FilterRules, filter_rollouts, rollout_stats

def peak():  # not ru_maxrss, which begins with that of the process before exec
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

data.RolloutDataset, data.REASONS
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
{work}
print(time.perf_counter() - wall, time.process_time() - cpu, peak() - before, told)
"""
_RULES = {
    "filter, on rewards and lengths": "pass_rate=data.parse_band('0.1:0.9'), min_tokens=8",
    "filter, all kinds": "dedupe_prompts=True, reward_percentile=data.parse_band('10:90'), "
    "drop_zero_variance=True, drop_truncated=True, reward_min=0.1, dedupe_completions=True, "
    "min_completions=2",
}
_SQL = "select num_passed, count(*), avg(mean_reward) from rollouts group by all order by all"
WORK = {
    "stats": "s = rollout_stats(path, progress=False)\n"
    "told = hash((s.tokens, s.rewards.mean, s.pass_at_k[-1].value, s.per_group[99].row_id))",
    **{
        name: f"s = filter_rollouts(path, output, FilterRules({rules}), overwrite=True, "
        "progress=False)\ntold = s.kept"
        for name, rules in _RULES.items()
    },
}
ONLY_HERE = {
    "filter --where": "s = filter_rollouts(path, output, FilterRules("
    "where='reward > mean_reward and tokens < 200'), overwrite=True, progress=False)\n"
    "told = s.kept",
    "sql": f"with data.run_query(path, {_SQL!r}, progress=False) as batches:\n"
    "    told = sum(len(batch) for batch in batches)",
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=64, help="mean of a completion")
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.parquet"
        write(path, options.completions, options.tokens)
        print(f"{options.completions:,} completions, {path.stat().st_size / 1e6:,.0f} MB")
        print(f"{'':32}{'':8}{'wall s':>8}{'CPU s':>8}{'MB':>8}")
        for name, work in (WORK | ONLY_HERE).items():
            checkouts = {"here": HERE}
            if options.before and name in WORK:
                checkouts = {"before": options.before.resolve()} | checkouts
            told = set()
            for _ in range(options.repeats):
                for which, checkout in checkouts.items():
                    wall, cpu, memory, result = measure(work, checkout, path)
                    told.add(result)
                    print(f"{name:32}{which:8}{wall:8.2f}{cpu:8.2f}{memory:8.0f}", flush=True)
            assert len(told) == 1, f"{name}: the results differ: {told}"


def measure(work: str, checkout: Path, path: Path) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds and megabytes that one piece of work takes, and what came of it."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(work=work), path, path.with_name("out.parquet")],
        env=os.environ | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0"},
        cwd=path.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall, cpu, memory, told = done.stdout.split()
    return float(wall), float(cpu), float(memory), told


def write(path: Path, completions: int, tokens: int) -> None:
    """A file as `generate` and `score` leave it: 1 % failed, 2 % of the others unscored."""
    from eval_protocol_rft.data._files import write_file
    from eval_protocol_rft.data._format import FileMetadata, SamplingSettings, schema

    sampling = SamplingSettings(model="m", temperature=1, top_p=1, top_k=0, n=GROUP)
    kinds = schema(FileMetadata(sampling=sampling), {})
    write_file(path, kinds, tables(kinds, completions, tokens))


def tables(kinds: pa.Schema, completions: int, tokens: int) -> Iterator[pa.Table]:
    """The rows, a row group at a time."""
    rng = np.random.default_rng(0)
    for start in range(0, completions, TABLE_ROWS):
        rows = np.arange(start, min(start + TABLE_ROWS, completions))
        n, prompts = len(rows), rows // GROUP
        failed = rng.random(n) < 0.01
        unscored = failed | (rng.random(n) < 0.02)
        sizes = np.clip(rng.geometric(1 / tokens, n), 1, 4 * tokens)
        sizes[failed] = 0
        ends = np.append(0, np.cumsum(sizes)).astype(np.int32)
        prompt_ends = pa.array(np.arange(n + 1, dtype=np.int32) * 20)
        ids = pa.array(rng.zipf(1.3, ends[-1]).clip(max=150_000).astype(np.int32))
        logprobs = pa.array(-rng.exponential(0.3, ends[-1]).astype(np.float32))
        rewards = np.round(rng.random(n) * 20) / 20 * (rng.random(n) < 0.6) + (rng.random(n) < 0.1)
        columns = {
            "row_id": pa.array([f"d-{i}" for i in prompts]),
            "data_idx": pa.array(prompts),
            "sample_idx": pa.array(rows % GROUP),
            "prompt": pa.array([f"What is {i} + {i}? Think step by step." for i in prompts]),
            "response": pa.array([f"It is {i}." for i in rows], mask=failed),
            "prompt_ids": pa.ListArray.from_arrays(
                prompt_ends, pa.array(np.tile(np.arange(20, dtype=np.int32), n))
            ),
            "completion_ids": pa.ListArray.from_arrays(ends, ids, mask=pa.array(failed)),
            "logprobs": pa.ListArray.from_arrays(ends, logprobs, mask=pa.array(failed)),
            "finish_reason": pa.array(["stop"] * n, mask=failed),
            "truncated": pa.array(sizes == 4 * tokens, mask=failed),
            "reward": pa.array(rewards, mask=unscored),
            "reward_error": pa.array(["ValueError: no number"] * n, mask=failed | ~unscored),
            "metrics": pa.array(['{"format": 1.0}'] * n, mask=failed),
            "error": pa.array(["HTTP 500"] * n, mask=~failed),
            "error_kind": pa.array(["unavailable"] * n, mask=~failed),
        }
        empty = {name: pa.nulls(n, kinds.field(name).type) for name in kinds.names}
        yield pa.Table.from_pydict(
            {name: columns.get(name, empty[name]).cast(kinds.field(name).type) for name in empty},
            schema=kinds,
        )


if __name__ == "__main__":
    main()
