"""What it costs to store rollouts: bytes and time per token, syncs, and memory.

Run: python benchmarks/store.py [--groups 400] [--rows 1000000]

Tokens are real text: sources of Python's standard library, through a byte-pair tokenizer of 32,000
tokens that is trained on them first, its ids spread in order over a vocabulary of 152,000. Logprobs
are what a softmax in float32 leaves: mostly near 0, the rest on the grid of 16-bit logits. Eight
completions share a prompt and nothing else, which favours nobody who compresses.

All contenders write the same data in one process, in turn, best of three in CPU time. The floor is
`np.save` of the bare arrays. Memory is the peak of fresh processes that store few and many rows.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_file, write_rows
from eval_protocol_rft.data._format import ARRAY_COLUMNS, CompletionRow, FileMetadata, schema
from eval_protocol_rft.data._job_store import JobStore, parts_folder, row_keys
from eval_protocol_rft.data._row_groups import tables_of, to_record_batch

SCHEMA = schema(FileMetadata(), {})
COMPLETIONS, TOKENS, PROMPT = 8, 500, 150
VOCABULARY, TRAINED = 152_000, 32_000
KEYS_OF = functools.partial(row_keys, position=None)


# Data


def token_stream(count: int) -> np.ndarray:
    """[count] ids of text, as a tokenizer with a large vocabulary would give them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Path(os.__file__).parent
    paths = [path for path in sorted(library.glob("**/*.py")) if "site-packages" not in path.parts]
    # Tables and generated tests repeat themselves more than any text does.
    paths = [path for path in paths if not {"test", "tests", "encodings"} & {*path.parts}]
    random.Random(0).shuffle(paths)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=TRAINED, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text).ids
        if len(ids) >= count:
            break
    if len(ids) < count:
        raise SystemExit(f"the standard library has {len(ids):,} tokens, not {count:,}")
    spread = np.sort(np.random.default_rng(0).choice(VOCABULARY, TRAINED, replace=False))
    return spread[ids[:count]].astype(np.int32)


def logprob_stream(count: int) -> np.ndarray:
    """[count] float32 logprobs: four of five of the likeliest token, with probability near 1."""
    rng = np.random.default_rng(1)
    others = np.exp(rng.normal(-4, 4, count)).astype(np.float32)
    best = -np.log(np.float32(1) + others)
    gap = (np.round(rng.exponential(2, count) * 8) / 8).astype(np.float32)
    return np.where(rng.random(count) < 0.2, best - gap, best)


def completion_rows(groups: int) -> list[CompletionRow]:
    size = groups * (COMPLETIONS * TOKENS + PROMPT)
    ids = token_stream(size).reshape(groups, -1)
    logprobs = logprob_stream(groups * COMPLETIONS * TOKENS).reshape(groups, COMPLETIONS, TOKENS)
    return [
        CompletionRow(
            row_id=f"row-{i}",
            data_idx=i,
            sample_idx=k,
            prompt=f"question {i}",
            prompt_ids=ids[i, :PROMPT],
            completion_ids=ids[i, PROMPT + k * TOKENS : PROMPT + (k + 1) * TOKENS],
            logprobs=logprobs[i, k],
            finish_reason="stop",
            truncated=False,
            seed=8 * i + k,
            attempts=1,
            seconds=1.5,
        )
        for i in range(groups)
        for k in range(COMPLETIONS)
    ]


# Size and speed


def save_arrays(path: Path, rows: list[CompletionRow]) -> None:
    """The floor: the numbers alone, end to end."""
    with path.open("wb") as file:
        for name in ("prompt_ids", "completion_ids", "logprobs"):
            np.save(file, np.concatenate([getattr(row, name) for row in rows]))


def write_defaults(path: Path, rows: list[CompletionRow]) -> None:
    """The peer: the same table as pyarrow writes it unless told otherwise."""
    pq.write_table(pa.concat_tables(tables_of(rows, SCHEMA)), path)


