"""What a reply asks us to wait, whatever its clock says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._replies import retry_after
from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._types import SamplingError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
skews = st.timedeltas(timedelta(days=-4000), timedelta(days=4000))
headers = st.text(max_size=40) | st.datetimes().map(
    lambda d: format_datetime(d.replace(tzinfo=UTC))
)


@given(skew=skews, seconds=st.integers(0, 10_000))
def test_a_server_with_a_wrong_clock_is_understood_by_its_own_date(skew, seconds):
    there = (NOW + skew).replace(microsecond=0)
    reply = {
        "Date": format_datetime(there),
        "Retry-After": format_datetime(there + timedelta(seconds=seconds)),
    }
    assert retry_after(reply, now=NOW) == seconds


def test_a_date_that_cannot_be_read_leaves_our_own_clock():
    reply = {"Date": "yesterday", "Retry-After": "Fri, 02 Jan 2026 03:04:15 GMT"}
    assert retry_after(reply, now=NOW) == 10.0


@given(skew=skews, uniform=st.floats(0, 1, exclude_max=True))
def test_without_a_date_of_its_own_a_wrong_clock_stalls_no_longer_than_the_policy_allows(
    skew, uniform
):
    asked = retry_after({"Retry-After": format_datetime(NOW + skew)}, now=NOW)
    policy = RetryPolicy(retry_after_cap_seconds=300.0, base_seconds=0.5)
    error = SamplingError("busy", kind="unavailable", retry_after=asked)
    wait = policy.delay(error, attempt=1, elapsed=0, uniform=uniform)
    assert wait is not None
    assert 0 <= wait <= 300.5


@given(value=headers, date=headers)
def test_whatever_the_headers_hold_is_read_or_ignored(value, date):
    reply = {"Retry-After": value, "Date": date}
    seconds = retry_after(reply, now=NOW)
    assert seconds is None or 0 <= seconds < float("inf")


@given(milliseconds=st.floats(0, 1e9), seconds=st.integers(0, 99))
def test_milliseconds_are_finer_and_go_first(milliseconds, seconds):
    reply = {"retry-after-ms": f"{milliseconds!r}", "Retry-After": str(seconds)}
    assert retry_after(reply, now=NOW) == milliseconds / 1000


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "1,5"])
def test_milliseconds_that_are_no_number_leave_the_seconds(value):
    assert retry_after({"retry-after-ms": value, "Retry-After": "3"}, now=NOW) == 3.0
    assert retry_after({"retry-after-ms": value}, now=NOW) is None


@given(milliseconds=headers, seconds=headers)
def test_whatever_both_headers_hold_is_read_or_ignored(milliseconds, seconds):
    found = retry_after({"retry-after-ms": milliseconds, "Retry-After": seconds}, now=NOW)
    assert found is None or 0 <= found < float("inf")
