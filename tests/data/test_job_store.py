"""The store of an unfinished job: what is in it is what was appended, in order, whatever happened
to the file in between, and whoever reads, or locks it, meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data import _job_file as job_file
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data._format import FormatError
from eval_protocol_rft.data._job_file import BusyError
from eval_protocol_rft.data._job_store import (
    JobStore,
    Keys,
    count_stored,
    latest,
    read_schema,
    row_keys,
    split_keys,
    stored_tables,
)
from tests.data.test_store_crashes import fast_folder

SCHEMA = pa.schema(
    [
        ("data_idx", pa.int64()),
        ("sample_idx", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("error", pa.string()),
        ("generation", pa.int64()),
    ]
)
SAMPLES = 4
"""Of each data row: key k is data row k // 4, sample k % 4."""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = fast_folder()
    yield made / "a.parquet.parts"
    shutil.rmtree(made)


def keys_of(table: pa.Table | pa.RecordBatch) -> Keys:
    return row_keys(table, None)


def backwards(table: pa.Table | pa.RecordBatch) -> Keys:
    """As in a run that asks the last data row first."""
    import numpy as np

    return row_keys(table, np.arange(100)[::-1])


def batch(keys: list[int], generation: int) -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array([key // SAMPLES for key in keys], pa.int64()),
            pa.array([key % SAMPLES for key in keys], pa.int32()),
            pa.array([list(range(key)) for key in keys], pa.list_(pa.int32())),
            pa.array(["no answer" if key % 3 == 0 else None for key in keys], pa.string()),
            pa.array([generation] * len(keys), pa.int64()),
        ],
        schema=SCHEMA,
    )


def table(keys: list[int], generation: int) -> pa.Table:
    return pa.Table.from_batches([batch(keys, generation)])


def rows_of(tables: Iterator[pa.Table]) -> list[tuple[int, int]]:
    """(key, generation) of each row, in order, if the rows hold what `batch` put there."""
    rows = []
    for each in tables:
        assert len(each)
        for row in each.to_pylist():
            key = row["data_idx"] * SAMPLES + row["sample_idx"]
            assert row.get("ids", list(range(key))) == list(range(key))
            assert (row["error"] is None) == (key % 3 != 0)
            rows.append((key, row["generation"]))
    return rows


APPENDED = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), max_size=8)


@given(
    APPENDED,
    st.integers(1, 12),
    st.sets(st.integers(0, 7)),
    st.lists(st.sets(st.integers(0, 40), min_size=1), max_size=2),
    st.sampled_from([keys_of, backwards]),
)
def test_what_was_appended_comes_out_once_in_order_the_latest_of_each(
    appended: list[list[int]],
    packed_at: int,
    reopened_before: set[int],
    base: list[set[int]],
    order: Callable[[pa.Table | pa.RecordBatch], Keys],
) -> None:
    folder = fast_folder() / "a.parquet.parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_store, "PACKED_ROWS", packed_at)
        patch.setattr(job_store, "_READ_BYTES", 1 << 12)
        store = JobStore(folder, SCHEMA, order)
        latest_of: dict[int, int] = {}
        for i, keys in enumerate(appended):
            if i in reopened_before:
                store.close()
                store = JobStore(folder, SCHEMA, order)
            store.append(batch(keys, i))
            latest_of |= dict.fromkeys(keys, i)

        def ordered(values: dict[int, int]) -> list[tuple[int, int]]:
            place = dict(zip(values, order(table(list(values), 0)).tolist(), strict=True))
            return sorted(values.items(), key=lambda item: place[item[0]])

        expected = ordered(latest_of)
        assert len(store) == count_stored(folder) == len(expected)
        assert rows_of(stored_tables(folder, SCHEMA)) == expected
        some = ["generation", "error", "sample_idx", "data_idx"]
        assert rows_of(stored_tables(folder, SCHEMA, some)) == expected
        found = [
            (key, no)
            for keys, failed in store.stored()
            for key, no in zip(keys, failed, strict=True)
        ]
        places = order(table([key for key, _ in expected], 0)).tolist()
        assert found == [(at, key % 3 == 0) for at, (key, _) in zip(places, expected, strict=True)]
        olds = [key for key, _ in ordered(dict.fromkeys(sorted(set().union(*base)), -1))]
        cuts = [olds[: len(olds) // 2], olds[len(olds) // 2 :]]
        tables = [table(keys, -1) for keys in cuts if keys]
        assert rows_of(store.merged(tables)) == ordered(dict.fromkeys(olds, -1) | latest_of)
        store.remove()
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("tables", [[[5], [4]], [[5, 4]], [[5, 5]], [[4, 5], [5]]])
def test_a_file_that_is_not_sorted_is_an_error_that_names_the_row(
    tables: list[list[int]], folder: Path
) -> None:
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        store.append(batch([1], 0))
        with pytest.raises(FormatError, match=f"data_idx 1 and sample_idx {tables[-1][-1] - 4} st"):
            list(store.merged([table(keys, -1) for keys in tables]))


@given(st.lists(st.integers(0, 9)))
def test_latest_takes_the_last_row_of_every_key(keys: list[int]) -> None:
    import numpy as np

    expected = {key: place for place, key in enumerate(keys)}
    found = latest(np.array(keys, np.int64))
    assert found.tolist() == [expected[key] for key in sorted(expected)]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)), min_size=2, max_size=20
    )
)
def test_keys_order_rows_as_pairs_do(pairs: list[tuple[int, int]]) -> None:
    columns = [pa.array([pair[i] for pair in pairs], (pa.int64(), pa.int32())[i]) for i in (0, 1)]
    keys = row_keys(pa.table(columns, ["data_idx", "sample_idx"]), None)
    assert (keys[0] < keys[1]) == (pairs[0] < pairs[1])
    assert list(zip(*(part.tolist() for part in split_keys(keys)), strict=True)) == pairs


