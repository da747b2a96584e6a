"""Files are replaced as others left them: mode, links, names as long as a disk takes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval_protocol_rft._durable import check_replaceable, replacing, write_whole
from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._datum_files import write_datums
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._filter import FilterRules, filter_rollouts
from eval_protocol_rft.data._score import score
from eval_protocol_rft.report._page import write_report
from tests.data.rollout_files import write_rollouts

GRADERS = Path(__file__).parent / "data" / "score_graders.py"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_rollouts(
        tmp_path_factory.mktemp("scored") / "in.parquet", [["0", "aa"], ["b", ""]]
    )
    score(path, f"{GRADERS}::length", workers=1)
    return path


Writer = Callable[[Path, Path], object]
WRITERS: dict[str, Writer] = {
    "score": lambda source, to: score(
        source, f"{GRADERS}::length", output=to.with_suffix(".parquet"), overwrite=True, workers=1
    ),
    "filter": lambda source, to: filter_rollouts(
        source, to.with_suffix(".jsonl"), FilterRules(reward_min=1.0), overwrite=True
    ),
    "filter --prompts": lambda source, to: filter_rollouts(
        source, to.with_suffix(".jsonl"), FilterRules(), prompts=True, overwrite=True
    ),
    "convert": lambda source, to: convert(source, to.with_suffix(".jsonl"), overwrite=True),
    "convert --to ep": lambda source, to: convert(
        source, to.with_suffix(".jsonl"), to_format="ep", overwrite=True
    ),
    "convert --to trl": lambda source, to: convert(
        source, to.with_suffix(".parquet"), to_format="trl", overwrite=True
    ),
    "datums": lambda source, to: write_datums(source, to.with_suffix(".npz"), overwrite=True),
    "datums .safetensors": lambda source, to: write_datums(
        source, to.with_suffix(".safetensors"), overwrite=True
    ),
    "datums .jsonl": lambda source, to: write_datums(
        source, to.with_suffix(".jsonl"), overwrite=True
    ),
    "datums rl-step": lambda source, to: write_datums(
        source, to.with_suffix(".jsonl"), format="rl-step", overwrite=True
    ),
    "report": lambda source, to: write_report(RolloutDataset(source), to.with_suffix(".html")),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_its_target(
    write: Writer, scored: Path, tmp_path: Path
):
    store = tmp_path / "store"
    store.mkdir()
    write(scored, store / "out")
    [real, *beside] = sorted(store.iterdir(), key=lambda path: len(path.name))
    expected = real.read_bytes()
    for path in (real, *beside):
        path.write_bytes(b"old")
        path.chmod(0o604)
    link = tmp_path / real.name
    link.symlink_to(Path("store") / real.name)
    write(scored, link)
    assert link.is_symlink()
    assert real.read_bytes() == expected
    assert {mode(path) for path in store.iterdir()} == {0o604}
    assert set(store.iterdir()) == {real, *beside}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([real.name, "store"])


def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o640


def test_nobody_else_can_read_what_is_on_its_way_into_a_private_file(tmp_path: Path):
    path = tmp_path / "private"
    path.touch(0o400)
    with replacing(path) as file:
        assert mode(file.path) & 0o077 == 0
    assert mode(path) == 0o400


def test_a_link_to_nothing_is_filled_where_it_leads(tmp_path: Path):
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for check in (lambda path: write_whole(path, b"x"), check_replaceable):
        with pytest.raises(OSError, match="a device or a pipe"):
            check(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_what_lies_under_the_name_of_an_unfinished_file_is_not_followed(tmp_path: Path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / f".out.{os.getpid()}.tmp").symlink_to("mine")
    write_whole(tmp_path / "out", b"x")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "out").read_bytes() == b"x"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_names_as_long_as_the_disk_takes_them_are_written_or_refused_at_once(
    write: Writer, scored: Path, tmp_path: Path
):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for size in range(longest - 20, longest + 2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        stem = "x" * (size - len(".parquet"))
        try:
            write(scored, folder / stem)
        except (JobError, OSError) as error:
            assert "File name too long" in str(error)  # noqa: PT017
            assert not list(folder.iterdir())
        else:
            assert all(not path.name.startswith(".") for path in folder.iterdir())


def test_batches_of_an_earlier_run_go_and_files_of_others_stay(scored: Path, tmp_path: Path):
    foreign = tmp_path / "d-20240101.npz"
    np.savez(foreign.open("wb"), x=np.zeros(1))
    write_datums(scored, tmp_path / "d.npz", max_groups=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "d-00000.npz",
        "d-00001.npz",
        foreign.name,
    }
    write_datums(scored, tmp_path / "d.npz", max_groups=2, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"d-00000.npz", foreign.name}
