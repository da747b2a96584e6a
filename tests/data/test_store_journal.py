"""The journal after any damage: every frame before it, nothing of what follows, never garbage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.data.store._parts import Journal, read_journal

SCHEMA = pa.schema([("data_idx", pa.int64()), ("ids", pa.list_(pa.int32()))])
BATCHES = [pa.record_batch([[i], [[7 * i, i]]], schema=SCHEMA).slice(0, 1) for i in range(3)]


def written(path: Path) -> tuple[bytes, list[int]]:
    """A journal of `BATCHES`, and where each frame ends."""
    journal = Journal(path, SCHEMA)
    ends = []
    for batch in BATCHES:
        journal.append(batch)
        ends.append(path.stat().st_size)
    journal.close()
    return path.read_bytes(), ends


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    return written(tmp_path_factory.mktemp("journal") / "_journal")


def assert_read_up_to(data: bytes, ends: list[int], damage: int) -> None:
    """Frames that end at or before byte `damage` are read, the others are not."""
    whole = [end for end in ends if end <= damage]
    found, keep = read_journal(data, SCHEMA)
    assert keep == (whole[-1] if whole else 0)
    assert found == BATCHES[: len(whole)]


def test_a_whole_journal_is_read_whole(journal: tuple[bytes, list[int]]):
    data, ends = journal
    assert_read_up_to(data, ends, len(data))


def test_a_journal_cut_off_anywhere_ends_with_its_last_whole_frame(
    journal: tuple[bytes, list[int]],
):
    data, ends = journal
    for size in range(len(data)):
        assert_read_up_to(data[:size], ends, size)


def test_any_flipped_bit_ends_the_journal_before_its_frame(journal: tuple[bytes, list[int]]):
    data, ends = journal
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            assert_read_up_to(bytes(flipped), ends, place)


def test_a_tail_of_zeros_from_anywhere_ends_the_journal(journal: tuple[bytes, list[int]]):
    data, ends = journal
    for size in range(len(data) + 1):
        damaged = data[:size] + bytes(5000)
        assert_read_up_to(damaged, ends, common_prefix(damaged, data))


@settings(deadline=None)
@given(size=st.integers(0, 2000), garbage=st.binary(max_size=200))
def test_garbage_is_never_a_frame(journal: tuple[bytes, list[int]], size: int, garbage: bytes):
    data, ends = journal
    damaged = data[:size] + garbage
    assert_read_up_to(damaged, ends, common_prefix(damaged, data))


def common_prefix(one: bytes, other: bytes) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def test_appending_goes_on_where_the_damage_begins(
    journal: tuple[bytes, list[int]], tmp_path: Path
):
    data, ends = journal
    path = tmp_path / "_journal"
    path.write_bytes(data[: ends[1]] + b"EPRJ" + bytes(1000))
    continued = Journal(path, SCHEMA)
    assert continued.batches == BATCHES[:2]
    continued.append(BATCHES[2])
    continued.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_batch_that_could_not_be_written_leaves_the_journal_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "_journal"
    journal = Journal(path, SCHEMA)
    journal.append(BATCHES[0])
    before = path.read_bytes()

    def full(descriptor: int, *arguments: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="no space left"):
            journal.append(BATCHES[1])
    assert path.read_bytes() == before
    assert journal.batches == BATCHES[:1]
    journal.append(BATCHES[2])
    journal.close()
    assert Journal(path, SCHEMA).batches == [BATCHES[0], BATCHES[2]]


def test_a_disk_that_refuses_even_to_cut_loses_nothing_that_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "_journal"
    journal = Journal(path, SCHEMA)
    journal.append(BATCHES[0])

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "no space left on device")
        return pwrite(descriptor, data[: len(data) // 2], offset)

    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="no space left"):
            journal.append(BATCHES[1])
    journal.append(BATCHES[2])
    journal.close()
    assert Journal(path, SCHEMA).batches == [BATCHES[0], BATCHES[2]]
