"""Every attempt as an event, a log record, and as an OpenTelemetry span and metrics where the
application has configured them.

Invariant: watching never changes a run. An observer that raises is dropped, and what is told holds
no prompt, no completion and no credentials (messages of failures come redacted).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval_protocol_rft.sampling._clock import sampling_time
from eval_protocol_rft.sampling._retry import Attempt

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEvent:
    """One request that has ended, and what it was for."""

    attempt: Attempt
    number: int
    """Which of its completion's attempts, from 1."""
    model: str
    prompt: Hashable
    """Which prompt: the row id."""
    prompt_tokens: int | None = None
    """Its length, where whoever makes the run tells it."""
    index: int
    """Which of the prompt's completions."""
    seed: int | None
    request_id: str | None
    in_flight: int
    """Requests of the run that have not ended, this one not counted."""
    gives_up: bool
    """It failed, and there will be no other attempt."""
    repeated: bool = False
    """It failed for good of what another completion of the run had failed for good of before."""


Observer = Callable[[AttemptEvent], None]


LOGGER = "eval_protocol_rft.attempts"
"""One record per attempt: DEBUG a completion, INFO a failure. WARNING where it was the last attempt
and the run's first failure for good of this cause: what is wrong for all of a run is said once."""

SECONDS_BUCKETS = tuple(0.01 * 2**power for power in range(17))
"""Bounds of the duration histogram: those of the GenAI conventions (0.01 s to 81.92 s), doubled on
to 655.36 s, as an attempt may take 600."""

_attempts = logging.getLogger(LOGGER)
_log = logging.getLogger(__name__)

Scalar = str | bool | int | float | None


def observers(*more: Observer) -> Observer:
    """The log, OpenTelemetry where it is configured by now, and `more`, as one observer.

    One that raises is logged once, with its traceback, and told nothing after that.
    """
    traced = telemetry()
    return _Observers((log_attempt, *([traced] if traced else []), *more))


class _Observers:
    def __init__(self, all_of_them: tuple[Observer, ...]) -> None:
        self._observers = all_of_them

    def __call__(self, event: AttemptEvent) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - a hook of any origin must not end a paid run
                self._observers = tuple(one for one in self._observers if one is not observer)
                _log.exception("observer %r raised: it is told nothing more of this run", observer)


def log_attempt(event: AttemptEvent) -> None:
    """Log one attempt on `LOGGER`.

    The message is one line of `name=value`; the record's `attempt` holds the same and more as a
    dict of plain JSON values (`attempt_fields`). Where the logger is off this does nothing.
    """
    failed = event.attempt.kind is not None
    is_news = event.gives_up and not event.repeated
    level = logging.DEBUG if not failed else logging.WARNING if is_news else logging.INFO
    if not _attempts.isEnabledFor(level):
        return
    fields = attempt_fields(event)
    shown = ("attempt", "prompt", "index", "cause", "seconds", "tokens", "in_flight")
    pairs = [f"{name}={_shown(fields[name])}" for name in shown]
    if failed:
        pairs += [f"gives_up={_shown(event.gives_up)}", f"message={_shown(fields['message'])}"]
    _attempts.log(level, "%s", " ".join(pairs), extra={"attempt": fields})


def attempt_fields(event: AttemptEvent) -> dict[str, Scalar]:
    """An event as plain JSON values. Times are seconds; `prompt` is the row id."""
    attempt = event.attempt
    return {
        "model": event.model,
        "prompt": _scalar(event.prompt),
        "index": event.index,
        "attempt": event.number,
        "cause": attempt.cause,
        "kind": attempt.kind,
        "status": attempt.status,
        "message": attempt.message,
        "gives_up": event.gives_up,
        "probe": attempt.probe,
        "seconds": round(attempt.seconds, 6),
        "queue_seconds": attempt.queue_seconds,
        "retry_after": attempt.retry_after,
        "tokens": attempt.tokens,
        "in_flight": event.in_flight,
        "seed": event.seed,
        "request_id": event.request_id,
    }


def _scalar(value: Hashable) -> Scalar:
    return value if isinstance(value, str | int) or value is None else str(value)


