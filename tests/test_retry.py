"""When an attempt is worth another one. Time and chance come in as arguments."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import ContractError, RefusedError, SamplingError

TRANSIENT = [
    functools.partial(SamplingError, kind=kind) for kind in ("unavailable", "connection", "timeout")
]
FINAL = (RefusedError, ContractError, SamplingError)

policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 2000),
    max_seconds=st.floats(0, 1e6),
    base_seconds=st.floats(0, 100),
    cap_seconds=st.floats(0, 1000),
    retry_after_cap_seconds=st.floats(0, 1e4),
)
uniforms = st.floats(0, 1, exclude_max=True)
waits = st.none() | st.floats(0, 1e5)


def transient(retry_after: float | None = None) -> SamplingError:
    return SamplingError("busy", kind="unavailable", retry_after=retry_after)


@pytest.mark.parametrize("error", FINAL)
def test_what_would_come_back_the_same_is_not_tried_again(error):
    assert RetryPolicy().delay(error("no"), attempt=1, elapsed=0, uniform=0) is None


@pytest.mark.parametrize("error", TRANSIENT)
def test_what_may_pass_is_tried_again(error):
    assert RetryPolicy().delay(error("no"), attempt=1, elapsed=0, uniform=0.5) == 0.25


@pytest.mark.parametrize(
    ("attempt", "ceiling"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (6, 16.0), (7, 30.0)]
)
def test_the_delay_is_drawn_below_a_ceiling_that_doubles_up_to_a_cap(attempt, ceiling):
    policy = RetryPolicy(base_seconds=0.5, cap_seconds=30.0)
    for uniform in (0.0, 0.25, 0.999):
        wait = policy.delay(transient(), attempt=attempt, elapsed=0, uniform=uniform)
        assert wait == pytest.approx(uniform * ceiling)


@given(policy=policies, attempt=st.integers(1, 5000), elapsed=st.floats(0, 1e6), uniform=uniforms)
def test_a_delay_is_full_jitter_within_both_budgets(policy, attempt, elapsed, uniform):
    wait = policy.delay(transient(), attempt=attempt, elapsed=elapsed, uniform=uniform)
    if wait is None:
        beyond = elapsed + min(policy.cap_seconds, policy.base_seconds * 2.0 ** min(attempt, 900))
        assert attempt >= policy.max_attempts or beyond > policy.max_seconds
        return
    assert attempt < policy.max_attempts
    assert 0 <= wait <= policy.cap_seconds
    if attempt < 900:
        assert wait <= policy.base_seconds * 2.0 ** (attempt - 1)
    assert elapsed + wait <= policy.max_seconds


@given(policy=policies, attempt=st.integers(1, 50), uniform=uniforms, asked=st.floats(0, 1e5))
def test_retry_after_is_a_floor_up_to_its_cap_and_our_jitter_comes_on_top(
    policy, attempt, uniform, asked
):
    plain = policy.delay(transient(), attempt=attempt, elapsed=0, uniform=uniform)
    told = policy.delay(transient(asked), attempt=attempt, elapsed=0, uniform=uniform)
    floor = min(asked, policy.retry_after_cap_seconds)
    if told is not None:
        assert plain is not None
        assert told == floor + plain
    elif plain is not None:
        assert floor + plain > policy.max_seconds


def test_all_who_were_told_the_same_time_do_not_come_back_at_the_same_time():
    policy = RetryPolicy(base_seconds=1.0)
    waits = {policy.delay(transient(20.0), attempt=1, elapsed=0, uniform=u / 8) for u in range(8)}
    assert waits == {20.0 + u / 8 for u in range(8)}


@given(
    policy=policies,
    script=st.lists(st.tuples(waits, uniforms, st.floats(0, 1e4)), min_size=1, max_size=60),
)
def test_a_run_of_failures_ends_within_both_budgets(policy, script):
    """Play a whole completion: each attempt takes a while and fails."""
    clock, attempts = 0.0, 0
    for retry_after, uniform, seconds in script:
        began = clock
        attempts += 1
        clock += seconds
        wait = policy.delay(
            transient(retry_after), attempt=attempts, elapsed=clock, uniform=uniform
        )
        assert attempts == 1 or began <= policy.max_seconds
        if wait is None:
            break
        clock += wait
    assert attempts <= policy.max_attempts


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_seconds": -1},
        {"base_seconds": -0.1},
        {"cap_seconds": float("nan")},
        {"retry_after_cap_seconds": -1},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)
