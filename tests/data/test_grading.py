"""Grading with sync evaluators: scores as from a direct call, and evaluators that misbehave."""

from __future__ import annotations

import dataclasses
import gzip
import os
import time
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.scoring.executors._loading import load_evaluator
from eval_protocol_rft.scoring.executors._messages import ScoringError, ScoringItem
from eval_protocol_rft.scoring.executors._pool import score_items
from tests.data.graders import TAMPERING
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


@pytest.mark.parametrize("name", ["length", "as_row", "as_result", "test_decorated"])
def test_every_completion_gets_the_score_of_a_direct_call_whatever_form_it_is_returned_in(name):
    texts = ["x" * i for i in range(1, 40)]
    done = outcomes(name, one_each(texts), workers=2)
    assert {text: scores(graded) for text, graded in done.items()} == {t: [len(t)] for t in texts}
    said = "counted" if name != "length" else None
    assert {graded.results[0].reason for graded in done.values()} == {said}


def test_the_arguments_of_the_evaluation_test_are_passed():
    assert scores(outcomes("test_scaled", one_each(["abc"]), workers=1)["abc"]) == [30.0]


def test_nothing_returned_is_unscored():
    (graded,) = outcomes("as_nothing", one_each(["abc"]), workers=1).values()
    assert scores(graded) == [None]
    assert "returned NoneType" in errors(graded)[0]


HANGING = ["loop", "sleep", "hang in C", "ignore signals"]
DYING = {
    "exit 0": "the worker process died (exit code 0)",
    "exit 3": "the worker process died (exit code 3)",
    "crash": "the worker process died (exit code -11, SIGSEGV)",
    "be killed": "the worker process died (exit code -9, SIGKILL)",
}
RAISING = {
    "sys.exit": "the evaluator called sys.exit (7)",
    "interrupt": "the evaluator raised KeyboardInterrupt",
}


def test_a_hanging_dying_or_raising_call_costs_its_own_item_and_no_other():
    good = ["x" * i for i in range(1, 60)]
    texts = list(good)
    for i, bad in enumerate([*HANGING, *DYING, *RAISING, "raise"]):
        texts.insert(4 * i + 3, bad)
    done = outcomes("length", one_each(texts), workers=3, timeout=1.0)
    assert {text: scores(done[text]) for text in good} == {text: [len(text)] for text in good}
    told = {text: errors(graded)[0] for text, graded in done.items() if text not in good}
    where = told.pop("raise")
    assert where.startswith("KeyError: 'nothing' (graders.py:")
    assert told == dict.fromkeys(HANGING, "no result within 1 s") | DYING | RAISING
    assert {score for text in told for score in scores(done[text])} == {None}
    assert all(1.0 <= done[text].seconds < 120 for text in HANGING)


@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from(["a", "bb", "ccc", "exit 0", "be killed", "raise"]), max_size=20
    ),
    workers=st.integers(1, 3),
    timeout=st.sampled_from([None, 30.0]),
)
def test_whatever_dies_in_whatever_order_every_item_comes_back_once(texts, workers, timeout):
    items = [ScoringItem(i, (view(text),)) for i, text in enumerate(texts)]
    done = outcomes("length", items, workers=workers, timeout=timeout)
    assert {i: scores(graded) for i, graded in done.items()} == {
        i: [None if text in {*DYING, "raise"} else len(text)] for i, text in enumerate(texts)
    }


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_one_worker_that_dies_at_every_call_is_replaced_every_time(timeout):
    items = [ScoringItem(i, (view("exit 0" if i % 2 else "fine"),)) for i in range(8)]
    done = outcomes("length", items, workers=1, timeout=timeout)
    assert [scores(done[i]) for i in range(8)] == [[4.0], [None]] * 4


def test_what_a_late_evaluator_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    (graded,) = outcomes("child_and_hang", one_each([str(file)]), workers=1, timeout=1.5).values()
    assert errors(graded) == ["no result within 1.5 s"]
    assert is_gone(int(file.read_text()))


def test_an_answer_that_came_while_the_caller_paused_is_not_late():
    running = score_items(
        one_each(["a", "bb", "ccc", "dddd"]), grader("length"), workers=2, timeout=0.5
    )
    done = {}
    for graded in running:
        done[graded.key] = scores(graded)
        time.sleep(0.7)
    assert done == {"a": [1], "bb": [2], "ccc": [3], "dddd": [4]}


def test_groups_are_judged_in_one_call_and_answers_find_their_completion_in_any_order():
    items = [group("g1", ["a", "ccc", "bb"]), group("g2", ["zz"]), group("g3", ["1", "333333"])]
    done = outcomes("test_rank", items, workers=2)
    assert scores(done["g1"]) == [2.0, 0.0, 1.0]
    assert scores(done["g2"]) == [0.0]
    assert scores(done["g3"]) == [1.0, 0.0]
    assert scores(outcomes("test_all", items[:1], workers=1)["g1"]) == [2.0, 0.0, 1.0]


def test_a_completion_that_a_group_evaluator_forgot_or_doubled_is_unscored():
    (graded,) = outcomes("test_rank_badly", [group(0, ["a", "b", "c"])], workers=1).values()
    assert scores(graded) == [None, None, 1.0]
    forgotten, doubled, none = errors(graded)
    assert "returned no row for completion 0 of rollout r1" in forgotten
    assert "returned 2 rows for completion 1 of rollout r1, expected one" in doubled
    assert none is None


def test_when_a_group_call_fails_each_of_its_completions_says_so():
    done = outcomes("test_rank", [ScoringItem(0, (b"{", b"{"))], workers=1)
    assert scores(done[0]) == [None, None]
    assert all("the stored row cannot be read" in error for error in errors(done[0]))


