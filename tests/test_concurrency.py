"""Limits, what they measure, and limit, breaker and budget together."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._adaptive import (
    BACK_OFF,
    FEWEST,
    SMALL_STEP,
    START,
    AdaptiveLimit,
    Measurement,
    ServerLoad,
)
from eval_protocol_rft.sampling._limits import (
    OPEN_AFTER,
    CircuitBreaker,
    ConcurrencyLimit,
    FixedLimit,
    RetryBudget,
    RunLimits,
    RunStoppedError,
)
from eval_protocol_rft.sampling._retry import Attempt


def success(started: float, ended: float, tokens: int = 100, queue: float | None = None) -> Attempt:
    return Attempt(started=started, ended=ended, tokens=tokens, queue_seconds=queue)


def failure(started: float, ended: float, kind="unavailable", status: int | None = 503) -> Attempt:
    return Attempt(started=started, ended=ended, kind=kind, status=status)


def limits_of(limit: ConcurrencyLimit | int, **budget) -> RunLimits:
    return RunLimits(
        limit=FixedLimit(limit) if isinstance(limit, int) else limit,
        breaker=CircuitBreaker(),
        budget=RetryBudget(**budget, began=0),
    )


# One limit by itself.


def test_a_fixed_limit_never_moves():
    limit = FixedLimit(7)
    limit.ended(failure(0, 1, status=429), in_flight=3)
    limit.outage()
    assert limit.limit == 7
    with pytest.raises(ValueError, match="at least 1"):
        FixedLimit(0)


@pytest.mark.parametrize("wrong", [{"lowest": 0}, {"start": 600}, {"start": 4, "lowest": 5}])
def test_bounds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="lowest <= start <= highest"):
        AdaptiveLimit(**wrong)


def serve(limit: AdaptiveLimit, clock: float, rounds: int, rate: float = 25.0) -> float:
    """Rounds of requests that fill the limit and end one after the other; each gets `rate`."""
    for _ in range(rounds):
        count, began = limit.limit, clock
        for number in range(count):
            clock = began + 4.0 + number / count
            tokens = round(rate * (clock - began))
            limit.ended(success(began, clock, tokens), in_flight=count - 1)
        clock += 0.001
    return clock


def test_it_doubles_while_every_request_is_served_as_fast_as_before():
    limit = AdaptiveLimit(highest=128)
    seen, clock = [START], 0.0
    for _ in range(30):
        clock = serve(limit, clock, 1)
        if seen[-1] != limit.limit:
            seen.append(limit.limit)
    assert seen[:4] == [START, START * 2, START * 4, START * 8]


def test_it_grows_from_one():
    limit = AdaptiveLimit(start=1, highest=64)
    limit.ended(failure(0, 1, status=429), in_flight=0)
    serve(limit, 2.0, 400)
    assert limit.limit > 16


def test_nothing_is_learnt_while_there_is_too_little_work_to_fill_it():
    limit = AdaptiveLimit()
    for second in range(1000):
        limit.ended(success(second, second + 5), in_flight=3)
    assert limit.limit == START


def test_a_rejection_brings_it_to_what_the_server_took():
    limit = AdaptiveLimit(start=128)
    for in_flight in range(127, 99, -1):
        limit.ended(failure(0, 1, status=429), in_flight=in_flight)
    assert limit.limit == int(100 * BACK_OFF)


def test_a_server_that_loses_one_request_in_a_hundred_keeps_its_limit():
    limit = AdaptiveLimit(start=64, highest=64)
    clock = serve(limit, 0.0, 1)
    lowest = 64
    for _ in range(20):
        clock = serve(limit, clock, 1)
        limit.ended(failure(clock - 1, clock), in_flight=limit.limit - 1)
        lowest = min(lowest, limit.limit)
    assert lowest >= 64 / SMALL_STEP - 1  # a trial further down, never a cut


@pytest.mark.parametrize(("kind", "status"), [("unavailable", 503), ("timeout", None)])
def test_a_server_that_loses_every_fifth_is_given_less(kind, status):
    limit = AdaptiveLimit(start=64, highest=64)
    clock = serve(limit, 0.0, 1)
    for _ in range(5):
        clock += 1
        limit.ended(failure(clock - 0.5, clock, kind, status), in_flight=63)
        for _ in range(4):
            limit.ended(success(clock - 0.5, clock, 10), in_flight=63)
    assert limit.limit < 50


def test_an_outage_does_not_count_as_too_many_requests():
    limit = AdaptiveLimit(start=64)
    serve(limit, 0.0, 1)
    before = limit.limit
    for _ in range(OPEN_AFTER):
        limit.ended(failure(5, 6, status=429), in_flight=10)
    assert limit.limit < before
    limit.outage()
    assert limit.limit == before


def test_a_queue_that_the_server_tells_of_is_not_fed_further():
    """Half of each request's time is waiting: half of the limit does the work."""
    limit = AdaptiveLimit(start=64)
    limit.ended(success(0, 1), in_flight=63)
    for _ in range(64):
        limit.ended(success(2, 12, queue=5.0), in_flight=63)
    assert limit.limit == int(64 * 0.5 * 1.15)


