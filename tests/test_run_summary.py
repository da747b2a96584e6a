"""What a run's summary says, against numpy and brute force."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._retry import Attempt
from eval_protocol_rft.sampling._run_summary import (
    QUANTILE_ERROR,
    SERIES_POINTS,
    SHORTEST,
    Cost,
    Prices,
    RunSummary,
)
from eval_protocol_rft.sampling._telemetry import AttemptEvent


def event(
    started=0.0, seconds=1.0, *, gives_up=False, in_flight=0, prompt_tokens=None, **attempt
) -> AttemptEvent:
    return AttemptEvent(
        attempt=Attempt(started=started, ended=started + seconds, **attempt),
        number=1,
        model="m",
        prompt="row",
        prompt_tokens=prompt_tokens,
        index=0,
        seed=None,
        request_id=None,
        in_flight=in_flight,
        gives_up=gives_up,
    )


def summary(*events: AttemptEvent, **options) -> RunSummary:
    run = RunSummary(**options)
    for each in events:
        run.add(each)
    return run


spans = st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e3)), min_size=1, max_size=40)


def overlap(intervals, low, high):
    return sum(max(0.0, min(end, high) - max(start, low)) for start, end in intervals)


@given(spans, st.sampled_from([1e-3, 1.0, 100.0]), st.floats(0, 1e6), st.randoms())
def test_in_flight_over_time_is_what_integrating_every_attempt_gives(pairs, scale, clock, rng):
    intervals = [(clock + scale * at, clock + scale * (at + long)) for at, long in pairs]
    rng.shuffle(intervals)
    run = summary(*(event(start, end - start) for start, end in intervals))
    began = min(start for start, _ in intervals)
    ended = max(start + (end - start) for start, end in intervals)
    points = run.in_flight()
    assert run.seconds == pytest.approx(ended - began, abs=1e-6)
    assert len(points) <= SERIES_POINTS
    if not points:
        assert ended - began < 1e-6
        return
    assert points[0].start == 0
    for before, after in pairwise(points):
        assert after.start == pytest.approx(before.start + before.seconds, abs=1e-6)
    assert points[-1].start + points[-1].seconds == pytest.approx(run.seconds, abs=1e-6)
    for point in points:
        low = began + point.start
        area = overlap(intervals, low, low + point.seconds)
        assert point.mean * point.seconds == pytest.approx(area, rel=1e-6, abs=1e-6)
    total = sum(end - start for start, end in intervals)
    assert run.mean_in_flight == pytest.approx(total / run.seconds, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=30))
def test_the_most_in_flight_is_the_highest_of_all_moments(pairs):
    intervals = sorted(((start, start + long) for start, long in pairs), key=lambda pair: pair[1])
    run = RunSummary()
    for place, (start, end) in enumerate(intervals):
        others = sum(1 for begun, _ in intervals[place + 1 :] if begun < end)
        run.add(event(start, end - start, in_flight=others))
    moments = [sum(start <= t < end for start, end in intervals) for t in range(60)]
    assert run.max_in_flight == max(moments)


@given(
    st.lists(st.floats(1e-5, 3600), min_size=1, max_size=300),
    st.sampled_from([0, 1, 7, 50, 95, 99, 100]),
)
def test_latency_quantiles_are_within_the_stated_error_of_the_exact_ones(latencies, percent):
    run = summary(*(event(0.0, seconds) for seconds in latencies))
    exact = np.percentile(latencies, percent, method="inverted_cdf")
    told = run.latency(percent)
    if exact < SHORTEST:
        assert told == 0
    else:
        assert abs(told - exact) <= exact * QUANTILE_ERROR * (1 + 1e-9)


def test_quantiles_hold_for_many_attempts_of_a_long_tail():
    latencies = np.random.default_rng(0).lognormal(1.0, 1.2, 20_000)
    run = summary(*(event(0.0, seconds) for seconds in latencies.tolist()))
    for percent in (50, 95, 99):
        exact = np.percentile(latencies, percent, method="inverted_cdf")
        assert run.latency(percent) == pytest.approx(exact, rel=QUANTILE_ERROR)


def test_a_failed_attempt_has_no_part_in_the_latency():
    run = summary(event(0, 1), event(0, 600, kind="timeout"))
    assert run.latency(99) == pytest.approx(1, rel=QUANTILE_ERROR)


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_quantile_beyond_0_to_100_is_refused(percent):
    with pytest.raises(ValueError, match=f"percent={percent}"):
        summary(event()).latency(percent)


failed = st.tuples(
    st.sampled_from([("timeout", None), ("unavailable", 503), ("refused", 400)]), st.booleans()
)


@given(st.lists(st.one_of(st.none(), failed), max_size=60))
def test_every_attempt_is_a_completion_a_retry_or_a_failure(outcomes):
    run, retries, failures = RunSummary(), Counter(), Counter()
    for outcome in outcomes:
        if outcome is None:
            run.add(event(tokens=5))
            continue
        (kind, status), gives_up = outcome
        run.add(event(kind=kind, status=status, gives_up=gives_up))
        if gives_up:
            failures[kind] += 1
        else:
            retries[f"{kind} {status}" if status else kind] += 1
    assert (run.retries, run.failures) == (retries, failures)
    assert run.completions == outcomes.count(None)
    assert run.tokens == 5 * run.completions
    assert run.attempts == len(outcomes)


def test_tokens_per_second_are_of_the_wall_clock():
    run = summary(event(10, 4, tokens=100), event(12, 8, tokens=300), event(8, 2, kind="timeout"))
    assert run.seconds == 12
    assert run.tokens_per_second == pytest.approx(400 / 12)


def test_waste_names_what_is_known_and_what_is_not():
    run = summary(
        event(0, 2, kind="unavailable", status=503),  # turned away: sampled nothing
        event(0, 3, kind="timeout"),
        event(0, 4, kind="connection", gives_up=True),
        event(0, 5, kind="contract", gives_up=True, tokens=7),
        event(0, 6, tokens=11),
    )
    assert run.wasted_tokens == 7
    assert run.uncounted == 2
    assert run.wasted_seconds == 14
    assert run.tokens == 11


def test_cost_is_tokens_times_prices():
    run = RunSummary(prices=Prices(prompt=0.5, completion=2.0))
    run.add(event(tokens=1_500_000, prompt_tokens=1_000_000))
    run.add(event(tokens=500_000, prompt_tokens=3_000_000))
    assert run.cost == Cost(completion=4.0, prompt=2.0)


def test_the_cost_of_a_prompt_of_unknown_length_is_unknown():
    run = RunSummary(prices=Prices(prompt=0.5, completion=2.0))
    run.add(event(tokens=500_000, prompt_tokens=1_000_000))
    run.add(event(tokens=500_000))
    assert run.cost == Cost(completion=2.0, prompt=None)
    assert run.lines()[-1] == "cost       completions $2.0000, prompts unknown"


@pytest.mark.parametrize("price", [-0.1, math.nan, math.inf])
def test_a_price_is_an_amount_of_money(price):
    with pytest.raises(ValueError, match="price of completion tokens"):
        Prices(prompt=1.0, completion=price)


def test_there_is_no_cost_without_prices():
    assert summary(event(tokens=5)).cost is None


def test_memory_does_not_grow_with_the_run():
    rng, run, sizes = random.Random(0), RunSummary(), []
    for number in range(40_001):
        seconds = math.exp(rng.uniform(math.log(1e-5), math.log(3600)))
        run.add(event(10.0 * number, seconds, tokens=3))
        if number in (10_000, 40_000):
            sizes.append(len(pickle.dumps(run)))
    assert sizes[1] < 1.1 * sizes[0] < 20_000


def test_a_run_without_attempts_says_so():
    run = RunSummary()
    assert run.lines() == ["attempts   none"]
    assert (run.latency(50), run.tokens_per_second, run.mean_in_flight) == (None, None, None)
    assert run.in_flight() == []


def test_attempts_that_took_no_time_make_no_rate():
    run = summary(event(3, 0, tokens=2))
    assert (run.seconds, run.tokens_per_second, run.in_flight()) == (0, None, [])
    assert "tokens     2 in 0.0 s" in run.lines()


def test_the_summary_reads_well_on_a_terminal():
    run = RunSummary(prices=Prices(prompt=1.0, completion=2.0))
    run.add(event(0, 2, kind="unavailable", status=503, in_flight=3))
    run.add(event(0, 2, kind="unavailable", status=503, in_flight=2))
    run.add(event(0, 2, kind="timeout", in_flight=1))
    run.add(event(0, 4, kind="refused", status=400, gives_up=True))
    run.add(event(4, 4, tokens=2000, prompt_tokens=500_000))
    assert run.lines() == [
        "attempts   5: 1 completed, 3 retried, 1 given up",
        "retries    2x unavailable 503, 1x timeout",
        "failures   1x refused",
        "latency    p50 4.01 s  p95 4.01 s  p99 4.01 s",
        "tokens     2,000 in 8.0 s, 250/s",
        "wasted     10.0 s, 0 tokens; unknown for 1 failed attempts",
        "in flight  mean 1.8, max 4  " + "█" * 8 + "▂" * 24,
        "cost       $0.5040: prompts $0.5000, completions $0.0040",
    ]