@dataclass
class Contest:
    """Lines of the table; times are relative to the first line."""

    rows: list[CompletionRow]
    folder: Path
    floor: float | None = None

    def line(self, name: str, file: str, work: Callable[[Path], object]) -> None:
        sampled = sum(row.num_tokens for row in self.rows)
        stored = sampled + sum(len(row.prompt_ids) for row in self.rows)
        path = self.folder / file
        seconds = min(cpu_seconds(functools.partial(work, path)) for _ in range(3))
        self.floor = self.floor or seconds
        size = path.stat().st_size
        print(
            f"{name:38}{size / sampled:10.2f}{size / stored:10.2f}{sampled / seconds / 1e6:10.1f}"
            f"{seconds / self.floor:10.2f}",
            flush=True,
        )


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare_writers(rows: list[CompletionRow], folder: Path) -> None:
    contest = Contest(rows, folder)
    tables = list(tables_of(rows, SCHEMA))
    print(f"{'':38}{'B/sampled':>10}{'B/id':>10}{'Mtok/s':>10}{'x floor':>10}")
    contest.line("np.save of the arrays (floor)", "a.npy", lambda p: save_arrays(p, rows))
    contest.line("pyarrow's defaults", "b.parquet", lambda p: write_defaults(p, rows))
    contest.line("rollout file, from rows", "c.parquet", lambda p: write_rows(p, SCHEMA, rows))
    contest.line(
        "rollout file, from Arrow tables", "d.parquet", lambda p: write_file(p, SCHEMA, tables)
    )
    contest.line("JSON lines, from rows", "e.jsonl", lambda p: write_rows(p, SCHEMA, rows))
    metadata = pq.read_metadata(folder / "c.parquet")
    chunks = [
        metadata.row_group(i).column(j)
        for i in range(metadata.num_row_groups)
        for j in range(metadata.num_columns)
    ]
    for name in ARRAY_COLUMNS[:3]:
        own = [chunk for chunk in chunks if chunk.path_in_schema.startswith(f"{name}.")]
        size = sum(chunk.total_compressed_size for chunk in own)
        print(f"  {name}: {size / sum(chunk.num_values for chunk in own):.2f} bytes a value")
    seconds = min(cpu_seconds(lambda: list(RolloutDataset(folder / "c.parquet"))) for _ in range(3))
    sampled = sum(row.num_tokens for row in rows)
    print(f"  read back into rows: {sampled / seconds / 1e6:.1f} Mtok/s")


# Syncs


def compare_syncs(rows: list[CompletionRow], folder: Path) -> None:
    """Wall time: waiting for the disk is what this is about."""
    print(f"\n{'rows per append':38}{'rows/s':>10}{'Mtok/s':>10}{'x bare':>10}")
    for size in (1, 16, 256):
        batches = list(batches_of(rows[: min(len(rows), 200 * size)], size))
        with (folder / "bare").open("wb", buffering=0) as bare:
            start = time.perf_counter()
            for batch in batches:
                bare.write(batch.serialize())
                os.fsync(bare.fileno())
            floor = time.perf_counter() - start
        store = JobStore(parts_folder(folder / f"{size}.parquet"), SCHEMA, KEYS_OF)
        start = time.perf_counter()
        for batch in batches:
            store.append(batch)
        seconds = time.perf_counter() - start
        store.close()
        count = sum(batch.num_rows for batch in batches)
        print(
            f"{size:<38}{count / seconds:10,.0f}{count * TOKENS / seconds / 1e6:10.2f}"
            f"{seconds / floor:10.2f}"
        )


def batches_of(rows: list[CompletionRow], size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        yield to_record_batch(rows[start : start + size], SCHEMA)


# Memory


def store_and_finish(output: Path, count: int) -> None:
    """What a job does with rows of 64 tokens, 64 at a time: store, look what is there, finish."""
    rng = np.random.default_rng(0)
    store = JobStore(parts_folder(output), SCHEMA, KEYS_OF)
    for start in range(0, count, 64):
        ids = rng.integers(0, VOCABULARY, (64, 64)).astype(np.int32)
        logprobs = -rng.random((64, 64)).astype(np.float32)
        rows = [
            CompletionRow(
                row_id=f"row-{i}",
                data_idx=i // COMPLETIONS,
                sample_idx=i % COMPLETIONS,
                prompt=f"question {i // COMPLETIONS}",
                response="x" * 200,
                prompt_ids=ids[0],
                completion_ids=ids[i - start],
                logprobs=logprobs[i - start],
            )
            for i in range(start, min(start + 64, count))
        ]
        store.append(to_record_batch(rows, SCHEMA))
    if sum(len(keys) for keys, _ in store.stored()) != count:
        raise SystemExit("rows were lost")
    write_file(output, SCHEMA, store.merged())
    store.remove()


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def compare_memory(most: int, folder: Path) -> None:
    print(f"\n{'rows of 64 tokens':38}{'peak MiB':>10}{'imports':>10}")
    for count in (10_000, most):
        output = folder / f"memory-{count}.parquet"
        command = [sys.executable, __file__, "--store", str(output), "--rows", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{count:<38,}{done.stdout.rstrip()}", flush=True)
        output.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the memory test")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.store:
        imports = peak_mib()
        store_and_finish(args.store, args.rows)
        print(f"{peak_mib():10.0f}{imports:10.0f}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = completion_rows(args.groups)
        print(f"{args.groups} groups x {COMPLETIONS} x {TOKENS} tokens, prompt {PROMPT}")
        compare_writers(rows, folder)
        compare_syncs(rows, folder)
        compare_memory(args.rows, folder)


if __name__ == "__main__":
    main()
