"""When a run stops asking, when it asks just to see, and when it starts again. Times are given."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._limits import (
    ACCOUNT_STREAK,
    FIRST_PROBE_SECONDS,
    LONGEST_PROBE_SECONDS,
    OPEN_AFTER,
    PROMPT_STREAK,
    CircuitBreaker,
)
from eval_protocol_rft.sampling._retry import Attempt

TRANSIENT = [("unavailable", 503), ("connection", None), ("timeout", None), ("unavailable", 500)]
ACCOUNT = [("refused", status) for status in (401, 402, 403, 404, 412)]
OF_A_PROMPT = [("refused", 400), ("refused", 413), ("refused", 422), ("contract", None)]


def success(started: float = 0.0, ended: float = 1.0, *, probe: bool = False) -> Attempt:
    return Attempt(started=started, ended=ended, tokens=10, probe=probe)


def failure(at: float = 1.0, kind="unavailable", status=503, **fields) -> Attempt:
    fields = {"started": at, "message": "HTTP 503: busy", **fields}
    return Attempt(ended=at, kind=kind, status=status, **fields)


def ask(breaker: CircuitBreaker, in_flight: int = 0, limit: int = 64) -> float:
    assert breaker.stopped is None
    return breaker.earliest(in_flight=in_flight, limit=limit)


def fail(breaker: CircuitBreaker, count: int, at: float = 1.0, in_flight: int = 0, **what) -> None:
    for number in range(count):
        breaker.ended(failure(at, prompt=number, **what), in_flight=in_flight)


def opened(at: float = 100.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    breaker.ended(success(0, 10), in_flight=0)
    fail(breaker, OPEN_AFTER, at)
    assert breaker.state == "open"
    return breaker


# Outages.


@pytest.mark.parametrize(("kind", "status"), TRANSIENT)
def test_nothing_but_transient_failures_opens_it(kind, status):
    breaker = CircuitBreaker()
    fail(breaker, OPEN_AFTER - 1, kind=kind, status=status)
    assert breaker.state == "closed"
    assert ask(breaker) <= 1
    fail(breaker, 1, kind=kind, status=status)
    assert (breaker.state, ask(breaker)) == ("open", 1 + FIRST_PROBE_SECONDS)


def test_a_success_in_between_keeps_it_closed():
    breaker = CircuitBreaker()
    for _ in range(5):
        fail(breaker, OPEN_AFTER - 1)
        breaker.ended(success(), in_flight=0)
    assert breaker.state == "closed"


def test_rejections_for_too_many_requests_do_not_open_it():
    breaker = CircuitBreaker()
    fail(breaker, 1000, status=429)
    assert breaker.state == "closed"


def test_one_dead_replica_of_four_does_not_open_it_while_the_others_sample():
    """A quarter of the requests fails at once; 64 slots fill with 22 failures on the way."""
    breaker = CircuitBreaker()
    for in_flight in range(64):
        if in_flight % 3 == 0:
            fail(breaker, 1, in_flight=in_flight)
    assert breaker.state == "closed"


def test_one_probe_goes_through_at_a_time_and_the_others_wait():
    breaker = opened(at=100)
    first = 100 + FIRST_PROBE_SECONDS
    assert ask(breaker) == first
    assert breaker.started(first)
    assert breaker.state == "half-open"
    assert ask(breaker) > first


def play_outage(breaker: CircuitBreaker, now: float, seconds: float) -> list[float]:
    """The times of the probes that a server which turns each away at once gets."""
    probes = []
    end = now + seconds
    while True:
        now = max(now, ask(breaker))
        if now >= end:
            return probes
        probes.append(now)
        assert breaker.started(now)
        breaker.ended(failure(now, probe=True), in_flight=0)


def test_failed_probes_come_further_and_further_apart():
    gaps = [later - at for at, later in itertools.pairwise(play_outage(opened(), 100, 600))]
    assert gaps[:6] == [2, 4, 8, 16, 30, 30]
    assert set(gaps[6:]) == {LONGEST_PROBE_SECONDS}


def test_an_outage_of_ten_minutes_costs_two_probes_a_minute_and_five():
    assert len(play_outage(opened(), 100, 600)) <= 5 + 600 / LONGEST_PROBE_SECONDS


def test_the_end_of_an_outage_is_seen_within_the_longest_distance():
    breaker = opened()
    last = play_outage(breaker, 100, 600)[-1]
    assert 700 < ask(breaker) <= last + LONGEST_PROBE_SECONDS


def test_a_probe_that_is_not_turned_away_is_followed_by_the_next_one_sooner():
    """A probe that samples for a minute must not leave the server idle for as long."""
    breaker = opened()
    now = play_outage(breaker, 100, 600)[-1]
    gaps = []
    for _ in range(8):
        gaps.append(ask(breaker) - now)
        now = ask(breaker)
        assert breaker.started(now)
    assert gaps == [30, 30, 15, 7.5, 3.75, 1.875, 1, 1]


def test_the_server_may_ask_for_a_longer_pause_between_probes():
    breaker = opened(at=100)
    breaker.started(101)
    breaker.ended(failure(101, probe=True, retry_after=90), in_flight=0)
    assert ask(breaker) == 191
    breaker.started(191)
    breaker.ended(failure(191, probe=True, retry_after=86_400), in_flight=0)
    assert ask(breaker) == 491


def test_a_probe_that_succeeds_closes_it():
    breaker = opened(at=100)
    breaker.started(101)
    breaker.ended(success(101, 111, probe=True), in_flight=0)
    assert breaker.state == "closed"


def test_what_was_accepted_before_the_outage_does_not_close_it():
    breaker = opened(at=100)
    breaker.ended(success(90, 105), in_flight=0)
    assert breaker.state == "open"


def test_a_probe_that_we_cancel_ourselves_says_nothing():
    breaker = opened(at=100)
    breaker.started(101)
    breaker.abandoned(probe=True)
    assert breaker.state == "open"


def test_after_closing_requests_come_in_over_the_time_that_a_completion_takes():
    breaker = opened(at=100)
    breaker.started(101)
    breaker.ended(success(101, 111, probe=True), in_flight=0)
    assert ask(breaker, in_flight=0) == 111
    for in_flight in (16, 32, 48):
        assert ask(breaker, in_flight=in_flight) == 111 + 10 * in_flight / 64
    assert ask(breaker, in_flight=1000) == 121


# Runs that are lost.


@pytest.mark.parametrize(("kind", "status"), ACCOUNT)
def test_a_key_or_model_that_no_prompt_can_mend_ends_the_run(kind, status):
    breaker = CircuitBreaker()
    fail(breaker, ACCOUNT_STREAK - 1, kind=kind, status=status)
    assert breaker.state == "closed"
    fail(breaker, 1, kind=kind, status=status, message="HTTP 401: no such key")
    assert f"{ACCOUNT_STREAK} requests in a row" in breaker.stopped
    assert f"refused {status}: HTTP 401: no such key" in breaker.stopped
    assert "run again" in breaker.stopped


@pytest.mark.parametrize(("kind", "status"), OF_A_PROMPT)
def test_refusals_of_so_many_different_prompts_end_the_run(kind, status):
    breaker = CircuitBreaker()
    fail(breaker, PROMPT_STREAK - 1, kind=kind, status=status)
    assert breaker.state == "closed"
    breaker.ended(failure(1, kind, status, prompt="another"), in_flight=0)
    assert breaker.state == "tripped"


def test_all_completions_of_one_bad_prompt_are_one_piece_of_evidence():
    breaker = CircuitBreaker()
    for _ in range(1000):
        breaker.ended(failure(1, "refused", 400, prompt="too long"), in_flight=0)
    assert breaker.state == "closed"


def test_a_stretch_of_bad_prompts_does_not_end_a_run_whose_completions_are_slower():
    breaker = CircuitBreaker()
    breaker.ended(success(0, 30), in_flight=0)
    fail(breaker, 100, at=40, kind="refused", status=400)
    breaker.ended(success(41, 69), in_flight=0)
    fail(breaker, 100, at=70, kind="refused", status=400)
    breaker.ended(failure(101, "refused", 400), in_flight=0)
    assert breaker.state == "closed"


def test_replies_that_are_no_token_data_end_a_run_once_they_outlast_the_slowest_completion():
    breaker = CircuitBreaker()
    breaker.ended(success(0, 30), in_flight=0)
    fail(breaker, 100, at=70, kind="contract")
    assert breaker.state == "closed"
    breaker.ended(failure(101, "contract"), in_flight=0)
    assert breaker.state == "tripped"


def test_prompts_refused_before_anything_succeeded_end_a_run():
    breaker = CircuitBreaker()
    fail(breaker, PROMPT_STREAK, at=1, kind="refused", status=400)
    assert breaker.state == "tripped"


def test_prompts_refused_under_settings_that_are_known_to_work_do_not():
    breaker = CircuitBreaker(proven=True)
    fail(breaker, 100, at=1, kind="refused", status=400)
    assert breaker.state == "closed"


def test_what_was_accepted_before_the_key_expired_does_not_vouch_for_it():
    breaker = CircuitBreaker()
    for second in range(ACCOUNT_STREAK):
        assert breaker.state == "closed"
        breaker.ended(success(0, 50 + second), in_flight=0)
        breaker.ended(failure(50 + second, "refused", 402), in_flight=0)
    assert breaker.state == "tripped"


def test_refusals_with_successes_begun_in_between_never_end_a_run():
    breaker = CircuitBreaker()
    for second in range(0, 1000, 10):
        breaker.ended(failure(second, "refused", 403), in_flight=0)
        breaker.ended(success(second + 1, second + 5), in_flight=0)
    assert breaker.state == "closed"


def test_a_server_that_stays_away_longer_than_our_patience_ends_the_run():
    breaker = CircuitBreaker(patience_seconds=600)
    fail(breaker, OPEN_AFTER, at=100, kind="connection", status=None, message="refused")
    probes = play_outage(breaker, 100, 590)
    assert breaker.state == "open"
    breaker.started(700)
    breaker.ended(failure(700, "connection", None, message="refused", probe=True), in_flight=0)
    assert "no request succeeded for 600 s" in breaker.stopped
    assert "connection: refused" in breaker.stopped
    assert probes


def test_rejections_alone_end_the_run_as_well_after_that_time():
    breaker = CircuitBreaker(patience_seconds=600)
    fail(breaker, 1, at=100, status=429)
    fail(breaker, 1, at=700, status=429)
    assert breaker.state == "tripped"


events = st.one_of(
    st.tuples(st.just("success"), st.floats(0, 60), st.none()),
    st.tuples(st.sampled_from([*TRANSIENT, *ACCOUNT, *OF_A_PROMPT]), st.floats(0, 60), st.none()),
    st.tuples(st.just("wait"), st.floats(0, 100), st.none()),
)


@given(script=st.lists(events, max_size=120))
def test_whatever_happens_probes_keep_their_distance_and_a_stop_is_final(script):
    breaker = CircuitBreaker(patience_seconds=300)
    now, last_probe, stopped = 0.0, None, None
    for what, seconds, _ in script:
        now += seconds if what == "wait" else 0.01
        if stopped is not None:
            assert breaker.stopped == stopped
        if breaker.stopped is not None:
            assert breaker.state == "tripped"
            stopped = breaker.stopped
            continue
        if ask(breaker) > now:
            continue
        was_open = breaker.state in ("open", "half-open")
        probe = breaker.started(now)
        assert probe == was_open
        if probe:
            assert last_probe is None or now - last_probe >= FIRST_PROBE_SECONDS
            last_probe = now
        if what == "wait":
            breaker.abandoned(probe=probe)
        elif what == "success":
            breaker.ended(success(now, now, probe=probe), in_flight=0)
            assert breaker.state == "closed"
        else:
            kind, status = what
            breaker.ended(failure(now, kind, status, probe=probe), in_flight=0)