def test_a_queue_in_the_servers_metrics_says_the_same():
    limit = AdaptiveLimit(start=64)
    limit.ended(success(0, 1), in_flight=63)
    limit.observe(ServerLoad(running=32, waiting=32))
    for _ in range(64):
        limit.ended(success(2, 12), in_flight=63)
    assert limit.limit == int(64 * 0.5 * 1.15)


def test_preempted_requests_are_a_sign_of_too_many():
    limit = AdaptiveLimit(start=64)
    limit.observe(ServerLoad(running=64, waiting=0))
    assert limit.limit == 64
    limit.observe(ServerLoad(running=60, waiting=4, preempted=3))
    assert limit.limit == int(64 * BACK_OFF)


outcomes = st.tuples(
    st.sampled_from(["ok", "ok", "ok", "429", "503", "timeout", "400", "outage", "load"]),
    st.floats(0, 30),
    st.integers(0, 5000),
    st.none() | st.floats(0, 1),
    st.floats(0, 1.5),
)


@given(
    script=st.lists(outcomes, max_size=400),
    bounds=st.tuples(st.integers(1, 8), st.integers(0, 30), st.integers(0, 500)),
)
def test_whatever_it_hears_it_stays_within_its_bounds(script, bounds):
    lowest, above, further = bounds
    start, highest = lowest + above, lowest + above + further
    limit = AdaptiveLimit(start=start, lowest=lowest, highest=highest)
    clock = 0.0
    for what, seconds, tokens, queued, fill in script:
        began, clock = clock, clock + seconds
        in_flight = int(limit.limit * fill)
        if what == "outage":
            limit.outage()
        elif what == "load":
            limit.observe(ServerLoad(running=in_flight, waiting=tokens % 50, preempted=tokens % 2))
        elif what == "ok":
            queue = None if queued is None else queued * (clock - began)
            limit.ended(success(began, clock, tokens, queue), in_flight=in_flight)
        elif what == "timeout":
            limit.ended(failure(began, clock, "timeout", None), in_flight=in_flight)
        elif what == "400":
            before = limit.limit
            limit.ended(failure(began, clock, "refused", 400), in_flight=in_flight)
            assert limit.limit == before
        else:
            limit.ended(failure(began, clock, status=int(what)), in_flight=in_flight)
        assert lowest <= limit.limit <= highest


# Measurements.


def test_only_requests_begun_after_the_move_took_effect_are_measured():
    measurement = Measurement(FEWEST)
    measurement.succeeded(success(0, 9, tokens=1), in_flight=FEWEST + 5)
    measurement.succeeded(success(0, 10, tokens=1), in_flight=FEWEST)
    for _ in range(FEWEST):
        measurement.succeeded(success(9, 20, tokens=1), in_flight=FEWEST)
    assert not measurement.full
    for _ in range(FEWEST):
        measurement.succeeded(success(10, 20, tokens=250), in_flight=FEWEST)
    assert measurement.full
    assert measurement.rate == 25.0


