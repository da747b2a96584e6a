"""`ep-rft score` that is killed, stopped or out of disk grades nothing again that was on disk."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from tests.data.rollout_files import write_rollouts
from tests.data.servers import (
    Pair,
    rows_by_pair,
    stored_rows,
)
from tests.programs import Program, Zygote
from tests.waiting import wait_until

GRADERS = Path(__file__).with_name("score_graders.py")
ROWS, N = 40, 5
SAID = [["-" * random.Random(f"{i}/{k}").randrange(50, 90) for k in range(N)] for i in range(ROWS)]
IN_FLIGHT = 4
SAID = [[f"{k}{text}" for k, text in enumerate(row)] for row in SAID]


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    return write_rollouts(tmp_path / "rollouts.parquet", SAID)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


def start(
    zygote: Zygote,
    rollouts: Path,
    name: str,
    calls: Path,
    *,
    hang_after: int | None = None,
    **limits: int,
) -> Program:
    """`hang_after`: so many calls in all are answered, so that it cannot be done when it ends."""
    arguments = ("-e", f"{GRADERS}::{name}", "--quiet", "--concurrency", 4, "--workers", 2)
    environment = {"CALLS": str(calls), "HANG_AFTER": str(hang_after or "")}
    return zygote.start("score", rollouts, *arguments, env=environment, **limits)


def called(calls: Path) -> Counter[Pair]:
    """How often each completion was graded."""
    lines = [line.split() for line in calls.read_text().splitlines()]
    return Counter((int(i), int(text[0])) for i, text in lines)


def on_disk(rollouts: Path) -> set[Pair]:
    """What an interrupted run left."""
    rows = stored_rows(rollouts.with_name(rollouts.name + ".reward.parts"))
    return {(row["data_idx"], row["sample_idx"]) for row in rows}


def check(rollouts: Path) -> None:
    """Every reward is there and right, and nothing is left over."""
    rewards = {pair: row["reward"] for pair, row in rows_by_pair(rollouts).items()}
    assert rewards == {(i, k): float(len(SAID[i][k])) for i in range(ROWS) for k in range(N)}
    left = {path.name for path in rollouts.parent.iterdir()}
    assert left == {"calls", rollouts.name}


@pytest.mark.parametrize(("grader", "kills"), [("slow", 3), ("slow_sync", 1)])
def test_killed_at_any_moment_it_goes_on_with_what_is_not_graded(
    grader, kills, zygote, rollouts, calls
):
    before = rollouts.read_bytes()
    for kill in range(kills):
        enough = called(calls).total() + random.randrange(10, 50)
        command = start(zygote, rollouts, grader, calls, hang_after=enough)
        wait_until(lambda enough=enough: called(calls).total() > enough)
        if not kill:
            # What was graded gets to the disk though no further result comes.
            wait_until(lambda: len(set(called(calls)) - on_disk(rollouts)) <= IN_FLIGHT)
        graded = on_disk(rollouts)
        assert command.kill() == -signal.SIGKILL, command.said
        assert graded <= on_disk(rollouts)
        assert rollouts.read_bytes() == before
    graded, times = on_disk(rollouts), called(calls)
    command = start(zygote, rollouts, grader, calls)
    assert command.wait() == 0, command.said
    check(rollouts)
    assert all(called(calls)[pair] == times[pair] for pair in graded)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_has_stored_what_was_graded(number, status, zygote, rollouts, calls):
    command = start(zygote, rollouts, "slow", calls, hang_after=40)
    wait_until(lambda: called(calls).total() > 40)
    assert command.kill(number) == status
    assert command.said.splitlines() == [
        "ep-rft: stopped. The same command goes on with what is not graded"
    ]
    graded = on_disk(rollouts)
    assert len(graded) >= called(calls).total() - IN_FLIGHT
    command = start(zygote, rollouts, "slow", calls)
    assert command.wait() == 0, command.said
    check(rollouts)
    assert f"({ROWS * N - len(graded)} graded by this run)" in command.said
    assert all(called(calls)[pair] == 1 for pair in graded)


def test_a_limit_on_the_size_of_files_is_an_error_and_what_was_graded_is_safe(
    zygote, rollouts, calls
):
    before = rollouts.read_bytes()
    command = start(zygote, rollouts, "slow", calls, RLIMIT_FSIZE=100_000)
    assert command.wait() == 1
    assert "File too large" in command.said
    assert "Traceback" not in command.said
    graded = on_disk(rollouts)
    assert graded
    assert rollouts.read_bytes() == before
    command = start(zygote, rollouts, "slow", calls)
    assert command.wait() == 0, command.said
    check(rollouts)
    assert all(called(calls)[pair] == 1 for pair in graded)
    assert len(list(RolloutDataset(rollouts))) == ROWS * N
