"""Grading with async evaluators: many calls in one event loop of a worker process."""

from __future__ import annotations

import os
from itertools import islice

import pytest

from eval_protocol_rft.scoring.executors._messages import ScoringError, ScoringItem
from eval_protocol_rft.scoring.executors._pool import score_items
from tests.data.grading_runs import (
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
    done = outcomes("most_at_once", one_each(map(str, range(40))), max_concurrency=limit)
    assert max(scores(graded)[0] for graded in done.values()) == limit


@pytest.mark.parametrize(("workers", "processes"), [(None, 1), (3, 3), (9, 4)])
def test_one_process_has_all_calls_unless_more_are_asked_for(workers, processes):
    done = outcomes(
        "process_id_async", one_each(map(str, range(24))), workers=workers, max_concurrency=4
    )
    ids = {scores(graded)[0] for graded in done.values()}
    assert len(ids) <= processes
    assert (len(ids) > 1) == (processes > 1)
    assert os.getpid() not in ids


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


def test_a_call_that_blocks_the_loop_is_late_and_makes_no_other_late():
    done = outcomes("length_async", one_each(["wait", "block", "aa"]), timeout=1.0)
    assert errors(done.pop("block")) == ["no result within 1 s"]
    assert {text: scores(graded) for text, graded in done.items()} == {"wait": [4], "aa": [2]}


DYING = {
    "exit 3": "exit code 3",
    "crash": "exit code -11, SIGSEGV",
    "be killed": "exit code -9, SIGKILL",
    "exit in a task": "exit code 5",
    "cancel all": "exit code 1",
    "stop the loop": "exit code 1",
}


def test_a_death_costs_the_call_whose_code_ran_and_none_beside_it():
    good = ["x" * i for i in range(1, 40)]
    texts = [*good]
    for i, bad in enumerate(DYING):
        texts.insert(6 * i + 3, bad)
    done = outcomes("length_async", one_each(texts), workers=2, max_concurrency=4)
    assert {text: scores(done[text]) for text in good} == {text: [len(text)] for text in good}
    told = {text: errors(done[text])[0] for text in DYING}
    assert told == {text: f"the worker process died ({how})" for text, how in DYING.items()}


def test_calls_beside_one_that_dies_are_made_again_beside_each_other(tmp_path, monkeypatch):
    """Alone, each of them would take the time of all."""
    monkeypatch.chdir(tmp_path)
    texts = ["meet", *(f"meet #{i}" for i in range(1, 8))]
    done = outcomes("meet_eight_times", one_each(["exit 3", *texts]), timeout=None)
    assert [scores(done[text]) for text in texts] == [[1]] * 8
    assert scores(done["exit 3"]) == [None]


def test_what_a_call_leaves_behind_to_end_its_worker_costs_no_other_call():
    texts = ["exit soon", *("wait #" + "x" * i for i in range(12))]
    done = outcomes("length_async", one_each(texts), max_concurrency=4)
    assert {t: scores(graded) for t, graded in done.items()} == {t: [len(t)] for t in texts}


def test_a_call_that_cannot_be_cancelled_is_late_all_the_same():
    done = outcomes("length_async", one_each(["never end", "aa"]), timeout=0.5)
    assert errors(done["never end"]) == ["no result within 0.5 s"]
    assert scores(done["aa"]) == [2]


def test_groups_are_judged_in_one_call():
    items = [group("g1", ["a", "ccc", "bb"]), group("g2", ["zz"])]
    done = outcomes("test_rank_async", items)
    assert scores(done["g1"]) == [2.0, 0.0, 1.0]
    assert scores(done["g2"]) == [0.0]


def test_closing_early_cancels_what_is_in_flight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [ScoringItem(i, (view("hang", question=str(i)),)) for i in range(6)]
    running = score_items(
        [*items[:3], *one_each(["a"]), *items[3:]],
        grader("length_async"),
        timeout=None,
        max_concurrency=4,
    )
    assert next(running).key == "a"
    running.close()
    # Three, not four: the call that just ended is not replaced before the next result is asked for.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2"]
    assert all(is_gone(int(file.read_text())) for file in tmp_path.iterdir())


def test_items_are_read_as_results_are_taken():
    read = 0

    def items():
        nonlocal read
        for i in range(1000):
            read += 1
            yield ScoringItem(i, (view("a"),))

    running = score_items(items(), grader("length_async"), max_concurrency=5)
    assert read == 0
    for taken, _ in enumerate(islice(running, 20), start=1):
        assert read <= taken + 5
    running.close()


def test_an_error_of_the_items_is_raised_and_ends_the_calls():
    def items():
        yield from one_each(["hang", "a"])
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(score_items(items(), grader("length_async"), timeout=None))


def test_pytest_exit_ends_the_run():
    with pytest.raises(ScoringError, match="the evaluator ended the run: no judge, no use"):
        outcomes("length_async", one_each(["a", "pytest.exit"]))


def test_no_items_are_no_work():
    assert outcomes("length_async", []) == {}


async def test_it_works_inside_a_running_event_loop():
    done = outcomes("length_async", one_each(["ab"]))
    assert scores(done["ab"]) == [2.0]


def test_a_copy_that_an_async_evaluator_forks_ends_and_answers_for_nobody(tmp_path):
    files = [tmp_path / str(i) for i in range(4)]
    forks = [f"{'fork in a task' if i % 2 else 'fork'} {file}" for i, file in enumerate(files)]
    texts = [text for i, fork in enumerate(forks) for text in ("x" * (i + 1), fork)]
    done = outcomes("length_async", one_each(texts))
    assert {text: scores(graded) for text, graded in done.items()} == {t: [len(t)] for t in texts}
    assert all(is_gone(int(file.read_text())) for file in files)
