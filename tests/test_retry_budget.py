"""What a run may spend on attempts beyond the first ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._limits import RetryBudget

rates = st.fixed_dictionaries(
    {
        "extra_ratio": st.floats(0, 2),
        "burst": st.floats(1, 50),
        "trickle_per_second": st.floats(0.01, 10),
    }
)


@given(
    rates=rates,
    began=st.floats(0, 1e6),
    script=st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=200),
)
def test_retries_stay_below_the_line_that_the_budget_states(rates, began, script):
    budget = RetryBudget(began=began, **rates)
    now, first, retries = began, 0, 0
    for pause, retry in script:
        now += pause
        if budget.earliest(now, retry=retry) > now:
            continue
        budget.started(now, retry=retry)
        first, retries = first + (not retry), retries + retry
        line = rates["burst"] + rates["extra_ratio"] * first
        assert retries <= line + rates["trickle_per_second"] * (now - began) + 1e-3
    assert (budget.first_attempts, budget.retries) == (first, retries)


@given(rates=rates, began=st.floats(0, 1e6), spent=st.integers(0, 60))
def test_a_retry_that_must_wait_may_go_at_the_time_that_is_named(rates, began, spent):
    budget = RetryBudget(began=began, **rates)
    for _ in range(spent):
        at = budget.earliest(began, retry=True)
        if at > began:
            assert budget.earliest(at, retry=True) == at
            return
        budget.started(began, retry=True)
    assert spent <= rates["burst"] + 1


def test_a_first_attempt_never_waits():
    budget = RetryBudget(burst=1, began=0)
    for _ in range(5):
        budget.started(0, retry=True)
        assert budget.earliest(0, retry=False) == 0


def test_five_first_attempts_pay_for_a_retry():
    budget = RetryBudget(extra_ratio=0.2, burst=1, trickle_per_second=1e-6, began=0)
    budget.started(0, retry=True)
    for _ in range(4):
        budget.started(0, retry=False)
        assert budget.earliest(0, retry=True) > 0
    budget.started(0, retry=False)
    assert budget.earliest(0, retry=True) == 0


def test_hours_without_trouble_save_up_no_storm():
    budget = RetryBudget(burst=10, began=0)
    for second in range(10_000):
        budget.started(second, retry=False)
    granted = 0
    while budget.earliest(10_000, retry=True) <= 10_000:
        budget.started(10_000, retry=True)
        granted += 1
    assert granted == 10


def test_probes_are_counted_and_take_no_retry_away():
    budget = RetryBudget(burst=1, trickle_per_second=1e-6, began=0)
    for _ in range(5):
        assert budget.earliest(0, retry=True, probe=True) == 0
        budget.started(0, retry=True, probe=True)
    assert budget.earliest(0, retry=True) == 0
    assert (budget.attempts, budget.probes, budget.retries) == (5, 5, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"extra_ratio": -0.1},
        {"extra_ratio": math.nan},
        {"burst": 0.5},
        {"trickle_per_second": 0},
    ],
    ids=str,
)
def test_a_budget_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryBudget(began=0, **wrong)