def test_rows_that_are_long_come_in_tables_of_some_megabytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "_READ_BYTES", 40_000)
    keys = list(range(4000, 4032))
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        for key in keys:
            store.append(batch([key], 0))
        tables = list(store.merged())
    assert [key for key, _ in rows_of(iter(tables))] == keys
    assert len(tables) > 3


def test_a_reader_that_began_before_batches_were_packed_reads_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "PACKED_BYTES", 3000)
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        store.append(batch([200, 201], 0))
        store.append(batch([210], 0))
        monkeypatch.setattr(job_store, "PACKED_ROWS", 2)
        reader = stored_tables(folder, SCHEMA)
        before = rows_of(iter([next(reader)]))
        store.append(batch([211, 220], 0))
        store.append(batch([230], 0))
        monkeypatch.setattr(job_store, "PACKED_ROWS", 1)
        store.append(batch([240], 0))
        assert [key for key, _ in before + rows_of(reader)] == [200, 201, 210, 211, 220, 230, 240]


def test_who_reads_while_the_job_is_finished_reads_to_the_end(folder: Path) -> None:
    store = JobStore(folder, SCHEMA, keys_of)
    store.append(batch([1, 2, 5], 0))
    reader = stored_tables(folder, SCHEMA)
    assert rows_of(iter([next(reader)])) == [(1, 0), (2, 0), (5, 0)]
    store.remove()
    assert list(reader) == []
    assert not folder.exists()
    assert read_schema(folder) is None
    with pytest.raises(FormatError, match="finished meanwhile"):
        list(stored_tables(folder, SCHEMA))


# Damage


