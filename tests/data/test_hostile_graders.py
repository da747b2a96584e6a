"""Graders that fork, exec, kill, hang, print, allocate, write into every descriptor and leave
children: each costs its own completion at most, and nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from eval_protocol_rft.scoring.executors._loading import load_evaluator
from eval_protocol_rft.scoring.executors._pool import score_items
from tests.data.grading_runs import is_gone, one_each, scores
from tests.data.hostile_graders import (
    ASYNC_DEADLY,
    ASYNC_HANGING,
    ASYNC_HARMLESS,
    DEADLY,
    HANGING,
    HARMLESS,
    LATE,
    MISDEEDS,
    reward,
)

GRADERS = Path(__file__).with_name("hostile_graders.py")


@pytest.fixture
def left(tmp_path, monkeypatch):
    """The file with the ids of processes that graders left."""
    file = tmp_path / "left"
    file.touch()
    monkeypatch.setenv("LEFT", str(file))
    yield file
    for pid in file.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)


def check(
    texts: list[str], left: Path, *, timeout: float, name: str = "judge", concurrency: int = 96
) -> None:
    """Grade them all with two workers."""
    evaluator = load_evaluator(f"{GRADERS}::{name}")
    done = {}
    for graded in score_items(
        one_each(texts), evaluator, workers=2, timeout=timeout, max_concurrency=concurrency
    ):
        assert graded.key not in done
        (done[graded.key],) = scores(graded)
    assert set(done) == set(texts)
    wrong = {text: found for text, found in done.items() if found not in (None, reward(text))}
    assert not wrong
    deadly = {*DEADLY, *HANGING, *ASYNC_DEADLY, *ASYNC_HANGING, "stop the guard"}
    costly = {*deadly, *(misdeed.__name__ for misdeed in LATE)}
    lost = {text for text, found in done.items() if found is None}
    assert {text for text in lost if text.partition(" #")[0] not in costly} == set()
    sure = deadly - {"write"}
    assert {text for text in texts if text.partition(" #")[0] in sure} <= lost
    started = [int(pid) for pid in left.read_text().split()]
    assert started
    assert [pid for pid in started if not is_gone(pid)] == []


def test_each_costs_its_own_completion_and_leaves_nothing(left):
    harmful = [*(misdeed.__name__ for misdeed in [*HARMLESS, *LATE]), *DEADLY, "write and hang"]
    texts = []
    for i, name in enumerate(harmful):
        texts += [f"{name} #{i}", f"fine #{i}", f"fine too #{i}"]
    check(texts, left, timeout=15)


def test_each_call_of_an_async_one_costs_its_own_completion_too(left):
    """Those that have no test of their own among the grading tests."""
    harmful = ["fork_and_stay", "fork_and_write", "leave_a_daemon", "kill the guard", "write"]
    texts = []
    for i, name in enumerate([*harmful, "close", "too much", *ASYNC_HARMLESS]):
        texts += [f"{name} #{i}", f"fine #{i}", f"fine too #{i}"]
    check(texts, left, timeout=15, name="judge_async", concurrency=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["judge", "judge_async"])
@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_of_them_among_as_many_others(left, seed, name):
    draw = random.Random(seed)
    misdeeds = [*MISDEEDS]
    if name == "judge_async":
        misdeeds += [*ASYNC_HARMLESS, *ASYNC_DEADLY, *ASYNC_HANGING]
    texts = [f"{draw.choice(misdeeds)} #{i}" for i in range(200)]
    texts += [f"fine #{i}" for i in range(200)]
    draw.shuffle(texts)
    check(texts, left, timeout=10, name=name, concurrency=8)
