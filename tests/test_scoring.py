"""What `@score_each_completion` leaves on a row, without Eval Protocol around it."""

import asyncio
import copy
import json
import os
from fractions import Fraction

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, MetricResult
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.scoring._scorer import score_each_completion
from tests.scored_rows import answered, give, results, rewards, said


@score_each_completion
def is_right(row: EvaluationRow) -> EvaluationRow:
    return give(row, float(said(row) == "2"), reason=f"saw {said(row)}")


def metric(row, name):
    return row.evaluation_result.metrics[name].score


def test_every_completion_gets_its_own_reward_and_the_row_their_mean():
    row = is_right(answered("2", "3", "2", "4"))
    assert rewards(row) == [1.0, 0.0, 1.0, 0.0]
    assert row.evaluation_result.score == 0.5
    assert row.evaluation_result.is_score_valid


def test_the_row_given_comes_back_with_its_messages_and_the_rest_of_its_record():
    row = answered("2", "3")
    row.execution_metadata.extra["run_index"] = 7
    messages = copy.deepcopy(row.messages)
    before = dict(row.execution_metadata.extra)
    assert is_right(row) is row
    assert row.messages == messages
    after = row.execution_metadata.extra
    assert {key: after[key] for key in before} == before
    assert RolloutRecord.from_extra(after).rewards == [1.0, 0.0]


def test_reason_and_metrics_of_each_completion_are_kept_as_plain_json():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        give(row, 0.25, reason="close")
        data = {"steps": np.arange(3), "loss": float("nan"), "rate": np.float64(0.5)}
        row.evaluation_result.metrics = {
            "m": MetricResult(score=1, reason="r", data=data),
            "nan": MetricResult(score=float("nan"), reason="r"),
            "bare": float("inf"),
        }
        return row

    (result,) = results(evaluator(answered("x")))
    expected = {"steps": [0, 1, 2], "loss": None, "rate": 0.5}
    assert json.loads(json.dumps(result, allow_nan=False)) == {
        "score": 0.25,
        "reason": "close",
        "metrics": {
            "m": {"is_score_valid": True, "score": 1.0, "reason": "r", "data": expected},
        },
        "error": "metric 'm' has numbers that are not finite: data.loss; "
        "metric 'nan' is left out: its score is not a finite number; "
        "metric 'bare' is left out: its score is not a finite number",
    }


def test_a_metric_that_is_no_json_is_left_out_and_named_and_the_score_stays():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        give(row, 1.0)
        bad = MetricResult(score=1, reason="r", data={"handle": object()})
        row.evaluation_result.metrics = {"bad": bad, "good": MetricResult(score=1, reason="r")}
        return row

    row = evaluator(answered("x"))
    assert rewards(row) == [1.0]
    assert list(results(row)[0]["metrics"]) == ["good"]
    assert "metric 'bad' is left out" in results(row)[0]["error"]


def unreadable(row: EvaluationRow) -> EvaluationRow:
    class UnreadableError(Exception):
        def __str__(self) -> str:
            raise OSError("no")

    raise UnreadableError


def fails_with_half_a_pair(row: EvaluationRow) -> EvaluationRow:
    raise ValueError("cannot read \ud83d")


def says_half_a_pair(row: EvaluationRow) -> EvaluationRow:
    give(row, 1.0, reason="said \ud83d")
    metric = MetricResult(score=1, reason="\ud83d", data={"k\ud83d": "\ude00"})
    row.evaluation_result.metrics = {"m\ud83d": metric}
    return row


def test_text_that_utf_8_cannot_hold_costs_a_character_of_what_an_evaluator_says():
    row = score_each_completion(says_half_a_pair)(answered("x"))
    json.dumps(row.model_dump(mode="json"), ensure_ascii=False).encode()
    (result,) = results(row)
    assert (result["score"], result["reason"], result["error"]) == (1.0, "said \ufffd", None)
    assert result["metrics"]["m\ufffd"]["data"] == {"k\ufffd": "\ufffd"}


@pytest.mark.parametrize("evaluator", [fails_with_half_a_pair, unreadable])
def test_an_exception_of_any_text_costs_its_own_completion(evaluator):
    row = score_each_completion(evaluator)(answered("x", "y"))
    json.dumps(row.model_dump(mode="json"), ensure_ascii=False).encode()
    assert rewards(row) == [None, None]
    told = results(row)[0]["error"]
    assert told.startswith(
        (
            "ValueError: cannot read \ufffd (",
            "UnreadableError: (UnreadableError, whose text raised OSError)",
        )
    )