def written(folder: Path) -> dict[int, int]:
    """A job with rows in packed and loose batches; key -> generation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_store, "PACKED_ROWS", 20)
        with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
            for i in range(9):
                store.append(batch(list(range(4 * i, 4 * i + 6)), i))
            return dict(rows_of(store.merged()))


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def garbled(content: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(content)), rng.randrange(1, 600)
    return content[:start] + rng.randbytes(size) + content[start + size :]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    size = rng.randrange(1, 5000)
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


@pytest.mark.parametrize("damage", [cut, garbled, flipped, zeroed])
def test_a_damaged_file_is_refused_in_one_line_or_says_what_was_stored_never_anything_else(
    damage: Callable[[bytes, random.Random], bytes], folder: Path
) -> None:
    expected = written(folder)
    whole = (folder / "job.sqlite").read_bytes()
    rng = random.Random(0)
    refused = []
    for _ in range(60):
        (folder / "job.sqlite").write_bytes(damage(whole, rng))
        try:
            schema = read_schema(folder)
            assert schema is None or schema.equals(SCHEMA)
            if schema is None:
                continue
            with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
                found = dict(rows_of(store.merged()))
            assert found.items() <= expected.items()
        except (FormatError, OSError) as error:
            refused.append(str(error))
    assert refused
    assert all("job.sqlite" in message and "\n" not in message for message in refused)


def test_a_log_that_a_crash_cut_or_filled_with_something_else_ends_before_it(folder: Path) -> None:
    """Whole commits before the damage count, and nothing else; and the job goes on."""
    store = JobStore(folder, SCHEMA, keys_of)
    for i in range(12):
        store.append(batch([i], i))
    copies = {path.name: path.read_bytes() for path in folder.iterdir()}
    store.close()
    log = copies["job.sqlite-wal"]
    rng = random.Random(0)
    counts = set()
    for damage in (cut, garbled, flipped, zeroed):
        for _ in range(20):
            for name in ("job.sqlite", "job.sqlite-wal"):
                (folder / name).write_bytes(copies[name])
            (folder / "job.sqlite-shm").unlink(missing_ok=True)
            (folder / "job.sqlite-wal").write_bytes(damage(log, rng))
            with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
                found = rows_of(store.merged())
                assert found == [(i, i) for i in range(len(found))]
                store.append(batch([20], 20))
                assert rows_of(store.merged())[-1] == (20, 20)
            counts.add(len(found))
    assert len(counts) > 5


# Others


def test_a_file_that_another_program_locks_is_one_line_and_nothing_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_file, "_PATIENCE", 0.05)
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        store.append(batch([1], 0))
        with contextlib.closing(sqlite3.connect(folder / "job.sqlite")) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BusyError, match="another program holds it"):
                store.append(batch([2], 0))
            assert rows_of(stored_tables(folder, SCHEMA)) == [(1, 0)]
            other.rollback()
        store.append(batch([2], 0))
        assert rows_of(store.merged()) == [(1, 0), (2, 0)]
    with contextlib.closing(sqlite3.connect(folder / "job.sqlite")) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("PRAGMA user_version = 1")
        with pytest.raises(BusyError, match="another program holds it"):
            JobStore(folder, SCHEMA, keys_of)
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        assert len(store) == 2


def without_shared_memory(folder: Path) -> None:
    """As on a file system that has none: the file of the log's index cannot be opened."""
    folder.mkdir()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(folder / "job.sqlite-shm"))


def test_where_there_can_be_no_log_a_rollback_journal_takes_its_place_and_that_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_shared_memory(folder)
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        assert "no write-ahead log there (unable to open database file)" in caplog.text
        store.append(batch([1], 0))
        assert rows_of(stored_tables(folder, SCHEMA)) == [(1, 0)]
        reader = stored_tables(folder, SCHEMA)
        next(reader)
        store.append(batch([2], 0))
    assert not (folder / "job.sqlite-wal").exists()
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        assert rows_of(store.merged()) == [(1, 0), (2, 0)]


def test_a_job_that_goes_on_where_hosts_share_the_file_system_leaves_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        store.append(batch([1], 0))
        assert (folder / "job.sqlite-wal").exists()
    mounts = Path("/proc/self/mountinfo").read_text()
    number = f"{os.major(folder.stat().st_dev)}:{os.minor(folder.stat().st_dev)}"
    (here,) = {line.split(" - ")[1].split()[0] for line in mounts.splitlines() if number in line}
    monkeypatch.setattr(job_file, "_SHARED", job_file.re.compile(here))
    with contextlib.closing(JobStore(folder, SCHEMA, keys_of)) as store:
        assert f"no write-ahead log there ({here})" in caplog.text
        store.append(batch([2], 0))
        assert not (folder / "job.sqlite-wal").exists()
        assert rows_of(stored_tables(folder, SCHEMA)) == [(1, 0), (2, 0)]


def test_a_job_on_a_disk_that_cannot_be_written_is_read_and_not_continued(folder: Path) -> None:
    expected = written(folder)
    mount = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)  # noqa: S607
        assert dict(rows_of(stored_tables(folder, SCHEMA))) == expected
        with pytest.raises(OSError, match="Read-only file system") as told:
            JobStore(folder, SCHEMA, keys_of)
        assert told.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607
