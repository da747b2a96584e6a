"""Connections that end, or fall silent, at every stage of a request.

"In the body" means that some of it was sent, never all.
"""

from __future__ import annotations

from tests.hostile.exchange import LAST_CHUNK, Exchange, chunk, head
from tests.hostile.faults import WHOLE, fault
from tests.hostile.replies import DONE

_END = len(chunk(DONE) + LAST_CHUNK)
_BROKEN = "disconnected|reset|cannot connect|cannot write|can not write|payload"
"""What HTTP clients say of a connection that ended too soon; which of them, timing decides."""


def _framed(exchange: Exchange) -> tuple[bytes, bytes]:
    """Head and framed body, as an honest answer has them."""
    body = exchange.pieces()
    if exchange.request.streamed:
        headers = [exchange.kind_header(), ("Transfer-Encoding", "chunked")]
        return head(200, headers), b"".join(map(chunk, body)) + LAST_CHUNK
    headers = [exchange.kind_header(), ("Content-Length", str(len(body[0])))]
    return head(200, headers), body[0]


async def _part(exchange: Exchange) -> None:
    start, body = _framed(exchange)
    # The end of a stream is left out whole: who has read `[DONE]` may stop there.
    await exchange.write(start + body[: exchange.rng.randrange(1, len(body) - _END)])


@fault("connection", says=_BROKEN, at_accept=True)
async def reset_at_accept(exchange: Exchange) -> None:
    exchange.reset()


@fault("connection", says=_BROKEN, at_accept=True)
async def close_at_accept(exchange: Exchange) -> None:
    exchange.close()


@fault("timeout", says="no whole reply within", at_accept=True)
async def stall_at_accept(exchange: Exchange) -> None:
    await exchange.stall()


@fault("connection", says=_BROKEN)
async def reset_before_reply(exchange: Exchange) -> None:
    exchange.reset()


@fault("connection", says=_BROKEN)
async def close_before_reply(exchange: Exchange) -> None:
    exchange.close()


@fault("connection", says=_BROKEN)
async def half_close_before_reply(exchange: Exchange) -> None:
    exchange.half_close()
    await exchange.stall()


@fault("timeout", says="no whole reply within")
async def stall_before_reply(exchange: Exchange) -> None:
    await exchange.stall()


@fault("connection", says=_BROKEN)
async def reset_in_head(exchange: Exchange) -> None:
    start, _ = _framed(exchange)
    await exchange.write(start[:20])
    exchange.reset()


@fault("connection", says=_BROKEN)
async def close_in_head(exchange: Exchange) -> None:
    start, _ = _framed(exchange)
    await exchange.write(start[:20])
    exchange.close()


@fault("timeout", says="no whole reply within")
async def stall_in_head(exchange: Exchange) -> None:
    start, _ = _framed(exchange)
    await exchange.write(start[:20])
    await exchange.stall()


@fault("timeout", says="no whole reply within")
async def stall_after_head(exchange: Exchange) -> None:
    await exchange.write(_framed(exchange)[0])
    await exchange.stall()


@fault("connection", says=_BROKEN)
async def reset_in_body(exchange: Exchange) -> None:
    await _part(exchange)
    exchange.reset()


@fault("connection", says=_BROKEN)
async def close_in_body(exchange: Exchange) -> None:
    await _part(exchange)
    exchange.close()


@fault("connection", says=_BROKEN)
async def half_close_in_body(exchange: Exchange) -> None:
    await _part(exchange)
    exchange.half_close()
    await exchange.stall()


@fault("timeout", says="no whole reply within")
async def stall_in_body(exchange: Exchange) -> None:
    await _part(exchange)
    await exchange.stall()


@fault("timeout", says="no whole reply within", modes=WHOLE)
async def stall_before_last_byte(exchange: Exchange) -> None:
    start, body = _framed(exchange)
    await exchange.write(start + body[:-1])
    await exchange.stall()


@fault("connection", says="cut off|\\[DONE\\]")
async def cut_body_without_length(exchange: Exchange) -> None:
    """Where the end of the connection ends the body, a cut looks like an end."""
    body = b"".join(exchange.pieces())
    await exchange.write(head(200, [exchange.kind_header(), ("Connection", "close")]))
    await exchange.write(body[: exchange.rng.randrange(len(body) - len(DONE))])
    exchange.close()


@fault("timeout", says="no whole reply within")
async def drip_without_end(exchange: Exchange) -> None:
    """Always another blank, so that the connection is never idle."""
    await exchange.write(head(200, [exchange.kind_header(), ("Transfer-Encoding", "chunked")]))
    await exchange.drip(chunk(b" ") * 200_000, pause=0.005, size=6)


@fault("timeout", says="no whole reply within")
async def interim_replies_without_end(exchange: Exchange) -> None:
    await exchange.drip(head(102, reason="Processing") * 200_000, pause=0.005, size=27)
