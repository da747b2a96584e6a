"""Oddities that change nothing: a right client accepts the true completion.

Invariant: what these send is the true reply, whole.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib
from typing import Any

from tests.hostile.exchange import LAST_CHUNK, Exchange, chunk, head
from tests.hostile.faults import STREAM, WHOLE, change, fault, pieces
from tests.hostile.replies import DONE


async def _sent(exchange: Exchange, *parts: bytes) -> None:
    for part in parts:
        await exchange.write(part)
    exchange.whole = True


def _body(exchange: Exchange) -> bytes:
    return b"".join(exchange.pieces())


def _with_length(exchange: Exchange, *headers: tuple[str, str], body: bytes) -> bytes:
    length = ("Content-Length", str(len(body)))
    return head(200, [exchange.kind_header(), *headers, length]) + body


@fault("accept")
async def slow_drip(exchange: Exchange) -> None:
    """A few bytes at a time, the head as well. The last of them have a fault of their own."""
    data = _with_length(exchange, body=_body(exchange))
    await exchange.drip(data[: -len(DONE)], pause=0.0005, size=1 + len(data) // 40)
    await _sent(exchange, data[-len(DONE) :])


@fault("accept")
async def chunks_of_one_byte(exchange: Exchange) -> None:
    start = head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")])
    body = b"".join(chunk(bytes([byte])) for byte in _body(exchange))
    await _sent(exchange, start, body + LAST_CHUNK)


@fault("accept")
async def chunks_with_extensions_and_trailers(exchange: Exchange) -> None:
    body = _body(exchange)
    start = head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")])
    framed = b"%X;name=value\r\n%b\r\n0\r\nX-Checksum: 1\r\n\r\n" % (len(body), body)
    await _sent(exchange, start + framed)


@fault("accept")
async def gzip_right(exchange: Exchange) -> None:
    packed = gzip.compress(_body(exchange))
    await _sent(exchange, _with_length(exchange, ("Content-Encoding", "gzip"), body=packed))


@fault("accept")
async def deflate_right(exchange: Exchange) -> None:
    packed = zlib.compress(_body(exchange))
    await _sent(exchange, _with_length(exchange, ("Content-Encoding", "deflate"), body=packed))


@fault("accept")
async def end_by_close(exchange: Exchange) -> None:
    """No length and no chunks: the end of the connection is the end of the body."""
    await _sent(exchange, head(200, [exchange.kind_header()]) + _body(exchange))
    exchange.close()


@fault("accept")
async def close_announced(exchange: Exchange) -> None:
    await _sent(exchange, _with_length(exchange, ("Connection", "close"), body=_body(exchange)))
    exchange.close()


@fault("accept")
async def close_after_reply(exchange: Exchange) -> None:
    """Without a word: a pooled connection that is dead when it is next used."""
    await exchange.honest()
    exchange.close()


@fault("accept")
async def interim_replies(exchange: Exchange) -> None:
    early = head(103, [("Link", "</style.css>; rel=preload")], reason="Early Hints")
    await exchange.write(head(100, reason="Continue") + early)
    await exchange.honest()


@fault("accept")
async def another_content_type(exchange: Exchange) -> None:
    body = _body(exchange)
    start = head(200, [("Content-Type", "text/html"), ("Content-Length", str(len(body)))])
    await _sent(exchange, start + body)


@fault("accept")
async def names_in_odd_case(exchange: Exchange) -> None:
    body = _body(exchange)
    await _sent(exchange, head(200, [("cONTENT-lENGTH", str(len(body))), ("X-Odd", "")]) + body)


@fault("accept")
async def no_reason_phrase(exchange: Exchange) -> None:
    body = _body(exchange)
    await _sent(exchange, head(200, [("Content-Length", str(len(body)))], reason="") + body)


@fault("accept")
async def cookies_that_grow(exchange: Exchange) -> None:
    cookie = f"session={exchange.rng.randbytes(500).hex()}; Path=/"
    await _sent(exchange, _with_length(exchange, ("Set-Cookie", cookie), body=_body(exchange)))


@change("accept")
def unknown_fields(reply: Any, rng: random.Random) -> None:
    reply["service_tier"] = {"deep": [1, None, {"x": "y"}]}
    reply["choices"][0]["routed_experts"] = None
    reply["usage"]["prompt_tokens_details"] = {"cached_tokens": 0}


@change("accept")
def optional_fields_left_out(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["prompt_token_ids"] = None
    reply["usage"]["total_tokens"] = None
    reply["created"] = None


@change("accept")
def text_of_replacement_characters(reply: Any, rng: random.Random) -> None:
    reply["choices"][0]["text"] = "\ufffd\u3000\u2028\ufffd"


@pieces("accept", modes=WHOLE)
def keys_in_another_order(body: list[bytes], rng: random.Random) -> list[bytes]:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(one) for one in value] if isinstance(value, list) else value

    return [json.dumps(turned(json.loads(body[0])), indent=3).encode() + b"\n\n"]


@pieces("accept", modes=WHOLE)
def text_not_escaped(body: list[bytes], rng: random.Random) -> list[bytes]:
    reply = json.loads(body[0])
    reply["choices"][0]["text"] += " \u2028 \u3000"
    reply["system_fingerprint"] = "\u65e5\u672c\u8a9e \U0001f600"
    return [json.dumps(reply, ensure_ascii=False).encode()]


@pieces("accept", modes=STREAM)
def lines_end_in_crlf(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [one.replace(b"\n", b"\r\n") for one in events]


@pieces("accept", modes=STREAM)
def comments_between_events(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [part for one in events for part in (b": keep-alive\n\n", one)]


@pieces("accept", modes=STREAM)
def no_blank_after_data(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [one.replace(b"data: ", b"data:") for one in events]


@pieces("accept", modes=STREAM)
def events_with_names_and_ids(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [b"event: completion\nid: %d\nretry: 9\n" % at + one for at, one in enumerate(events)]


@pieces("accept", modes=STREAM)
def pieces_of_any_size(events: list[bytes], rng: random.Random) -> list[bytes]:
    body, cut = b"".join(events[:-1]), []
    while body:
        size = rng.randint(1, 30)
        cut.append(body[:size])
        body = body[size:]
    return [*cut, events[-1]]


@fault("accept", modes=STREAM)
async def text_that_says_done(exchange: Exchange) -> None:
    """The words that end a stream, within a string of its first event; then a pause."""
    exchange.reply["system_fingerprint"] = "data: [DONE]\n\n" * 2
    first, *rest = exchange.pieces()
    start = head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")])
    await exchange.write(start + chunk(first))
    await asyncio.sleep(0.05)
    await _sent(exchange, b"".join(map(chunk, rest)) + LAST_CHUNK)


@fault("accept", modes=STREAM)
async def pause_within_done(exchange: Exchange) -> None:
    """The line of `[DONE]` comes, and the blank line that makes it an event a little later."""
    body = _body(exchange)
    start = head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")])
    await exchange.write(start + chunk(body[:-2]))
    await asyncio.sleep(0.05)
    await _sent(exchange, chunk(body[-2:]) + LAST_CHUNK)


@fault("accept", modes=STREAM)
async def silence_after_done(exchange: Exchange) -> None:
    """The stream is over, and its body never ends."""
    start = head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")])
    await _sent(exchange, start + chunk(_body(exchange)))
    await exchange.stall()


@pieces("accept", modes=STREAM)
def words_after_done(events: list[bytes], rng: random.Random) -> list[bytes]:
    return [*events, b": bye\n\n"]


_KEEPALIVES = (
    b": ping\n\n",
    b"data:\n\n",
    b"event: ping\ndata:\n\n",
    b'event: ping\ndata: {"type": "ping"}\n\n',
    b'data: {"type": "ping"}\n\n',
    b"event: keep-alive\ndata: {}\n\n",
    b"retry: 3000\n\n",
)


@pieces("accept", modes=STREAM)
def keepalive_events(events: list[bytes], rng: random.Random) -> list[bytes]:
    """What gateways put between events, so that no idle connection is closed."""
    *told, done = events
    for event in _KEEPALIVES:
        told.insert(rng.randint(0, len(told)), event)
    return [*told, done]


@fault("accept")
async def request_id_of_odd_bytes(exchange: Exchange) -> None:
    """A header that is no UTF-8, as a proxy's Latin-1."""
    await exchange.answer(exchange.pieces(), headers=[("x-request-id", "req\xe9\x85\xff")])
    exchange.whole = True
