"""A job that stores completions, in a child process under a fate, and what must hold afterwards."""

from __future__ import annotations

import errno
import functools
import os
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import write_file
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, schema
from eval_protocol_rft.data._job_store import (
    KEY_COLUMNS,
    JobStore,
    failed_rows,
    parts_folder,
    read_schema,
    row_keys,
    split_keys,
)
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.record import Score
from tests.data.traced import KILLED, Fate, run_in_child

Pair = tuple[int, int]
FULL = 3
DISK_FULL = (errno.ENOSPC, errno.EIO)
"""What a job ends with; SQLite does not tell why it could not sync, or open, a file."""
ASKED: list[Pair] = [(row, sample) for row in range(7) for sample in range(2)]
SCHEMA = schema(FileMetadata(), {"level": pa.int64()})
KEYS_OF = functools.partial(row_keys, position=None)
_BATCH = 3
_PACKED_ROWS = 5


def row(pair: Pair, generation: int, *, failed: bool = False) -> CompletionRow:
    """The completion of `pair`; its seed says in which generation it was sampled."""
    data_idx, sample_idx = pair
    known = {
        "row_id": f"r{data_idx}",
        "data_idx": data_idx,
        "sample_idx": sample_idx,
        "prompt": f"question {data_idx}",
        "prompt_ids": np.arange(3, dtype=np.int32),
        "original": {"level": data_idx},
        "seed": generation,
    }
    if failed:
        return CompletionRow(**known, error="no answer", error_kind="timeout")
    ids = np.arange(1 + data_idx, dtype=np.int32)
    return CompletionRow(
        **known,
        response=f"answer {pair}",
        completion_ids=ids,
        logprobs=-(ids / 8).astype(np.float32),
        finish_reason="stop",
        truncated=False,
        scores={"reward": Score(reward=float(sample_idx))},
    )


# The job


def run_job(
    output: Path,
    generation: int,
    stored: Callable[[Iterable[Pair]], None],
    *,
    retry_failed: bool = False,
) -> None:
    """Sample what is missing, store it, make the file. Goes on from what is there.

    Args:
        output: the file.
        generation: goes into the rows that this run samples.
        stored: called with the pairs for which `append` has returned.
        retry_failed: a finished file is the base; what failed in it is sampled again.
    """
    base = RolloutDataset(output) if output.is_file() else None
    if base is not None and read_schema(parts_folder(output)) is None and not retry_failed:
        return
    job_store.PACKED_ROWS = _PACKED_ROWS
    store = JobStore(parts_folder(output), SCHEMA, KEYS_OF)
    try:
        done: dict[Pair, bool] = {}
        tables = () if base is None else base.tables([*KEY_COLUMNS, "error"])
        known = [(KEYS_OF(table), failed_rows(table)) for table in tables]
        for keys, failed in [*known, *store.stored()]:
            data_idx, sample_idx = split_keys(keys)
            pairs = zip(data_idx.tolist(), sample_idx.tolist(), strict=True)
            done |= dict(zip(pairs, (~failed).tolist(), strict=True))
        missing = [pair for pair in reversed(ASKED) if not done.get(pair, False)]
        batches = [missing[i : i + _BATCH] for i in range(0, len(missing), _BATCH)]
        for batch in batches:
            try:
                store.append(to_record_batch([row(pair, generation) for pair in batch], SCHEMA))
            except OSError:
                # The disk was full; what comes next may fit, and this comes again at the end.
                if batches.count(batch) > 1:
                    raise
                batches.append(batch)
            else:
                stored(batch)
        write_file(output, SCHEMA, store.merged(() if base is None else base.tables()))
        store.remove()
    finally:
        store.close()


# The child


@dataclass(frozen=True, slots=True)
class Life:
    """What became of a child."""

    killed: bool
    calls: int
    """Of the system, where it lived to the end."""
    stored: list[Pair]
    """For which `append` returned."""


def live(output: Path, generation: int, fate: Fate | None = None, **options: bool) -> Life:
    """Run the job in a child process, under `fate`."""
    reader, writer = os.pipe()

    def work() -> int:
        os.close(reader)

        def stored(pairs: Iterable[Pair]) -> None:
            os.write(writer, b"".join(b"%d %d\n" % pair for pair in pairs))

        try:
            run_job(output, generation, stored, **options)
        except OSError as error:
            traceback.print_exc()
            return FULL if error.errno in DISK_FULL else 1
        return 0

    status, calls = run_in_child(work, output.parent, fate)
    os.close(writer)
    with os.fdopen(reader) as lines:
        pairs = [(int(a), int(b)) for a, b in map(str.split, lines)]
    assert status in (0, FULL, -KILLED), f"the child ended with {status}"
    return Life(status == -KILLED, calls if status == 0 else -1, pairs)


# What must hold


def check(output: Path, lives: Iterable[Life], *, untouched: Collection[Pair] = ()) -> None:
    """The file is whole, has every pair once, and those for which `append` returned as they were
    stored: sampled in that generation, never again."""
    table = pq.read_table(output)
    found = list(zip(table["data_idx"].to_pylist(), table["sample_idx"].to_pylist(), strict=True))
    assert found == ASKED
    generations = dict(zip(found, table["seed"].to_pylist(), strict=True))
    expected = [row(pair, generations[pair]) for pair in ASKED]
    wanted = pa.Table.from_batches([to_record_batch(expected, SCHEMA)])
    assert table.equals(wanted)
    for generation, life in enumerate(lives, start=1):
        for pair in life.stored:
            assert generations[pair] == generation, (pair, generation)
    assert all(generations[pair] == -1 for pair in untouched)
    left = {path.name for path in output.parent.iterdir()}
    assert left <= {output.name, parts_folder(output).name}
    assert read_schema(parts_folder(output)) is None
