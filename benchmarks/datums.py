"""How fast scored rows become datums, and how much memory that takes.

Run: python benchmarks/datums.py [--groups 1000] [--completions 8] [--tokens 2000]

All contenders run in one process on the same data, best of three in CPU time, so
that other work on the machine counts less. Tokens are sampled tokens; the
prompt comes on top. Two floors: bare conversion of the lists to arrays, which any builder must
do, and one copy of the arrays. The peer is a builder as one would write it down, one Python step
per token.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, SamplingSettings, schema
from eval_protocol_rft.record import Score
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._filters import Filters
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import PromptGroup, Trajectory

PROMPT = 200


def record(prompt: Any, ids: list[Any], logprobs: list[Any], rewards: list[float]) -> dict:
    """`execution_metadata.extra` as a rollout leaves it."""
    n = len(ids)
    return {
        "rft_schema": 1,
        "prompt_ids": prompt,
        "completion_ids": ids,
        "inference_logprobs": logprobs,
        "completions_text": [""] * n,
        "truncated": [False] * n,
        "finish_reasons": ["stop"] * n,
        "rewards": rewards,
        "sampling": {
            "model": "m",
            "tokenizer": "t",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "n": n,
            "indices": list(range(n)),
            "seeds": [None] * n,
            "policy_versions": ["v1"] * n,
            "request_ids": [None] * n,
            "attempts": [1] * n,
            "seconds": [1.0] * n,
        },
    }


def row(name: str, extra: dict) -> dict:
    return {
        "input_metadata": {"row_id": name},
        "execution_metadata": {"experiment_id": "e", "extra": extra},
        "rollout_status": {"code": 100},
    }


def array_rows(groups: int, completions: int, tokens: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for g in range(groups):
        extra = record(
            rng.integers(0, 150_000, PROMPT),
            list(rng.integers(0, 150_000, (completions, tokens))),
            list(-rng.exponential(1.0, (completions, tokens)).astype(np.float32)),
            (np.arange(completions) % 2).astype(float).tolist(),
        )
        rows.append(row(f"row-{g}", extra))
    return rows


def list_rows(rows: list[dict]) -> list[dict]:
    return [
        row(
            r["input_metadata"]["row_id"],
            record(
                (x := r["execution_metadata"]["extra"])["prompt_ids"].tolist(),
                [ids.tolist() for ids in x["completion_ids"]],
                [values.tolist() for values in x["inference_logprobs"]],
                x["rewards"],
            ),
        )
        for r in rows
    ]


def arrow_table(rows: list[dict]) -> pa.Table:
    """Columns of lists, as a Parquet file of rollouts gives them."""
    extras = [r["execution_metadata"]["extra"] for r in rows]
    nested = {}
    for name, kind in (("completion_ids", pa.int64()), ("inference_logprobs", pa.float32())):
        inner = [len(ids) for x in extras for ids in x[name]]
        outer = [len(x[name]) for x in extras]
        values = pa.array(np.concatenate([ids for x in extras for ids in x[name]]), kind)
        middle = pa.ListArray.from_arrays(np.cumsum([0, *inner]).astype(np.int32), values)
        nested[name] = pa.ListArray.from_arrays(np.cumsum([0, *outer]).astype(np.int32), middle)
    prompts = pa.array([x["prompt_ids"] for x in extras], pa.list_(pa.int64()))
    return pa.table({"prompt_ids": prompts, **nested})


def rows_of_table(table: pa.Table, rows: list[dict]) -> Iterator[dict]:
    """Rows whose token data are views into the table's columns; the rest is as in `rows`."""
    prompts = table["prompt_ids"].chunk(0)
    columns = [table[name].chunk(0) for name in ("completion_ids", "inference_logprobs")]
    prompt_values, prompt_at = prompts.values.to_numpy(), prompts.offsets.to_numpy()
    outer = columns[0].offsets.to_numpy()
    inner = columns[0].values.offsets.to_numpy()
    ids, values = (column.values.values.to_numpy() for column in columns)
    for g, source in enumerate(rows):
        spans = [(inner[i], inner[i + 1]) for i in range(outer[g], outer[g + 1])]
        extra = {
            **source["execution_metadata"]["extra"],
            "prompt_ids": prompt_values[prompt_at[g] : prompt_at[g + 1]],
            "completion_ids": [ids[a:b] for a, b in spans],
            "inference_logprobs": [values[a:b] for a, b in spans],
        }
        yield row(source["input_metadata"]["row_id"], extra)