@given(before=st.floats(1, 100), after=st.floats(1, 100), share=st.floats(0.5, 1))
def test_the_early_estimate_finds_the_new_rate_of_requests_that_began_before(before, after, share):
    """Closed form: what a request did before the move is its old rate times its time."""
    measurement = Measurement(FEWEST, rate_before=before)
    measurement.succeeded(success(0, 100), in_flight=FEWEST)
    old = 10 * (1 - share) / share
    tokens = round(1e6 * (before * old + after * 10))
    attempt = success(100 - old * 1e6, 100 + 10 * 1e6, tokens)
    for _ in range(FEWEST - 1):
        measurement.succeeded(attempt, in_flight=FEWEST)
    assert measurement.early_rate is None
    measurement.succeeded(attempt, in_flight=FEWEST)
    if share > 0.5001:
        assert measurement.early_rate == pytest.approx(after, rel=1e-3)


@given(paces=st.lists(st.floats(0.01, 10), min_size=2, max_size=60))
def test_the_spread_is_the_relative_standard_deviation_of_the_pace(paces):
    measurement = Measurement(1)
    measurement.succeeded(success(0, 0), in_flight=1)
    for pace in paces:
        measurement.succeeded(success(0, 100 * pace), in_flight=1)
    expected = statistics.pstdev(paces) / statistics.fmean(paces)
    assert measurement.spread == pytest.approx(expected, rel=1e-3, abs=1e-6)


# All machines together.


def test_no_more_than_the_limit_are_in_flight():
    limits = limits_of(3)
    for _ in range(3):
        assert limits.earliest(0, retry=False) <= 0
        limits.started(0, retry=False)
    assert limits.earliest(0, retry=False) == math.inf
    limits.ended(success(0, 1))
    assert limits.earliest(1, retry=False) <= 1
    limits.started(1, retry=False)
    limits.abandoned(probe=False)
    assert limits.in_flight == 2


def test_a_retry_waits_for_the_budget_while_a_first_attempt_goes():
    limits = limits_of(8, burst=1, trickle_per_second=0.5)
    # Twice as many as were in flight at once, and then what time pays for.
    for _ in range(2):
        assert limits.earliest(0, retry=True) <= 0
        limits.started(0, retry=True)
        limits.abandoned(probe=False)
    assert limits.earliest(0, retry=True) == 2.0
    assert limits.earliest(0, retry=False) <= 0


def test_the_breaker_ends_the_run():
    refused = limits_of(8)
    for _ in range(8):
        refused.started(0, retry=False)
        refused.ended(failure(0, 1, "refused", 401))
    with pytest.raises(RunStoppedError, match="8 requests in a row"):
        refused.earliest(1, retry=False)


def test_failures_of_an_outage_leave_the_limit_as_it_was():
    limits = limits_of(AdaptiveLimit(start=64))
    for _ in range(64):
        limits.started(0, retry=False)
    for _ in range(64):
        limits.ended(failure(0, 10, "connection", None))
    assert limits.breaker.state == "open"
    assert limits.limit.limit == 64


steps = st.tuples(
    st.sampled_from(["ok", "503", "429", "401", "abandon"]), st.floats(0, 20), st.booleans()
)


@given(script=st.lists(steps, max_size=300), limit=st.integers(1, 20))
def test_in_flight_is_what_was_started_and_has_not_ended(script, limit):
    limits = limits_of(limit, burst=5)
    now, flying = 0.0, []
    for what, seconds, retry in script:
        now += seconds
        stopped = limits.breaker.stopped is not None
        at = None if stopped else limits.earliest(now, retry=retry)
        if at is not None and at <= now:
            flying.append((now, limits.started(now, retry=retry)))
            assert len(flying) <= limit
        else:
            assert stopped or math.isfinite(at) or flying
        if flying and (what == "abandon" or at is None or at > now):
            began, probe = flying.pop(0)
            if what == "abandon":
                limits.abandoned(probe=probe)
            elif what == "ok":
                limits.ended(Attempt(started=began, ended=now, tokens=5, probe=probe))
            else:
                kind = "refused" if what == "401" else "unavailable"
                limits.ended(
                    Attempt(started=began, ended=now, kind=kind, status=int(what), probe=probe)
                )
        assert limits.in_flight == len(flying)
