"""Options, rows and their order."""

from __future__ import annotations

import json
import math

import pytest
from eval_protocol.models import EvaluationRow, Message
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.loop._data import load_rows, split_rows
from eval_protocol_rft.loop._run_options import LoopOptions, SetupError
from eval_protocol_rft.loop._scheduler import Draw, RowStream
from examples.arithmetic import test_arithmetic as example


def test_the_learning_rate_rises_in_a_line_and_then_follows_its_schedule() -> None:
    options = LoopOptions(
        steps=103, learning_rate=1.0, warmup_steps=3, schedule="linear", min_learning_rate=0.2
    )
    rates = [options.learning_rate_at(step, 103) for step in range(1, 105)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[-1] == pytest.approx(0.2)
    assert rates[53] == pytest.approx(0.6)  # half way from step 4 to the one after the last
    cosine = LoopOptions(steps=100, learning_rate=2.0, schedule="cosine")
    assert cosine.learning_rate_at(51, 100) == pytest.approx(1.0)
    assert cosine.learning_rate_at(26, 100) == pytest.approx(1 + math.cos(math.pi / 4))
    assert LoopOptions(steps=1, learning_rate=3.0).learning_rate_at(1, 1) == 3.0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "steps or epochs"),
        ({"steps": 1, "epochs": 1.0}, "steps or epochs"),
        ({"steps": 0}, "steps"),
        ({"steps": 1, "groups_per_step": 0}, "groups_per_step"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 1, "learning_rate": math.nan}, "learning_rate"),
        ({"steps": 1, "max_staleness": -1}, "max_staleness"),
        ({"steps": 1, "schedule": "exponential"}, "schedule"),
        ({"steps": 1, "normalization": "none"}, "normalization"),
        ({"steps": 1, "completions_per_prompt": 1}, "compares the completions"),
        ({"steps": 1, "algorithm": "ppo2"}, "unknown algorithm"),
        ({"steps": 1, "normalization": "constant"}, "constant_length"),
        ({"steps": 1, "normalization": "foo"}, "normalization"),
        ({"steps": 1, "pass_threshold": math.nan}, "pass_threshold"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoopOptions(**wrong)  # type: ignore[arg-type]


def test_options_that_change_the_curve_are_settings() -> None:
    one = LoopOptions(steps=5).settings()
    assert one != LoopOptions(steps=6).settings()
    assert one == LoopOptions(steps=5, checkpoint_every=1, on_mismatch="warn").settings()
    assert json.loads(json.dumps(one))["filters"]["truncated"] == "keep"


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 4))
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
    rows: int, seed: int, epochs: int
) -> None:
    stream = RowStream(rows, seed, epochs)
    draws = list(iter(stream.next, None))
    assert len(draws) == rows * epochs
    for epoch in range(epochs):
        places = [draw.place for draw in draws if draw.epoch == epoch]
        assert sorted(places) == list(range(rows))
    if rows > 20 and epochs > 1:
        assert [d.place for d in draws[:rows]] != [d.place for d in draws[rows : 2 * rows]]


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 8))
def test_a_stream_goes_on_where_another_was(rows: int, taken: int, outstanding: int) -> None:
    whole = RowStream(rows, 7)
    before = [whole.next() for _ in range(taken)]
    after = [whole.next() for _ in range(10)]
    left = before[len(before) - outstanding :] if outstanding else []

    resumed = RowStream(rows, 7, taken=taken, put_back=[d for d in left if d is not None])

    assert [resumed.next() for _ in range(len(left) + 10)] == [*left, *after]
    assert all(isinstance(draw, Draw) for draw in after)


def test_half_an_epoch_is_half_of_the_rows() -> None:
    stream = RowStream(10, 0, 0.5)
    assert len(list(iter(stream.next, None))) == 5


def _rows(count: int) -> list[EvaluationRow]:
    return [EvaluationRow(messages=[Message(role="user", content=str(i))]) for i in range(count)]


def test_held_out_rows_are_never_trained_on() -> None:
    rows = _rows(50)
    train, held = split_rows(rows, 0.1, seed=3)
    assert (len(train), len(held)) == (45, 5)
    assert {id(row) for row in train}.isdisjoint(id(row) for row in held)
    assert split_rows(rows, 0.1, seed=3)[1] == held
    assert split_rows(rows, 0.1, seed=4)[1] != held
    assert len(split_rows(rows, 7, seed=0)[1]) == 7
    assert split_rows(rows, 0, seed=0) == (rows, [])


@pytest.mark.parametrize("held_out", [-0.1, 50, 100])
def test_something_must_be_left_to_train_on(held_out: float) -> None:
    with pytest.raises(SetupError, match="left to train on"):
        split_rows(_rows(50), held_out, seed=0)


def test_the_tests_own_data_set_is_read_and_can_be_replaced(tmp_path) -> None:
    assert len(load_rows(example.test_arithmetic)) == 64
    other = tmp_path / "other.jsonl"
    other.write_text('{"messages": [{"role": "user", "content": "1+1="}], "ground_truth": "2"}\n')
    (row,) = load_rows(example.test_arithmetic, [str(other)])
    assert row.ground_truth == "2"
    assert row.input_metadata.row_id


def test_missing_data_is_said(tmp_path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        load_rows(example.test_arithmetic, [str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(SetupError, match="--data"):
        load_rows(lambda row: 1.0)


def test_options_are_errors_of_value() -> None:
    assert issubclass(SetupError, ValueError)
