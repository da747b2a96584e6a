"""Disks that are full, or will be: said in one line with its place, and nothing is lost."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import Result

from eval_protocol_rft.data import _files as target
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data import _sampling_run as sampling_run
from eval_protocol_rft.data._datum_files import numbered_path
from eval_protocol_rft.data._files import amount, room_warning, write_file
from tests.data.servers import at, ep_rft, succeed, texts, write_jsonl
from tests.scored_files import SCHEMA, Sampled, table_of, write

GROUPS = [[Sampled(1.0), Sampled(0.0)] for _ in range(6)]
WRITERS = {
    "out.parquet": ("convert",),
    "out.jsonl": ("convert",),
    "fewer.parquet": ("filter", "-o"),
    "fewer.jsonl": ("filter", "-o"),
    "prompts.parquet": ("filter", "--prompts", "-o"),
    "rows.jsonl": ("convert", "--to", "ep"),
    "verl.parquet": ("convert", "--to", "verl"),
    "trl.json": ("convert", "--to", "trl"),
    "d.safetensors": ("datums", "-o"),
    "d.jsonl": ("datums", "-o"),
    "page.html": ("report", "--tokenizer", "local/arithmetic", "-o"),
}


def written(source: Path, output: Path, *more: object, command: tuple[str, ...]) -> Result:
    """What `command` does with a source and an output, which is its last argument or option."""
    name, *options = command
    return ep_rft(name, source, *options, output, *more)


def full_after(size: int) -> Callable[[int, memoryview, int], int]:
    """`os.pwrite` on a disk with room for `size` bytes."""

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if offset + len(data) > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    real = os.pwrite
    return pwrite


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 200])
def test_a_full_disk_is_one_line_with_the_file_and_leaves_none(
    name, size, tmp_path, monkeypatch, capfd
) -> None:
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / name
    source = write(tmp_path / "in.parquet", GROUPS)
    monkeypatch.setattr(os, "pwrite", full_after(size))
    ended = written(source, output, command=WRITERS[name])
    assert ended.exit_code == 1
    gc.collect()
    (said,) = (ended.stderr + capfd.readouterr().err).splitlines()
    assert said.startswith("ep-rft: ")
    assert said.endswith(f"{output}: No space left on device. Make room, or write elsewhere")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1000])
def test_arrow_prints_no_traceback_of_its_own_where_a_file_cannot_be_written(
    size, tmp_path, monkeypatch, capfd
) -> None:
    many = table_of([[Sampled(0.5, tokens=tuple(range(90)))] * 8 for _ in range(900)])
    monkeypatch.setattr(os, "pwrite", full_after(size))
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "out.parquet", SCHEMA, iter([many]))
    gc.collect()
    assert capfd.readouterr().err == ""


def test_numbered_files_are_replaced_all_together_or_not_at_all(tmp_path, monkeypatch) -> None:
    output = tmp_path / "d.safetensors"
    datums = partial(written, command=("datums", "--max-groups", "2", "-o"))
    datums(write(tmp_path / "in.parquet", GROUPS), output)
    files = [numbered_path(output, number) for number in range(3)]
    files[1].chmod(0o640)
    before = [path.read_bytes() for path in files]
    other = write(tmp_path / "other.parquet", [[Sampled(0.0), Sampled(0.5)]] * 4)
    calls: list[int] = []

    def full_at_the_second(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(descriptor)
        return pwrite(descriptor, data, offset)

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_at_the_second)
        datums(other, output, "--overwrite")
    assert not files[2].exists()
    assert files[1].stat().st_mode & 0o777 == 0o640
    datums(tmp_path / "in.parquet", output, "--overwrite")
    assert [path.read_bytes() for path in files] == before

    def write_some(descriptor: int, data: memoryview, offset: int) -> int:
        calls.pop()
        if not calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write_some)
    assert datums(other, output, "--overwrite").exit_code == 1
    assert [path.read_bytes() for path in files] == before
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in files),
        "in.parquet",
        "other.parquet",
    }


def test_what_is_stored_and_the_file_have_to_fit_side_by_side(tmp_path, monkeypatch) -> None:
    """10 MB are stored of 100 MB: 90 MB more, and 100 MB for the file."""
    usage = shutil.disk_usage(tmp_path)
    job = (tmp_path / "r.parquet", 1_000, 100, 10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=190_000_000))
    assert room_warning(*job) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=189_999_999))
    assert "100 of 1,000 completions take 10 MB, so 190 MB more" in str(room_warning(*job))


def test_amounts_are_in_units_that_people_read() -> None:
    shown = [amount(size) for size in (0, 999, 1500, 49_000, 1.5e6, 2.34e9, 5e13)]
    assert shown == ["0 bytes", "999 bytes", "1.5 kB", "49 kB", "1.5 MB", "2.3 GB", "50.0 TB"]


def test_a_disk_that_will_be_full_is_told_once_and_ends_nothing(
    tmp_path, server, tokenizer_folder, monkeypatch, caplog
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1))
    monkeypatch.setattr(job_store, "PACKED_ROWS", 4)
    monkeypatch.setattr(sampling_run, "_STORED_AT_ONCE", 4)
    monkeypatch.setattr(target, "_RATE_FROM", 1)
    data = write_jsonl(tmp_path / "data.jsonl", texts(12))
    succeed("generate", data, "-o", tmp_path / "r.parquet", *at(server, tokenizer_folder))
    told = [record.message for record in caplog.records if "will be full" in record.message]
    assert len(told) == 1
    assert " of 12 completions take " in told[0]
