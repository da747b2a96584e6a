"""What an HTTP status and the body that comes with it mean."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._replies import error_in_body, retry_after, status_error
from eval_protocol_rft.sampling._types import RefusedError, SamplingError, SamplingParams

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def error_of(status: int, body: bytes = b"", **headers: str):
    return status_error(status, body, {k.replace("_", "-"): v for k, v in headers.items()}, now=NOW)


def is_unavailable(error: SamplingError | None) -> bool:
    return error is not None and error.kind == "unavailable" and not error.loading


def is_loading(error: SamplingError | None) -> bool:
    return error is not None and error.kind == "unavailable" and error.loading


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 520, 524, 529, 583])
def test_these_may_pass(status):
    error = error_of(status)
    assert is_unavailable(error)
    assert error.status == status


@pytest.mark.parametrize(
    "status", [201, 204, 301, 302, 307, 400, 401, 402, 403, 404, 405, 412, 413, 422, 501, 505]
)
def test_these_will_be_said_again(status):
    error = error_of(status, Retry_After="5")
    assert type(error) is RefusedError
    assert (error.status, error.retry_after) == (status, None)


@pytest.mark.parametrize(
    "message",
    [
        "model_not_ready",
        "deployment is hot loading",
        "DEPLOYMENT_SCALING_UP",
        "the deployment is loading",
        "still loading: try again later",
        "Loading weights of step-7",
    ],
)
def test_a_deployment_that_comes_up_says_so_with_404_or_503(message):
    assert is_loading(error_of(404, message.encode()))
    assert is_loading(error_of(503, message.encode(), Retry_After="5"))
    assert error_of(503, message.encode(), Retry_After="5").retry_after == 5.0
    assert type(error_of(400, message.encode())) is RefusedError
    in_a_reply = b'{"error": {"message": "%s", "code": 404}}' % message.encode()
    assert is_loading(error_in_body(in_a_reply))


def test_425_is_a_swap_of_the_weights_whatever_it_says():
    error = error_of(425, b"", retry_after_ms="2500")
    assert is_loading(error)
    assert (error.kind, error.status, error.retry_after) == ("unavailable", 425, 2.5)


@pytest.mark.parametrize(
    "message",
    [
        "Model not found, inaccessible, and/or not deployed",
        "error loading model weights: no such file",
        "no model named downloading-llama",
    ],
)
def test_a_404_of_a_wrong_name_is_no_loading(message):
    assert type(error_of(404, message.encode())) is RefusedError


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "FIREWORKS_API_KEY"), (403, "access"), (404, "base URL")]
)
def test_a_common_mistake_comes_with_a_hint(status, hint):
    assert hint in str(error_of(status))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "type": "x", "code": "y"}}', "too long"),
        (b'{"error": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["n"], "msg": "bad"}]}', '[{"loc":["n"],"msg":"bad"}]'),
        (b'{"code": 9, "message": "quota", "details": []}', "quota"),
        (b'"just text"', "just text"),
        (b"Internal\n  Server Error", "Internal Server Error"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "no message"),
        (b"{}", "{}"),
    ],
)
def test_the_most_telling_text_of_a_body_is_the_message(body, message):
    assert str(error_of(400, body)) == f"HTTP 400: {message}"


def test_a_long_body_is_cut():
    assert len(str(error_of(400, b"x" * 100_000))) < 600


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("1.5", 1.5),
        (" 3 ", 3.0),
        ("-5", 0.0),
        ("Fri, 02 Jan 2026 03:04:15 GMT", 10.0),
        ("Fri, 02 Jan 2026 03:04:15 -0000", 10.0),
        ("Fri, 02 Jan 2026 03:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("inf", None),
        ("nan", None),
        ("Fri, 99 Jan 2026", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert retry_after({"Retry-After": value}, now=NOW) == seconds
    assert error_of(503, Retry_After=value).retry_after == seconds


def test_without_retry_after_there_is_no_floor():
    assert error_of(503).retry_after is None


@given(st.text(max_size=40))
def test_any_retry_after_is_read_or_ignored(value):
    seconds = retry_after({"Retry-After": value}, now=NOW)
    assert seconds is None or 0 <= seconds < float("inf")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"error": {"message": "gone", "code": 404}}', "refused"),
        (b'{"error": {"message": "full", "code": 503}}', "unavailable"),
        (b'{"error": {"message": "full", "code": "429"}}', "unavailable"),
        (b'{"error": {"message": "died"}}', "unavailable"),
        ('{"error": {"message": "died", "code": "\u00b2"}}'.encode(), "unavailable"),
        (b'{"error": {"message": "died", "code": 77777777777}}', "unavailable"),
        (b'{"error": "died"}', "unavailable"),
        (b'{"error": null}', None),
        (b'{"choices": []}', None),
        (b"[]", None),
        (b"not json", None),
        (b"\xff", None),
    ],
)
def test_an_error_inside_a_reply(body, kind):
    error = error_in_body(body)
    assert (error.kind if error else None) == kind
    assert isinstance(error, RefusedError) == (kind == "refused")
    assert error is None or not error.loading


@given(st.binary(max_size=60))
def test_any_body_is_a_message(body):
    assert str(error_of(400, body)).startswith("HTTP 400: ")
    error_in_body(body)


def test_a_page_is_told_by_its_words_on_one_line():
    page = (
        b"\n<!DOCTYPE html><html><head><title>502 Bad Gateway</title><style>p {color: red}</style>"
        b"<script>alert('x < y')</script></head><body><!-- a comment -->\n<h1>No &amp; never</h1>"
        b"</body></html>"
    )
    assert str(error_of(502, page)) == "HTTP 502: 502 Bad Gateway No & never"


def test_a_servers_words_move_no_terminal_and_are_short():
    error = error_of(400, b'{"error": {"message": "\\u001b[2Jgone\\u202e\\r\\nnew line"}}')
    assert str(error) == "HTTP 400: \\x1b[2Jgone\\u202e new line"
    assert len(str(error_of(500, b"x" * 10_000))) < 600


@pytest.mark.parametrize(
    "reply",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"<html>" + b"x" * 4000 + b"\r\n\r\n", bytes(range(128, 256)) * 9],
    ids=["another protocol", "a page without headers", "rubbish"],
)
async def test_what_is_no_http_is_said_to_be_none_and_briefly(reply: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    sampler = HttpSampler(Endpoint(url))
    async with server:
        with pytest.raises(SamplingError) as caught:
            await sampler.sample([1], SamplingParams(model="m", max_tokens=1))
        await sampler.aclose()
    message = str(caught.value).replace(url, "")  # a port may have any digits
    assert caught.value.kind == "connection"
    assert "the reply cannot be read as HTTP" in message
    assert "400" not in message  # aiohttp's own word: no server said it
    assert len(message) < 300