def test_pass_at_k_and_counts_are_metrics_of_the_row():
    row = is_right(answered("2", "3", "4", "2", "5", num_failed=3))
    names = [name for name in row.evaluation_result.metrics if name.startswith("pass@")]
    assert names == ["pass@1", "pass@2", "pass@4", "pass@5"]
    assert metric(row, "pass@1") == pytest.approx(2 / 5)
    assert metric(row, "pass@2") == pytest.approx(1 - 3 / 10)  # 3 of 10 pairs are both wrong
    assert metric(row, "pass@5") == 1.0
    assert metric(row, "completions_scored") == 5 / 8
    assert metric(row, "completions_unscored") == 0
    assert metric(row, "completions_failed") == 3 / 8
    scored = row.evaluation_result.metrics["completions_scored"]
    assert (scored.reason, scored.data) == (
        "5 of 8 completions have a valid score",
        {"count": 5},
    )
    assert metric(row, "reward_mean") == pytest.approx(0.4)
    assert (metric(row, "reward_min"), metric(row, "reward_max")) == (0.0, 1.0)
    assert "3 could not be sampled" in row.evaluation_result.reason


def test_pass_threshold_decides_what_counts_as_passed():
    def half(row: EvaluationRow) -> EvaluationRow:
        return give(row, float(said(row)))

    texts = ("0.4", "0.5", "0.9")
    assert metric(score_each_completion(half)(answered(*texts)), "pass@1") == 0.0
    low = score_each_completion(pass_threshold=0.5)(half)
    assert metric(low(answered(*texts)), "pass@1") == pytest.approx(2 / 3)


@pytest.mark.parametrize(("aggregation", "expected"), [("mean", 0.6), ("first", 0.2), ("max", 1.0)])
def test_the_row_s_score_is_the_aggregate_that_was_asked_for(aggregation, expected):
    @score_each_completion(aggregation=aggregation)
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return give(row, float(said(row)))

    # The unscored completion in front counts for nothing.
    row = evaluator(answered("nan", "0.2", "1.0"))
    assert row.evaluation_result.score == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_the_mean_is_that_of_the_scores(scores):
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return give(row, float(said(row)))

    row = evaluator(answered(*map(str, scores)))
    assert rewards(row) == scores
    assert row.evaluation_result.score == pytest.approx(np.mean(scores))


def raises(row):
    raise ZeroDivisionError("no luck")


def test_where_the_evaluator_raises_the_completion_has_no_score_and_the_others_keep_theirs():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return raises(row) if said(row) == "bad" else give(row, 1.0)

    row = evaluator(answered("good", "bad", "good"))
    assert rewards(row) == [1.0, None, 1.0]
    assert row.evaluation_result.score == 1.0
    assert metric(row, "completions_unscored") == 1 / 3
    error = results(row)[1]["error"]
    assert error.startswith("ZeroDivisionError: no luck (test_scoring.py:")
    assert f"1 unscored, first completion 1: {error}" in row.evaluation_result.reason


def test_an_error_deep_in_a_library_names_the_line_of_the_evaluator_that_led_there():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return give(row, json.loads(said(row)))

    (result,) = results(evaluator(answered("{")))
    line = evaluator.__wrapped__.__code__.co_firstlineno + 2
    assert result["error"].endswith(f"(test_scoring.py:{line})")


ANSWERS_WITHOUT_A_SCORE = {
    "no result": (lambda row: row, "returned no evaluation_result"),
    "NaN": (lambda row: give(row, float("nan")), "the score is nan, not a finite number"),
    "infinite": (lambda row: give(row, float("inf")), "the score is inf"),
    "text": (lambda row: give(row, "1.0"), "the score is '1.0', not a number"),
    "no number": (lambda row: give(row, None), "the score is None"),
    "marked invalid": (lambda row: give(row, 1.0, is_score_valid=False), "marked the score"),
    "its error": (lambda row: give(row, 1.0, is_score_valid=False, error="gone"), "gone"),
    "too large": (lambda row: give(row, 10**400), "an integer too large for a float"),
    "nothing": (lambda row: None, "returned NoneType, not an EvaluationRow"),
    "bare text": (lambda row: "1.0", "returned str, not an EvaluationRow"),
    "a list": (lambda row: [row], "returned list, not an EvaluationRow"),
    "a complex number": (lambda row: 1j, "returned complex, not an EvaluationRow"),
    "bare NaN": (lambda row: float("nan"), "the score is nan, not a finite number"),
    "bare and too large": (lambda row: 10**400, "an integer too large for a float"),
    "an invalid result": (
        lambda row: EvaluateResult(score=1.0, is_score_valid=False),
        "marked the score",
    ),
    "raises": (raises, "ZeroDivisionError: no luck"),
    "asserts": (lambda row: pytest.fail("wrong"), "Failed: wrong"),
    "skips": (lambda row: pytest.skip("no judge"), "Skipped: no judge"),
}


@pytest.mark.parametrize("kind", ANSWERS_WITHOUT_A_SCORE)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_without_a_valid_score_is_none_and_says_why(kind, is_async):
    answer, message = ANSWERS_WITHOUT_A_SCORE[kind]

    def sync(row: EvaluationRow) -> EvaluationRow:
        return answer(row) if said(row) == "bad" else give(row, 0.5)

    async def asynchronous(row: EvaluationRow) -> EvaluationRow:
        return sync(row)

    row = answered("0.5", "bad")
    if is_async:
        asyncio.run(score_each_completion(asynchronous)(row))
    else:
        score_each_completion(sync)(row)
    assert rewards(row) == [0.5, None]
    assert message in results(row)[1]["error"]
    assert row.evaluation_result.score == 0.5
    RolloutRecord.from_extra(row.execution_metadata.extra)