def sequence_table(rows: list[dict]) -> pa.Table:
    """Columns in the layout of a trajectory, prompt and completion together."""
    batch = build_batch(rows, filters=Filters(zero_variance="keep", min_group_size=1))
    sizes = [len(datum) + 1 for datum in batch.datums]
    offsets = np.cumsum([0, *sizes]).astype(np.int32)

    def column(pieces: list[Any], kind: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(pieces), kind))

    first = np.zeros(1, np.float32)
    datums = batch.datums
    tokens = [piece for d in datums for piece in (d.input_tokens[:1], d.target_tokens)]
    logprobs = [piece for d in datums for piece in (first, d.logprobs)]
    mask = [piece for d in datums for piece in (first, d.weights)]
    return pa.table(
        {
            "tokens": column(tokens, pa.int64()),
            "logprobs": column(logprobs, pa.float32()),
            "loss_mask": column(mask, pa.float32()),
            "reward": [d.reward for d in datums],
            "prompt_length": [d.prompt_length for d in datums],
            "row": [d.row_id for d in datums],
        }
    )


def groups_of_sequences(table: pa.Table) -> Iterator[PromptGroup]:
    """Trajectories as views of the columns, which whoever wrote them has checked."""
    columns = [table[name].chunk(0) for name in ("tokens", "logprobs", "loss_mask")]
    tokens, logprobs, mask = (column.values.to_numpy() for column in columns)
    ends = columns[0].offsets.to_numpy().tolist()
    rest = [table[name].to_pylist() for name in ("row", "reward", "prompt_length")]
    sequences = zip(ends, ends[1:], *rest, strict=False)
    for name, members in itertools.groupby(sequences, key=lambda sequence: sequence[2]):
        trajectories = tuple(
            Trajectory(
                tokens=tokens[start:stop],
                logprobs=logprobs[start:stop],
                loss_mask=mask[start:stop],
                reward=reward,
                row_id=name,
                prompt_length=prompt_length,
                num_sampled=stop - start - prompt_length,
            )
            for start, stop, _, reward, prompt_length in members
        )
        yield PromptGroup(key=name, trajectories=trajectories)


def bare_conversion(rows: list[dict]) -> list[Any]:
    out = []
    for r in rows:
        x = r["execution_metadata"]["extra"]
        out.append(np.asarray(x["prompt_ids"], np.int64))
        out.extend(np.asarray(ids, np.int64) for ids in x["completion_ids"])
        out.extend(np.asarray(values, np.float32) for values in x["inference_logprobs"])
    return out


def bare_copy(rows: list[dict]) -> list[Any]:
    """Every array that a datum owns, written once: tokens, logprobs, advantages, weights."""
    out = []
    for r in rows:
        x = r["execution_metadata"]["extra"]
        out.extend(np.concatenate([x["prompt_ids"], ids]) for ids in x["completion_ids"])
        for values in x["inference_logprobs"]:
            size = PROMPT + len(values)
            out.append(np.concatenate([np.zeros(PROMPT, np.float32), values]))
            out.append(np.ones(size, np.float32))
            out.append(np.ones(size, np.float32))
    return out