def test_a_worker_loads_the_evaluator_once_and_keeps_its_state():
    done = outcomes("count_calls", one_each("abcdef"), workers=1)
    assert sorted(score for graded in done.values() for score in scores(graded)) == [
        1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
    ]  # fmt: skip


def test_several_workers_share_the_work():
    # Each takes so long that no worker is done with all before another has started.
    done = outcomes("process_id_in_a_while", one_each(map(str, range(100))), workers=3)
    assert 1 < len({scores(graded)[0] for graded in done.values()}) <= 3


def test_what_a_call_leaves_broken_is_met_by_no_other(tmp_path, monkeypatch):
    (tmp_path / "here").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEPT", "yes")
    texts = [text for name in TAMPERING for text in (name, f"after {name}", f"later than {name}")]
    done = outcomes("undisturbed", one_each(texts), workers=1)
    expected = {text: [1.0] for text in texts}
    expected |= {"lie": [None], "be nobody": [None]}  # what they say cannot be read, or sent
    assert {text: scores(graded) for text, graded in done.items()} == expected


def test_workers_have_the_folder_and_the_environment_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADING_TEST_ANSWER", "42")
    (tmp_path / "answer.txt").write_text("42")
    assert scores(outcomes("surroundings", one_each(["42"]), workers=1)["42"]) == [1.0]


def test_a_worker_ends_as_any_program_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scores(outcomes("last_words", one_each(["a"]), workers=1)["a"]) == [1.0]
    assert gzip.decompress((tmp_path / "in a compressed file").read_bytes()) == b"done"
    assert zipfile.ZipFile(tmp_path / "in an archive").read("what") == b"done"
    for name in ("at exit", "in a thread", "in a file"):
        assert (tmp_path / name).read_text() == "done"
    assert len(list(tmp_path.iterdir())) == 5  # a temporary file is gone


def test_keys_stay_here_and_may_be_anything():
    key = object()
    (graded,) = score_items([ScoringItem(key, (view("a"),))], grader("length"), workers=1)
    assert graded.key is key


def test_large_rows_pass():
    text = "x" * 3_000_000
    assert scores(outcomes("length", one_each([text]), workers=1)[text]) == [3_000_000.0]


def test_items_are_read_as_results_are_taken():
    read = 0

    def items():
        nonlocal read
        for i in range(1000):
            read += 1
            yield ScoringItem(i, (view("a"),))

    running = score_items(items(), grader("length"), workers=2)
    assert read == 0
    for taken, _ in zip(range(1, 20), running, strict=False):
        assert read <= taken + 4
    running.close()


def test_no_items_are_no_work():
    assert outcomes("length", []) == {}


def test_closing_early_ends_the_workers_even_those_that_hang(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [ScoringItem(i, (view("hang" if i == 1 else "a"),)) for i in range(50)]
    running = score_items(items, grader("process_id"), workers=2, timeout=None)
    pids = {int(scores(next(running))[0]) for _ in range(20)}
    while not (tmp_path / "hanging").exists():
        time.sleep(0.01)
    pids.add(int((tmp_path / "hanging").read_text()))
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 120  # they would hang for longer
    assert all(is_gone(pid) for pid in pids)


def test_an_error_of_the_caller_or_of_the_items_ends_the_workers():
    def items():
        yield from one_each("abcdefgh")
        raise OSError("disk gone")

    pids = set()

    def consume():
        for graded in score_items(items(), grader("process_id"), workers=2):
            pids.add(int(scores(graded)[0]))

    with pytest.raises(OSError, match="disk gone"):
        consume()
    assert pids
    assert all(is_gone(pid) for pid in pids)


def test_when_all_is_graded_the_workers_are_gone():
    done = outcomes("process_id", one_each("abcdefgh"), workers=2)
    assert all(is_gone(int(scores(graded)[0])) for graded in done.values())


def test_pytest_exit_ends_the_run():
    with pytest.raises(ScoringError, match="length: the evaluator ended the run: no judge, no use"):
        outcomes("length", one_each(["a", "pytest.exit"]), workers=1)


def test_an_evaluator_whose_file_changed_meanwhile_is_not_used(tmp_path):
    loaded = grader("length")
    changed = dataclasses.replace(loaded, fingerprint="0" * 64)
    with pytest.raises(ScoringError, match=r"graders\.py::length was changed"):
        list(score_items(one_each("a"), changed, workers=1))


def test_an_evaluator_that_cannot_be_loaded_again_ends_the_run(tmp_path):
    loaded = grader("length")
    lost = dataclasses.replace(loaded, spec=f"{tmp_path}/gone.py::length")
    with pytest.raises(ScoringError, match=r"a worker cannot load the evaluator: .*no file"):
        list(score_items(one_each("a"), lost, workers=1))


def test_a_worker_that_dies_while_loading_ends_the_run(tmp_path):
    file = tmp_path / "dies_in_workers.py"
    file.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    os._exit(5)\n"
        "def f(row):\n    return 1.0\n"
    )
    with pytest.raises(ScoringError, match=r"died while it loaded the evaluator \(exit code 5\)"):
        list(score_items(one_each("a"), load_evaluator(f"{file}::f"), workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"timeout": 0.0}, "timeout must be finite and above 0"),
        ({"timeout": float("nan")}, "timeout must be finite and above 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        score_items([], grader("length"), **options)


@pytest.mark.parametrize(("name", "count"), [("length", 2), ("length", 0), ("test_rank", 0)])
def test_an_item_that_is_no_call_of_this_evaluator_is_refused(name, count):
    item = ScoringItem("k7", (view("a"),) * count)
    with pytest.raises(ValueError, match=f"item 'k7' has {count} views"):
        list(score_items([item], grader(name), workers=1))
