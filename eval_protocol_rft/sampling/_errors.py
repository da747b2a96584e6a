"""From HTTP statuses and error bodies to typed errors. Pure.

Sources: Fireworks' error codes (docs.fireworks.ai, guides/inference-error-codes), vLLM 0.32 as
recorded. Bodies seen: `{"error": {"message", "type", "code"}}`, `{"error": "text"}`,
`{"detail": ...}`, `{"message": ...}`, plain text and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from eval_protocol_rft._text import visible
from eval_protocol_rft.sampling._types import (
    RefusedError,
    SamplingError,
    UnavailableError,
)

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
PERMANENT_SERVER_ERRORS = frozenset({501, 505})
"""Every other status from 500 on is worth another attempt: gateways have their own (520, 529)."""
_HINTS = {
    401: "check the API key (FIREWORKS_API_KEY or completion_params['api_key'])",
    403: "the API key has no access to this model",
    404: "check the model's name and the base URL",
    407: "the proxy of the environment wants credentials: http://user:password@host:port",
}
_LONGEST_MESSAGE = 500
_LONGEST_ERROR = 700
"""Characters of an error's text, whatever a server or a library put into it."""
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LOADING = re.compile(
    r"not[ _]ready|hot[ _-]?load|scaling[ _]up|being loaded|\b(?:is|are|still|currently) loading\b"
    r"|: loading (?:model|snapshot|weights)\b",
    re.IGNORECASE,
)
"""What a server says of a deployment that comes up or swaps its weights; other 404s are misspelt
names."""
_MAY_BE_LOADING = frozenset({404, 503})
_HTTP_STATUS = re.compile("[1-9][0-9]{2}")


def status_error(
    status: int, body: bytes, headers: Mapping[str, str], *, now: datetime
) -> SamplingError:
    """The error that an HTTP status other than 200 stands for. `now` dates `Retry-After`."""
    message = f"HTTP {status}: {_message(body) or 'no message'}"
    if status in _REDIRECTS:
        return RefusedError(
            f"HTTP {status}: redirected to {_place(headers)}, which is not followed: the key is "
            "not meant for another address. If it is the right one, make it the base URL",
            status=status,
        )
    wait = retry_after(headers, now=now)
    loading = _is_loading(status, message)
    if loading or _is_transient(status):
        return UnavailableError(message, status=status, retry_after=wait, loading=loading)
    hint = _HINTS.get(status)
    return RefusedError(f"{message} ({hint})" if hint else message, status=status)


def short(text: str) -> str:
    """An error's text as a person can read it: one line, printable, of some hundred characters."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."


def _place(headers: Mapping[str, str]) -> str:
    """Where a redirect leads, without what may be secret in it."""
    place = headers.get("Location", "").strip()
    try:
        parts = urlsplit(place)
    except ValueError:
        return "what is no URL"
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return visible(shown[:200]) or "nowhere (it has no Location)"


def error_in_body(body: bytes) -> SamplingError | None:
    """The error that a 200 reply or a stream event carries inside, or None if it carries none."""
    value = loads(body)
    error = value.get("error") if isinstance(value, dict) else None
    if not error:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    status = int(str(code)) if _HTTP_STATUS.fullmatch(str(code)) else None
    text = f"error in the reply: {_message(body)}"
    loading = status is not None and _is_loading(status, text)
    # Without a code that says otherwise it is the server's trouble: it had accepted the request.
    if loading or status is None or _is_transient(status):
        return UnavailableError(text, status=status, loading=loading)
    return RefusedError(text, status=status)


def retry_after(headers: Mapping[str, str], *, now: datetime) -> float | None:
    """Seconds that `retry-after-ms`, which is finer, or `Retry-After` (RFC 9110, 10.2.3: seconds or
    a date) asks for, None without. A date counts from the reply's own `Date`: the server's clock
    need not be ours."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None and milliseconds < float("inf"):
        return max(0.0, milliseconds / 1000)
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    seconds = _number(value)
    if seconds is not None:
        return max(0.0, seconds) if seconds < float("inf") else None
    until = _date(value)
    if until is None:
        return None
    return max(0.0, (until - (_date(headers.get("Date", "")) or now)).total_seconds())


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter: a time zone of many digits
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def loads(body: bytes) -> Any:
    """The JSON value of a body, None where it is not JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_transient(status: int) -> bool:
    return status in TRANSIENT_STATUSES or (status >= 500 and status not in PERMANENT_SERVER_ERRORS)


def _is_loading(status: int, message: str) -> bool:
    """425 is Fireworks' word for a swap of the weights, whatever it says."""
    return status == 425 or (status in _MAY_BE_LOADING and _LOADING.search(message) is not None)


def _message(body: bytes) -> str:
    """The most telling text of an error body, on one line."""
    value = loads(body)
    if value is None:
        value = body.decode("utf-8", errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if text.lstrip().startswith("<"):
        text = unescape(_MARKUP.sub(" ", text))
    text = visible(" ".join(text.split()))
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
