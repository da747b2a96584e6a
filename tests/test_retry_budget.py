"""What a run may spend on attempts beyond the first ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._retry import BudgetMeter, Go, RunBudget, Stop, Wait

budgets = st.builds(
    RunBudget,
    extra_ratio=st.floats(0, 2),
    burst=st.floats(1, 50),
    trickle_per_second=st.floats(0.01, 10),
)


@given(
    budget=budgets,
    began=st.floats(0, 1e6),
    script=st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=200),
)
def test_retries_stay_below_the_line_that_the_budget_states(budget, began, script):
    meter = BudgetMeter(budget, began=began)
    now, first, retries = began, 0, 0
    for pause, retry in script:
        now += pause
        if not isinstance(meter.may_start(now, retry=retry), Go):
            continue
        meter.started(now, retry=retry)
        first, retries = first + (not retry), retries + retry
        line = budget.burst + budget.extra_ratio * first
        assert retries <= line + budget.trickle_per_second * (now - began) + 1e-3
    assert (meter.first_attempts, meter.retries) == (first, retries)


@given(budget=budgets, began=st.floats(0, 1e6), spent=st.integers(0, 60))
def test_a_retry_that_must_wait_may_go_at_the_time_that_is_named(budget, began, spent):
    meter = BudgetMeter(budget, began=began)
    for _ in range(spent):
        answer = meter.may_start(began, retry=True)
        if isinstance(answer, Wait):
            assert answer.until > began
            assert meter.may_start(answer.until, retry=True) == Go()
            return
        meter.started(began, retry=True)
    assert spent <= budget.burst + 1


def test_a_first_attempt_never_waits():
    meter = BudgetMeter(RunBudget(burst=1), began=0)
    for _ in range(5):
        meter.started(0, retry=True)
        assert meter.may_start(0, retry=False) == Go()


def test_five_first_attempts_pay_for_a_retry():
    meter = BudgetMeter(RunBudget(extra_ratio=0.2, burst=1, trickle_per_second=1e-6), began=0)
    meter.started(0, retry=True)
    for _ in range(4):
        meter.started(0, retry=False)
        assert isinstance(meter.may_start(0, retry=True), Wait)
    meter.started(0, retry=False)
    assert meter.may_start(0, retry=True) == Go()


def test_hours_without_trouble_save_up_no_storm():
    meter = BudgetMeter(RunBudget(burst=10), began=0)
    for second in range(10_000):
        meter.started(second, retry=False)
    granted = 0
    while isinstance(meter.may_start(10_000, retry=True), Go):
        meter.started(10_000, retry=True)
        granted += 1
    assert granted == 10


def test_probes_are_counted_and_take_no_retry_away():
    meter = BudgetMeter(RunBudget(burst=1, trickle_per_second=1e-6), began=0)
    for _ in range(5):
        assert meter.may_start(0, retry=True, probe=True) == Go()
        meter.started(0, retry=True, probe=True)
    assert meter.may_start(0, retry=True) == Go()
    assert (meter.attempts, meter.probes, meter.retries) == (5, 5, 0)


def test_the_run_stops_at_its_last_attempt_and_says_what_it_spent():
    meter = BudgetMeter(RunBudget(max_attempts=3), began=0)
    meter.started(0, retry=False)
    meter.started(0, retry=True)
    assert meter.may_start(0, retry=False) == Go()
    meter.started(0, retry=True, probe=True)
    answer = meter.may_start(0, retry=False)
    assert isinstance(answer, Stop)
    assert "max_attempts=3" in answer.reason
    assert "3 attempts: 1 first ones, 1 retries, 1 probes" in answer.reason


def test_the_run_stops_when_its_time_is_over():
    meter = BudgetMeter(RunBudget(max_seconds=60), began=100)
    assert meter.may_start(159.9, retry=False) == Go()
    answer = meter.may_start(160, retry=False)
    assert isinstance(answer, Stop)
    assert "max_seconds=60" in answer.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"extra_ratio": -0.1},
        {"extra_ratio": math.nan},
        {"burst": 0.5},
        {"trickle_per_second": 0},
        {"max_attempts": -1},
        {"max_seconds": -1},
    ],
    ids=str,
)
def test_a_budget_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunBudget(**wrong)