def test_a_numpy_score_is_a_score():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return give(row, np.float32(0.5))

    row = evaluator(answered("x"))
    assert rewards(row) == [0.5]
    assert type(rewards(row)[0]) is float


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (0.25, 0.25),
        (1, 1.0),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_a_number_is_a_score_without_reason_or_metrics(answer, score):
    @score_each_completion
    def evaluator(row: EvaluationRow) -> float:
        return answer

    row = evaluator(answered("x"))
    assert rewards(row) == [score]
    assert type(rewards(row)[0]) is float
    assert results(row) == [{"score": score, "reason": None, "metrics": {}, "error": None}]


def test_a_bare_evaluate_result_says_as_much_as_one_on_the_row():
    fields = {"reason": "close", "metrics": {"m": MetricResult(score=1, reason="r")}}

    @score_each_completion
    def bare(row: EvaluationRow) -> EvaluateResult:
        return EvaluateResult(score=0.5, **fields)

    @score_each_completion
    def on_row(row: EvaluationRow) -> EvaluationRow:
        return give(row, 0.5, **fields)

    assert results(bare(answered("x"))) == results(on_row(answered("x")))


def test_a_row_whose_completions_all_lack_a_score_is_invalid_and_not_a_zero_for_a_trainer():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        return raises(row)

    row = evaluator(answered("a", "b"))
    assert rewards(row) == [None, None]
    assert not row.evaluation_result.is_score_valid
    assert "no completion has a valid score" in row.evaluation_result.reason
    assert "ZeroDivisionError" in row.evaluation_result.reason
    assert "reward_mean" not in row.evaluation_result.metrics


class Late(BaseException):
    """As libraries have it that end what takes too long."""


@pytest.mark.parametrize(
    ("stop", "why"),
    [
        (SystemExit(3), "the evaluator called sys.exit (3)"),
        (SystemExit("done"), "the evaluator called sys.exit ('done')"),
        (Late("too long"), "Late: too long (test_scoring.py:"),
    ],
)
async def test_what_ends_code_that_an_evaluator_runs_costs_its_own_completion(stop, why):
    def judge(row: EvaluationRow) -> EvaluationRow:
        if said(row) == "b":
            raise stop
        return give(row, 1.0)

    async def judge_async(row: EvaluationRow) -> EvaluationRow:
        return judge(row)

    rows = [
        score_each_completion(judge)(answered("a", "b", "c")),
        await score_each_completion(judge_async)(answered("a", "b", "c")),
    ]
    for row in rows:
        assert rewards(row) == [1.0, None, 1.0]
        assert results(row)[1]["error"].startswith(why)


class Unreadable(float):
    def __float__(self):
        raise OSError("no number")

    def __repr__(self):
        raise OSError("no text")


@pytest.mark.parametrize(
    "fields",
    [
        {"score": Unreadable(1.0)},
        {"score": ["x" * 10_000]},
        {"is_score_valid": np.array([True, False])},
        {"metrics": [1.0]},
    ],
)
def test_a_result_that_cannot_be_read_costs_its_own_completion(fields):
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        give(row, 1.0)
        if said(row) == "b":
            for name, value in fields.items():
                setattr(row.evaluation_result, name, value)
        return row

    row = evaluator(answered("a", "b", "c"))
    assert rewards(row) == [1.0, None, 1.0]
    assert 0 < len(results(row)[1]["error"]) < 400


@pytest.mark.parametrize("stop", [KeyboardInterrupt, asyncio.CancelledError])
def test_what_ends_the_run_passes_through_and_leaves_the_row_as_it_was(stop):
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        if said(row) == "b":
            raise stop
        return give(row, 1.0)

    row = answered("a", "b")
    with pytest.raises(stop):
        evaluator(row)
    assert row == answered_like(row, "a", "b")


def answered_like(row, *texts):
    fresh = answered(*texts)
    for name in ("rollout_id", "experiment_id", "invocation_id"):
        setattr(fresh.execution_metadata, name, getattr(row.execution_metadata, name))
    fresh.created_at = row.created_at
    return fresh


def test_pytest_exit_passes_through():
    @score_each_completion
    def evaluator(row: EvaluationRow) -> EvaluationRow:
        pytest.exit("enough")

    with pytest.raises(pytest.exit.Exception, match="enough"):
        evaluator(answered("a"))


def test_a_copy_of_this_process_that_an_evaluator_forks_ends_with_its_call(tmp_path):
    @score_each_completion
    def forks(row: EvaluationRow) -> EvaluationRow:
        child = os.fork()
        with (tmp_path / "went on").open("a") as file:
            file.write(f"{child}\n")
        return give(row, float(said(row)))

    row = forks(answered("1", "2", "3"))
    assert rewards(row) == [1.0, 2.0, 3.0]
    written = (tmp_path / "went on").read_text().split()
    children = [int(pid) for pid in written if pid != "0"]
    # Each child comes back from one call, and makes no other.
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert sorted((tmp_path / "went on").read_text().split()).count("0") == 3
