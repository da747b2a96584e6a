"""What watchers of a run are told of each attempt."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._retry import Attempt
from eval_protocol_rft.sampling._telemetry import (
    LOGGER,
    AttemptEvent,
    log_attempt,
    observers,
    telemetry,
)


def event(*, gives_up=False, prompt="row-7", started=0.0, seconds=2.5, **attempt) -> AttemptEvent:
    return AttemptEvent(
        attempt=Attempt(started=started, ended=started + seconds, **attempt),
        number=2,
        model="qwen",
        prompt=prompt,
        index=3,
        seed=11,
        request_id="req-1",
        in_flight=5,
        gives_up=gives_up,
    )


BUSY = {"kind": "unavailable", "status": 503, "message": "the server is busy", "retry_after": 4.0}


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    return caplog


def test_a_completion_is_logged_for_debugging(logged):
    log_attempt(event(tokens=42))
    [record] = logged.records
    assert (record.name, record.levelname) == ("eval_protocol_rft.attempts", "DEBUG")
    assert record.getMessage() == (
        'attempt=2 prompt="row-7" index=3 cause=ok seconds=2.5 tokens=42 in_flight=5'
    )


def test_a_failure_that_is_tried_again_is_information(logged):
    log_attempt(event(**BUSY))
    [record] = logged.records
    assert record.levelname == "INFO"
    assert record.getMessage() == (
        'attempt=2 prompt="row-7" index=3 cause="unavailable 503" seconds=2.5 tokens=0 '
        'in_flight=5 gives_up=false message="the server is busy"'
    )


def test_a_completion_that_is_given_up_is_a_warning(logged):
    log_attempt(event(**BUSY, gives_up=True))
    [record] = logged.records
    assert record.levelname == "WARNING"
    assert "gives_up=true" in record.getMessage()


def test_the_record_carries_every_field_as_plain_json(logged):
    log_attempt(event(**BUSY, prompt=("set", 4), queue_seconds=0.5, probe=True))
    fields = logged.records[0].attempt
    assert json.loads(json.dumps(fields)) == fields
    assert fields == {
        "model": "qwen",
        "prompt": "('set', 4)",
        "index": 3,
        "attempt": 2,
        "cause": "unavailable 503",
        "kind": "unavailable",
        "status": 503,
        "message": "the server is busy",
        "gives_up": False,
        "probe": True,
        "seconds": 2.5,
        "queue_seconds": 0.5,
        "retry_after": 4.0,
        "tokens": 0,
        "in_flight": 5,
        "seed": 11,
        "request_id": "req-1",
    }


class Unprintable:
    def __str__(self):
        raise AssertionError("formatted")


def test_nothing_is_formatted_where_the_logger_is_off(logged):
    with pytest.raises(AssertionError, match="formatted"):
        log_attempt(event(**BUSY, prompt=Unprintable()))
    logged.set_level(logging.WARNING, logger=LOGGER)
    log_attempt(event(**BUSY, prompt=Unprintable()))
    assert not logged.records


@given(prompt=st.text(), message=st.text())
def test_a_line_is_one_line_that_can_be_read_back_whatever_the_server_said(prompt, message):
    lines = []
    logger = logging.getLogger(LOGGER)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        log_attempt(event(kind="timeout", message=message, prompt=prompt, gives_up=True))
    finally:
        logger.removeHandler(handler)
    [line] = lines
    assert len(line.splitlines()) == 1
    pairs = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line))
    words = {name: text if text[0] != '"' else json.loads(text) for name, text in pairs.items()}
    assert (words["prompt"], words["message"], words["cause"]) == (prompt, message, "timeout")
    assert len(pairs) == 9


def test_every_observer_is_told_in_order(logged):
    told = []
    watch = observers(lambda each: told.append(("a", each)), lambda each: told.append(("b", each)))
    first = event()
    watch(first)
    assert told == [("a", first), ("b", first)]
    assert len(logged.records) == 1


def test_an_observer_that_raises_is_logged_once_and_dropped(caplog):
    told, calls = [], []

    def broken(each):
        calls.append(each)
        raise KeyError("dashboard")

    watch = observers(broken, told.append)
    for _ in range(3):
        watch(event())
    assert (len(calls), len(told)) == (1, 3)
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "broken" in record.getMessage()
    assert isinstance(record.exc_info[1], KeyError)


def test_an_interrupt_is_not_an_observers_failure():
    def interrupted(each):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observers(interrupted)(event())


def run_clean(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TELEMETRY = "from eval_protocol_rft.sampling._telemetry import telemetry; "


def test_without_opentelemetry_there_is_no_telemetry():
    code = f"import sys; sys.modules['opentelemetry'] = None; {TELEMETRY}"
    assert run_clean(code + "print(telemetry())") == "None"


def test_importing_costs_no_opentelemetry():
    assert run_clean(f"import sys; {TELEMETRY}print('opentelemetry' in sys.modules)") == "False"


def test_without_a_configured_provider_there_is_no_telemetry_and_none_gets_configured():
    pytest.importorskip("opentelemetry.trace")
    code = (
        f"import sys; {TELEMETRY}print(telemetry()); "
        "from opentelemetry import trace; print(type(trace.get_tracer_provider()).__name__)"
    )
    assert run_clean(code).split() == ["None", "ProxyTracerProvider"]


@pytest.fixture(scope="module")
def opentelemetry_sdk():
    """What the application does, once in this process: the API takes a provider only once."""
    pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider([reader]))
    return exporter, reader


@pytest.fixture
def exporter(opentelemetry_sdk):
    opentelemetry_sdk[0].clear()
    return opentelemetry_sdk[0]


def test_an_attempt_is_a_span_at_its_own_times(exporter):
    now, wall = time.monotonic(), time.time()
    telemetry()(event(started=now - 5, seconds=2.5, tokens=42, queue_seconds=0.5))
    [span] = exporter.get_finished_spans()
    assert span.name == "text_completion qwen"
    assert span.kind.name == "CLIENT"
    assert span.status.status_code.name == "UNSET"
    assert span.start_time / 1e9 == pytest.approx(wall - 5, abs=0.2)
    assert span.end_time - span.start_time == pytest.approx(2.5e9, abs=2000)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "qwen",
        "gen_ai.request.seed": 11,
        "gen_ai.usage.output_tokens": 42,
        "ep_rft.row_id": "row-7",
        "ep_rft.index": 3,
        "ep_rft.attempt": 2,
        "ep_rft.gives_up": False,
        "ep_rft.probe": False,
        "ep_rft.queue_seconds": 0.5,
        "ep_rft.request_id": "req-1",
    }


def test_a_failed_attempt_is_a_span_with_an_error(exporter):
    telemetry()(event(**BUSY, gives_up=True))
    [span] = exporter.get_finished_spans()
    assert (span.status.status_code.name, span.status.description) == (
        "ERROR",
        "the server is busy",
    )
    assert span.attributes["error.type"] == "unavailable"
    assert span.attributes["http.response.status_code"] == 503
    assert span.attributes["ep_rft.retry_after"] == 4.0
    assert span.attributes["ep_rft.gives_up"] is True
    assert "gen_ai.usage.output_tokens" not in span.attributes


def test_spans_lie_below_the_applications_own(exporter):
    from opentelemetry import trace

    with trace.get_tracer("application").start_as_current_span("row") as row:
        observers()(event())
    attempt = exporter.get_finished_spans()[0]
    assert attempt.parent.span_id == row.get_span_context().span_id


def test_metrics_count_attempts_tokens_seconds_and_requests_in_flight(opentelemetry_sdk):
    watch = telemetry()
    before = metric_points(opentelemetry_sdk[1])
    for each in (
        event(tokens=42),
        event(tokens=8, seconds=1.0),
        event(**BUSY, seconds=200.0, tokens=7),
    ):
        watch(each)
    after = metric_points(opentelemetry_sdk[1])

    def grown(name, **marks):
        old = before.get((name, frozenset(marks.items())))
        return after[name, frozenset(marks.items())].value - (old.value if old else 0)

    model = {"gen_ai.request.model": "qwen"}
    ok = {**model, "ep_rft.cause": "ok", "ep_rft.gives_up": False}
    assert grown("ep_rft.attempts", **ok) == 2
    assert grown("ep_rft.attempts", **{**ok, "ep_rft.cause": "unavailable 503"}) == 1
    assert grown("ep_rft.output_tokens", **model) == 50
    assert after["ep_rft.in_flight", frozenset(model.items())].value == 5
    failed = frozenset(
        {
            **model,
            "gen_ai.operation.name": "text_completion",
            "error.type": "unavailable",
            "http.response.status_code": 503,
        }.items()
    )
    seconds = after["gen_ai.client.operation.duration", failed]
    assert seconds.max == 200.0
    low = max(bound for bound in seconds.explicit_bounds if bound < 200)
    assert (low, seconds.explicit_bounds[-1]) == (163.84, 655.36)


def metric_points(reader):
    data = reader.get_metrics_data()
    return {
        (metric.name, frozenset(point.attributes.items())): point
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
