"""HTTP that lies about itself: lengths, chunks, heads, encodings, sizes."""

from __future__ import annotations

import asyncio
import functools
import gzip
import zlib

from tests.hostile.exchange import Exchange, Headers, chunk, head
from tests.hostile.faults import WHOLE, fault
from tests.hostile.replies import dumps

ENDLESS_BYTES = 1 << 27
"""What a bounded reader never takes in whole."""
_BLOCK = b" " * (1 << 16)


async def _with(exchange: Exchange, headers: Headers, body: bytes) -> None:
    await exchange.write(head(200, [exchange.kind_header(), *headers]) + body)


def _body(exchange: Exchange) -> bytes:
    return b"".join(exchange.pieces())


@fault("connection", says="payload", modes=WHOLE)
async def length_too_long(exchange: Exchange) -> None:
    body = _body(exchange)
    await _with(exchange, [("Content-Length", str(len(body) + 7))], body)
    exchange.close()


@fault("timeout", says="no whole reply within", modes=WHOLE)
async def length_too_long_and_open(exchange: Exchange) -> None:
    body = _body(exchange)
    await _with(exchange, [("Content-Length", str(len(body) + 7))], body)
    await exchange.stall()


@fault("connection", says="cut off|\\[DONE\\]|bad status line")
async def length_too_short(exchange: Exchange) -> None:
    """What lies beyond the length must not become the start of the next reply."""
    body = _body(exchange)
    await _with(exchange, [("Content-Length", str(len(body) - 20))], body)


@fault("connection", says="content-length|bad|400")
async def length_is_no_number(exchange: Exchange) -> None:
    await _with(exchange, [("Content-Length", "many")], _body(exchange))
    exchange.close()


@fault("connection", says="content-length|bad|400")
async def length_is_negative(exchange: Exchange) -> None:
    await _with(exchange, [("Content-Length", "-1")], _body(exchange))
    exchange.close()


@fault("connection", says="content-length|bad|400")
async def two_lengths(exchange: Exchange) -> None:
    body = _body(exchange)
    lengths = [("Content-Length", str(len(body))), ("Content-Length", str(len(body) - 20))]
    await _with(exchange, lengths, body)
    exchange.close()


@fault("connection", says="chunk|payload")
async def chunk_size_is_no_number(exchange: Exchange) -> None:
    framed = b"zz\r\n" + _body(exchange) + b"\r\n0\r\n\r\n"
    await _with(exchange, [("Transfer-Encoding", "chunked")], framed)
    exchange.close()


@fault("connection", says="payload|chunk", modes=WHOLE)
async def no_last_chunk(exchange: Exchange) -> None:
    await _with(exchange, [("Transfer-Encoding", "chunked")], chunk(_body(exchange)))
    exchange.close()


@fault("connection", says="status line|bad|invalid|expected")
async def not_http(exchange: Exchange) -> None:
    await exchange.write(b"SSH-2.0-OpenSSH_9.6\r\n" + _body(exchange))
    exchange.close()


@fault("connection", says="status line|bad|invalid")
async def status_is_no_number(exchange: Exchange) -> None:
    await exchange.write(b"HTTP/1.1 2x0 OK\r\nContent-Length: 0\r\n\r\n")
    exchange.close()


@fault("connection", says="header|400|long|bytes")
async def head_too_long(exchange: Exchange) -> None:
    await _with(exchange, [("X-Filler", "f" * 200_000)], b"")
    exchange.close()


@fault("connection", "timeout", says="header|400|no whole reply within|disconnected")
async def head_without_end(exchange: Exchange) -> None:
    await exchange.write(b"HTTP/1.1 200 OK\r\n")
    await exchange.drip(b"X-Filler: f\r\n" * 200_000, pause=0.001, size=13)


async def _encoded(exchange: Exchange, encoding: str, body: bytes) -> None:
    length = ("Content-Length", str(len(body)))
    await _with(exchange, [("Content-Encoding", encoding), length], body)


@fault("connection", "contract", says="gzip|encoding|decode")
async def gzip_of_garbage(exchange: Exchange) -> None:
    await _encoded(exchange, "gzip", exchange.rng.randbytes(200))


@fault("connection", "contract", says="payload|decode|encoding|cut off|\\[DONE\\]")
async def gzip_cut_off(exchange: Exchange) -> None:
    packed = gzip.compress(_body(exchange))
    await _encoded(exchange, "gzip", packed[: len(packed) // 2])


@fault("connection", "contract", says="payload|decode|encoding|checksum|crc")
async def gzip_with_wrong_checksum(exchange: Exchange) -> None:
    packed = gzip.compress(_body(exchange))
    checksum, size = packed[-8:-4], packed[-4:]
    await _encoded(exchange, "gzip", packed[:-8] + bytes(255 - one for one in checksum) + size)


@fault("connection", "contract", says="encoding|not JSON|decode|\\[DONE\\]")
async def encoding_unknown(exchange: Exchange) -> None:
    await _encoded(exchange, "x-own", zlib.compress(_body(exchange)))


@fault("contract", says="(longer|larger|more) than .* bytes", costly=True)
async def gzip_bomb(exchange: Exchange) -> None:
    """128 MiB of blanks before the reply, in 128 KiB."""
    await _encoded(exchange, "gzip", _packed_blanks() + gzip.compress(_body(exchange)))


@functools.cache
def _packed_blanks() -> bytes:
    packer = zlib.compressobj(wbits=31)
    packed = b"".join(packer.compress(_BLOCK) for _ in range(ENDLESS_BYTES // len(_BLOCK)))
    return packed + packer.flush()


@fault("contract", says="(longer|larger|more) than .* bytes", costly=True)
async def oversized_body(exchange: Exchange) -> None:
    """128 MiB of blanks before the reply, sent as fast as they are taken."""
    await exchange.write(head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")]))
    for _ in range(ENDLESS_BYTES // len(_BLOCK)):
        await exchange.write(chunk(_BLOCK))
    await exchange.write(chunk(_body(exchange)) + b"0\r\n\r\n")


@fault("contract", "unavailable", says="(longer|larger|more) than .* bytes|HTTP 500", costly=True)
async def oversized_error(exchange: Exchange) -> None:
    """128 MiB of words with a status that is not 200."""
    await exchange.write(head(500, [("Transfer-Encoding", "chunked")]))
    for _ in range(ENDLESS_BYTES // len(_BLOCK)):
        await exchange.write(chunk(_BLOCK.replace(b" ", b"x")))
    await exchange.write(b"0\r\n\r\n")


def _sibling(exchange: Exchange) -> bytes:
    """A whole right reply to the same prompt that nobody asked for."""
    body = dumps(exchange.reply_with_seed(exchange.request.seed + 1))
    return head(200, [exchange.kind_header(), ("Content-Length", str(len(body)))]) + body


@fault("accept", modes=WHOLE)
async def second_reply_at_once(exchange: Exchange) -> None:
    """The extra reply comes with the right one; the next request on this connection must not take
    it for its own."""
    body = exchange.pieces()[0]
    right = head(200, [exchange.kind_header(), ("Content-Length", str(len(body)))]) + body
    await exchange.write(right + _sibling(exchange))
    exchange.whole = True


@fault("accept", modes=WHOLE)
async def second_reply_later(exchange: Exchange) -> None:
    """The same, while the connection lies idle in the client's pool. Once the next request is under
    way nothing in HTTP/1.1 tells this from its reply: then it is not sent."""
    await exchange.honest()
    await asyncio.sleep(0.02)
    if exchange.client_is_silent():
        exchange.surplus = True
        await exchange.write(_sibling(exchange))