def _shown(value: Scalar) -> str:
    """As JSON, so that a server's line break or quote cannot start a line of its own; a word that
    needs no quotes has none."""
    if isinstance(value, str) and value.isascii() and value.replace("_", "").isalnum():
        return value
    return json.dumps(value)


def telemetry() -> Observer | None:
    """An observer that records one span per attempt, and metrics.

    Only OpenTelemetry's API is used: the application configures providers (where to, how many),
    before it calls this. Spans and metrics follow the semantic conventions for generative AI where
    these have a word, `ep_rft.*` otherwise. `gen_ai.provider.name` is absent: it is not known here.
    Spans lie at the attempt's times, which must be of the loop's clock, below the span that is
    current when the observer is called.

    Returns:
        None where `opentelemetry-api` is not installed or neither provider is configured.
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return None
    configured: list[Observer] = []
    if _configured(trace.get_tracer_provider()):
        configured.append(_spans(trace.get_tracer("eval_protocol_rft")))
    if _configured(metrics.get_meter_provider()):
        configured.append(_metrics(metrics.get_meter("eval_protocol_rft")))
    if not configured:
        return None

    def observe(event: AttemptEvent) -> None:
        for observer in configured:
            observer(event)

    return observe


def _configured(provider: object) -> bool:
    """The API's own providers are stand-ins that record nothing; real ones live elsewhere."""
    home = type(provider).__module__
    return not home.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


def _spans(tracer: Tracer) -> Observer:
    from opentelemetry.trace import SpanKind, Status, StatusCode

    def observe(event: AttemptEvent) -> None:
        attempt = event.attempt
        # Mapped anew each time: the wall clock may be set during a run of hours.
        offset = time.time() - sampling_time()
        span = tracer.start_span(
            f"text_completion {event.model}",
            kind=SpanKind.CLIENT,
            start_time=_nanoseconds(attempt.started + offset),
            attributes=_span_attributes(event),
        )
        if attempt.kind is not None:
            span.set_status(Status(StatusCode.ERROR, attempt.message))
        span.end(end_time=_nanoseconds(attempt.ended + offset))

    return observe


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _span_attributes(event: AttemptEvent) -> dict[str, str | bool | int | float]:
    attempt = event.attempt
    names = ("index", "attempt", "gives_up", "probe", "queue_seconds", "retry_after", "request_id")
    fields = attempt_fields(event)
    values = {
        **_request_attributes(event),
        "gen_ai.request.seed": event.seed,
        "gen_ai.usage.output_tokens": attempt.tokens if attempt.kind is None else None,
        "ep_rft.row_id": fields["prompt"],
        **{f"ep_rft.{name}": fields[name] for name in names},
    }
    return _known(values)


def _request_attributes(event: AttemptEvent) -> dict[str, str | bool | int | float]:
    """What tells series of a metric apart: few different values."""
    values: dict[str, Scalar] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": event.model,
        "error.type": event.attempt.kind,
        "http.response.status_code": event.attempt.status,
    }
    return _known(values)


def _known(values: Mapping[str, Scalar]) -> dict[str, str | bool | int | float]:
    return {name: value for name, value in values.items() if value is not None}


def _metrics(meter: Meter) -> Observer:
    attempts = meter.create_counter(
        "ep_rft.attempts", unit="{attempt}", description="Requests that ended, by cause."
    )
    tokens = meter.create_counter(
        "ep_rft.output_tokens", unit="{token}", description="Tokens of completions."
    )
    in_flight = meter.create_gauge(
        "ep_rft.in_flight", unit="{request}", description="Requests of the run that have not ended."
    )
    seconds = meter.create_histogram(
        "gen_ai.client.operation.duration",
        unit="s",
        description="How long an attempt took.",
        explicit_bucket_boundaries_advisory=SECONDS_BUCKETS,
    )

    def observe(event: AttemptEvent) -> None:
        attempt, model = event.attempt, {"gen_ai.request.model": event.model}
        attempts.add(
            1,
            {**model, "ep_rft.cause": attempt.cause, "ep_rft.gives_up": event.gives_up},
        )
        seconds.record(attempt.seconds, _request_attributes(event))
        if attempt.kind is None:
            tokens.add(attempt.tokens, model)
        in_flight.set(event.in_flight, model)

    return observe
