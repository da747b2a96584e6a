"""What a server answers: HTTP statuses and error bodies to typed errors, JSON bodies to `Reply`.
Pure.

Invariant: of a reply only the shape is judged here: types, what must be there.

Sources of the errors: Fireworks' error codes (docs.fireworks.ai, guides/inference-error-codes),
vLLM 0.32 as recorded. Bodies seen: `{"error": {"message", "type", "code"}}`, `{"error": "text"}`,
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
from eval_protocol_rft.sampling._types import ContractError, RefusedError, SamplingError

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
        return SamplingError(
            message, kind="unavailable", status=status, retry_after=wait, loading=loading
        )
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
        return SamplingError(text, kind="unavailable", status=status, loading=loading)
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


ABSENT = msgspec.Raw(b"null")
"""`null` and not there are the same to us."""


class Entry(msgspec.Struct, gc=False):
    """One sampled token in Fireworks' `logprobs.content[]`."""

    token_id: int
    logprob: float | None = None
    sampling_logprob: float | None = None
    text_offset: int | None = None
    routing_matrix: str | None = None


class Logprobs(msgspec.Struct, gc=False):
    content: list[Entry] | None = None
    token_logprobs: list[float | None] | None = None
    token_ids: list[int] | None = None
    tokens: list[str] | None = None
    text_offset: list[int | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class RawOutput(msgspec.Struct, gc=False):
    prompt_token_ids: msgspec.Raw = ABSENT
    completion_token_ids: list[int] | None = None


class Choice(msgspec.Struct, gc=False):
    index: int
    finish_reason: str | None = None
    text: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    """The same in SGLang's words, which names the end-of-turn token too."""
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = ABSENT
    logprobs: Logprobs | None = None
    raw_output: RawOutput | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(msgspec.Struct, gc=False):
    choices: list[Choice]
    id: str | None = None
    object: str | None = None
    model: str | None = None
    usage: Usage | None = None
    error: msgspec.Raw = ABSENT


_HALVES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\\.",
    re.DOTALL,
)
"""Escapes of JSON: a surrogate pair, half of one, any other. A half is no text, and costs its
character: ids and logprobs are in ASCII."""
DECODER = msgspec.json.Decoder(Reply)


def parse_reply(body: bytes) -> Reply:
    """Parse a whole JSON body.

    Raises:
        SamplingError: of kind `connection`, the JSON is cut off; `unavailable` or `refused`, it is
            an error object, or carries one.
        ContractError: it is no JSON, or not of a reply's shape.
    """
    try:
        reply = DECODER.decode(body)
    except msgspec.ValidationError as problem:
        error = error_in_body(body)
        if error is not None:
            raise error from problem
        raise ContractError(f"not a completions reply: {problem}{_kind(body)}") from problem
    except RecursionError as problem:
        raise ContractError("the reply is nested too deeply to read") from problem
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        mended = _HALVES.sub(_whole_or_replaced, body)
        if mended != body:
            return parse_reply(mended)
        if not body.strip() or _ends_too_soon(body, str(problem)):
            raise SamplingError(
                f"the reply is cut off after {len(body)} bytes", kind="connection"
            ) from problem
        raise ContractError(
            f"the reply is not JSON ({problem}); it begins {body[:80]!r}"
        ) from problem
    # An error beside choices: whatever tokens there are, the server does not stand by them.
    error = error_in_body(body) if reply.error != ABSENT else None
    if error is not None:
        raise error
    return reply


def _whole_or_replaced(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if len(escape[0]) == len(rb"\ufffd") else escape[0]


def _ends_too_soon(body: bytes, problem: str) -> bool:
    """Whether the decoder ran out of bytes; within a number it only says where it stopped."""
    at_end = problem.endswith(f"(byte {len(body)})") and "trailing" not in problem
    return at_end or "truncated" in problem


def _kind(body: bytes) -> str:
    value = loads(body)
    named = value.get("object") if isinstance(value, dict) else None
    return f" (its object is {named!r})" if named else ""
