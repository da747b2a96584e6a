"""The attempts at one completion: what is recorded, what counts, when it is over."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._replies import error_in_body, status_error
from eval_protocol_rft.sampling._retry import (
    Attempt,
    CompletionAttempts,
    RetryPolicy,
    causes,
    failed_attempt,
)
from eval_protocol_rft.sampling._types import ContractError, SamplingError

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def of_status(status: int, body: bytes = b"no") -> SamplingError:
    return status_error(status, body, {}, now=NOW)


def in_reply(body: bytes) -> SamplingError:
    error = error_in_body(body)
    assert error is not None
    return error


TRANSIENT = [
    *(of_status(status) for status in (408, 409, 425, 429, 500, 502, 503, 504)),
    of_status(404, b"model_not_ready: the deployment is loading"),
    SamplingError("connection reset after half of the body", kind="connection"),
    SamplingError("no whole reply within 600 s", kind="timeout"),
    in_reply(b'{"error": "engine died"}'),
    in_reply(b'{"error": {"message": "overloaded", "code": 503}}'),
]
FINAL = [
    *(of_status(status) for status in (400, 401, 402, 403, 404, 413, 422)),
    in_reply(b'{"error": {"message": "too long", "code": 400}}'),
    ContractError("choices[0]: 3 token ids but 2 logprobs"),
]


def failure(
    at: float = 0.0, seconds: float = 1.0, error: SamplingError | None = None, probe: bool = False
) -> Attempt:
    error = error or SamplingError("busy", kind="unavailable", status=503)
    return failed_attempt(error, started=at, ended=at + seconds, probe=probe)


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_what_may_pass_is_tried_again(error):
    attempts = CompletionAttempts(RetryPolicy())
    assert attempts.failed(failure(error=error), uniform=0.5) is not None


@pytest.mark.parametrize("error", FINAL, ids=str)
def test_what_would_come_back_the_same_is_not(error):
    attempts = CompletionAttempts(RetryPolicy())
    assert attempts.failed(failure(error=error), uniform=0.5) is None


def test_the_record_says_how_many_attempts_there_were_and_why_each_failed():
    attempts = CompletionAttempts(RetryPolicy(max_attempts=4))
    attempts.failed(failure(0), uniform=0)
    attempts.failed(failure(2, error=SamplingError("reset", kind="connection")), uniform=0)
    attempts.failed(failure(4), uniform=0)
    late = failure(6, error=SamplingError("late", kind="timeout"))
    assert attempts.failed(late, uniform=0) is None
    assert [attempt.cause for attempt in attempts.history] == [
        "unavailable 503",
        "connection",
        "unavailable 503",
        "timeout",
    ]
    assert causes(attempts.history) == (
        "4 attempts (2x unavailable 503, 1x connection, 1x timeout)"
    )


def test_a_completion_in_the_end_is_part_of_the_record():
    attempts = CompletionAttempts(RetryPolicy())
    attempts.failed(failure(0), uniform=0)
    attempts.succeeded(Attempt(started=2, ended=5, tokens=7))
    assert causes(attempts.history) == "2 attempts (1x unavailable 503, 1x ok)"
    assert attempts.counted == 2


def test_a_later_attempt_keeps_the_seed():
    attempts = CompletionAttempts(RetryPolicy(), seed=1234)
    attempts.failed(failure(error=SamplingError("reset", kind="connection")), uniform=0)
    assert attempts.seed == 1234


def test_time_runs_from_the_start_of_the_first_attempt():
    attempts = CompletionAttempts(RetryPolicy(max_seconds=100, base_seconds=0))
    assert attempts.failed(failure(1000, seconds=60), uniform=0) == 1060
    assert attempts.failed(failure(1060, seconds=60), uniform=0) is None


@given(
    probes=st.lists(st.booleans(), min_size=1, max_size=60),
    limit=st.integers(1, 10),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_attempts_run_out_only_by_those_that_were_no_probe(probes, limit, uniform):
    attempts = CompletionAttempts(RetryPolicy(max_attempts=limit, max_seconds=1e9))
    for number, probe in enumerate(probes, 1):
        after = attempts.failed(failure(at=10.0 * number, probe=probe), uniform=uniform)
        assert attempts.counted == probes[:number].count(False)
        assert (after is None) == (attempts.counted == limit)
        if after is None:
            return


def test_a_success_is_not_recorded_as_a_failure():
    with pytest.raises(ValueError, match="succeeded"):
        CompletionAttempts(RetryPolicy()).failed(Attempt(started=0, ended=1), uniform=0)


def test_an_attempt_does_not_end_before_it_starts():
    with pytest.raises(ValueError, match="ended at 1"):
        Attempt(started=2, ended=1)


def test_a_swap_of_the_weights_that_takes_minutes_costs_no_attempt():
    attempts = CompletionAttempts(RetryPolicy(max_attempts=2))
    at, loading = 0.0, SamplingError("HTTP 425", kind="unavailable", status=425, loading=True)
    while at < 900.0:
        again = attempts.failed(failure(at, seconds=0.01, error=loading), uniform=0.5)
        assert again is not None
        at = again
    assert attempts.counted == 0
    # Backoff grows as for other failures, to 15 s on average.
    assert len(attempts.history) < 900 / 15 + 10
    assert attempts.failed(failure(at), uniform=0.5) is not None
    assert attempts.failed(failure(at + 30), uniform=0.5) is None
    assert attempts.counted == 2


def test_a_server_that_loads_for_ever_is_given_up_after_max_seconds():
    attempts = CompletionAttempts(RetryPolicy(max_seconds=60.0))
    at, loading = 0.0, SamplingError("loading", kind="unavailable", status=404, loading=True)
    while (again := attempts.failed(failure(at, 0.01, loading), uniform=0.9)) is not None:
        at = again
    assert 30.0 <= at <= 60.0
    assert attempts.counted == 0