def per_token_builder(rows: list[dict]) -> list[Any]:
    """The peer: GRPO datums, one Python step per token."""
    out = []
    for r in rows:
        x = r["execution_metadata"]["extra"]
        rewards = np.array(x["rewards"])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for ids, values, advantage in zip(
            x["completion_ids"], x["inference_logprobs"], advantages.tolist(), strict=True
        ):
            tokens = list(x["prompt_ids"])
            logprobs, spread, mask = ([0.0] * (len(tokens) - 1) for _ in range(3))
            for token, value in zip(ids, values, strict=True):
                tokens.append(token)
                logprobs.append(value)
                spread.append(advantage)
                mask.append(1.0)
            out.append(
                (
                    np.array(tokens[:-1], np.int64),
                    np.array(tokens[1:], np.int64),
                    np.array(logprobs, np.float32),
                    np.array(spread, np.float32),
                    np.array(mask, np.float32),
                )
            )
    return out


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(work: Callable[[], Any], repeat: int = 3) -> tuple[float, float]:
    """Best CPU seconds (all of it is one thread), and the peak of memory above what was there
    before, in MiB."""
    best, peak = float("inf"), 0.0
    for _ in range(repeat):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier work freed (glibc)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
        before = memory_kib("VmRSS")
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
        peak = max(peak, (memory_kib("VmHWM") - before) / 1024)
        del result
    return best, peak


@dataclass
class Comparison:
    """Lines of the table; ratios are to the first line."""

    tokens: int
    floor: float | None = None

    def line(self, name: str, work: Callable[[], Any]) -> None:
        seconds, peak = measure(work)
        self.floor = self.floor or seconds
        rate, ratio = self.tokens / seconds / 1e6, seconds / self.floor
        print(f"{name:44}{rate:9.1f}{ratio:9.2f}{peak:10.0f}", flush=True)


def compare_arrays(rows: list[dict], tokens: int) -> None:
    table, sequences = arrow_table(rows), sequence_table(rows)
    groups = group_rows(rows)
    comparison = Comparison(tokens)
    comparison.line("arrays: one bare copy (floor)", lambda: bare_copy(rows))
    comparison.line("arrays: build_batch, numpy rows", lambda: build_batch(rows))
    comparison.line(
        "arrays: build_batch, Arrow table", lambda: build_batch(rows_of_table(table, rows))
    )
    comparison.line(
        "arrays: build_batch, Arrow table of sequences",
        lambda: build_batch(groups_of_sequences(sequences)),
    )
    comparison.line("arrays: build_batch, prompt groups", lambda: build_batch(groups))


def write_file(path: Path, rows: list[dict]) -> None:
    """The same rollouts as a rollout file."""
    sampling = SamplingSettings(model="m", tokenizer="t", temperature=1, top_p=1, top_k=0, n=1)
    completions = (
        CompletionRow(
            row_id=r["input_metadata"]["row_id"],
            data_idx=g,
            sample_idx=i,
            prompt="-",
            prompt_ids=x["prompt_ids"].astype(np.int32),
            completion_ids=ids.astype(np.int32),
            logprobs=logprobs,
            response="",
            finish_reason="stop",
            truncated=False,
            scores={"reward": Score(reward=x["rewards"][i])},
        )
        for g, r in enumerate(rows)
        for x in [r["execution_metadata"]["extra"]]
        for i, (ids, logprobs) in enumerate(
            zip(x["completion_ids"], x["inference_logprobs"], strict=True)
        )
    )
    write_rows(path, schema(FileMetadata(sampling=sampling), {}), completions)


def compare_files(rows: list[dict], tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.parquet"
        write_file(path, rows)
        data = RolloutDataset(path)
        comparison = Comparison(tokens)
        comparison.line("file: columns read (floor)", lambda: [None for _ in data.tables()])
        comparison.line("file: build_batch", lambda: build_batch(group_rows(data.prompt_groups())))


def compare_lists(rows: list[dict], tokens: int) -> None:
    comparison = Comparison(tokens)
    comparison.line("lists: bare np.asarray (floor)", lambda: bare_conversion(rows))
    comparison.line("lists: build_batch", lambda: build_batch(rows))
    comparison.line("lists: per-token Python builder (peer)", lambda: per_token_builder(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    total = args.groups * args.completions * args.tokens
    print(f"{args.groups} groups x {args.completions} x {args.tokens} tokens, prompt {PROMPT}")
    print(f"{'':44}{'Mtok/s':>9}{'x floor':>9}{'peak MiB':>10}")
    rows = array_rows(args.groups, args.completions, args.tokens)
    compare_arrays(rows, total)
    compare_files(rows, total)
    rows = list_rows(rows)
    compare_lists(rows, total)


if __name__ == "__main__":
    main()
