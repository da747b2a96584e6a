"""Grading with async evaluators: many calls in one event loop of this process."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest

from eval_protocol_rft.batch.grading.grade import GradingError, GradingItem, grade
from tests.batch.grading_runs import (
    errors,
    grader,
    group,
    is_gone,
    one_each,
    outcomes,
    scores,
    view,
)


def test_every_completion_gets_the_score_of_a_direct_call():
    texts = ["x" * i for i in range(1, 40)]
    done = outcomes("length_async", one_each(texts))
    assert {text: scores(graded) for text, graded in done.items()} == {t: [len(t)] for t in texts}


@pytest.mark.parametrize("limit", [1, 7, 40])
def test_calls_run_at_the_same_time_up_to_max_concurrency(limit):
    loaded = grader("most_at_once")
    loaded.function.__globals__["most_waiting"] = 0
    items = one_each(map(str, range(40)))
    most = [scores(graded)[0] for graded in grade(items, loaded, max_concurrency=limit)]
    assert max(most) == limit


def test_a_late_raising_or_ending_call_costs_its_own_item_and_no_other():
    good = ["x" * i for i in range(1, 30)]
    bad = ["hang", "raise", "sys.exit", "interrupt", "be cancelled", "time out by itself"]
    done = outcomes("length_async", one_each([*bad, *good]), timeout=0.5)
    assert {text: scores(done[text]) for text in good} == {text: [len(text)] for text in good}
    assert [scores(done[text]) for text in bad] == [[None]] * len(bad)
    told = {text: errors(done[text])[0] for text in bad}
    assert told.pop("raise").startswith("KeyError: 'nothing' (graders.py:")
    assert told.pop("time out by itself").startswith("TimeoutError: the judge is slow (graders.py:")
    assert told == {
        "hang": "no result within 0.5 s",
        "sys.exit": "the evaluator called sys.exit (7)",
        "interrupt": "the evaluator raised KeyboardInterrupt",
        "be cancelled": "the evaluator raised CancelledError",
    }
    assert 0.5 <= done["hang"].seconds < 3


def test_a_call_that_blocks_the_loop_makes_no_other_late():
    done = outcomes("length_async", one_each(["wait", "block"]), timeout=0.25)
    assert {text: scores(graded) for text, graded in done.items()} == {"wait": [4], "block": [5]}


def test_groups_are_judged_in_one_call():
    items = [group("g1", ["a", "ccc", "bb"]), group("g2", ["zz"])]
    done = outcomes("test_rank_async", items)
    assert scores(done["g1"]) == [2.0, 0.0, 1.0]
    assert scores(done["g2"]) == [0.0]


def test_closing_early_cancels_what_is_in_flight():
    loaded = grader("length_async")
    cancelled = loaded.function.__globals__["cancelled"]
    cancelled.clear()
    items = [GradingItem(i, (view("hang", question=str(i)),)) for i in range(6)]
    running = grade([*one_each(["a"]), *items], loaded, timeout=None, max_concurrency=4)
    assert next(running).key == "a"
    # Three, not four: the call that just ended is not replaced before the next result is asked for.
    time.sleep(0.1)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 1
    assert sorted(cancelled) == ["0", "1", "2"]
    assert "grading" not in {thread.name for thread in threading.enumerate()}


def test_items_are_read_as_results_are_taken():
    read = 0

    def items():
        nonlocal read
        for i in range(1000):
            read += 1
            yield GradingItem(i, (view("a"),))

    running = grade(items(), grader("length_async"), max_concurrency=5)
    assert read == 0
    for taken, _ in enumerate(islice(running, 20), start=1):
        assert read <= taken + 5
    running.close()


def test_an_error_of_the_items_is_raised_and_ends_the_calls():
    def items():
        yield from one_each(["hang", "a"])
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(grade(items(), grader("length_async"), timeout=None))
    assert "grading" not in {thread.name for thread in threading.enumerate()}


def test_pytest_exit_ends_the_run():
    with pytest.raises(GradingError, match="the evaluator ended the run: no judge, no use"):
        outcomes("length_async", one_each(["a", "pytest.exit"]))


def test_no_items_are_no_work():
    assert outcomes("length_async", []) == {}


async def test_it_works_inside_a_running_event_loop():
    done = outcomes("length_async", one_each(["ab"]))
    assert scores(done["ab"]) == [2.0]


def test_a_copy_that_an_async_evaluator_forks_ends_and_answers_for_nobody(tmp_path):
    files = [tmp_path / str(i) for i in range(3)]
    texts = [text for i, file in enumerate(files) for text in ("x" * (i + 1), f"fork {file}")]
    done = outcomes("length_async", one_each(texts))
    assert {text: scores(graded) for text, graded in done.items()} == {t: [len(t)] for t in texts}
    assert all(is_gone(int(file.read_text())) for file in files)
