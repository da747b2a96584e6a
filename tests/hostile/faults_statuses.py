"""Everything that a server says instead of a completion, with a status or within a 200."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from tests.hostile.exchange import Exchange, Headers, head
from tests.hostile.faults import Sees, fault
from tests.hostile.replies import DONE, dumps, event

HTML = b"<html><head><title>Bad gateway</title></head><body>nginx</body></html>"
_ERROR = {"error": {"message": "not today", "type": "server_error", "code": None}}


def _status(status: int, sees: Sees, says: str, name: str = "", body: bytes = b"") -> None:
    async def act(exchange: Exchange) -> None:
        await exchange.answer([body or dumps(_ERROR)], status=status)

    fault(sees, says=f"HTTP {status}.*{says}", name=name or f"status_{status}")(act)


for _code in (408, 409, 425, 429, 500, 502, 503, 504, 529):
    _status(_code, "unavailable", "not today")
for _code in (400, 401, 402, 403, 404, 405, 410, 413, 422, 501):
    _status(_code, "refused", "not today")
_status(
    404, "unavailable", "hot load", "model_not_ready", b'{"error": "deployment is hot loading"}'
)
_status(502, "unavailable", "Bad gateway", "html_error_page", HTML)
_status(403, "refused", "nginx", "html_forbidden", HTML)


def _retry_after(name: str, value: str | None = None, days: float = 0.0) -> None:
    async def act(exchange: Exchange) -> None:
        date = format_datetime(datetime.now(UTC) + timedelta(days=days), usegmt=True)
        headers: Headers = [("Retry-After", value or date), ("Date", date)]
        await exchange.answer([dumps(_ERROR)], status=429, headers=headers)

    fault("unavailable", says="HTTP 429", name=name)(act)


_retry_after("retry_after_seconds", "0.01")
_retry_after("retry_after_garbage", "soon")
_retry_after("retry_after_zone_without_end", "Fri, 02 Jan 2026 03:04:05 +99999999999999999999")
_retry_after("retry_after_of_a_slow_clock", days=-400)


@fault("unavailable", says="HTTP 503", costly=True)
async def retry_after_of_a_fast_clock(exchange: Exchange) -> None:
    """The server's clock is a day ahead: by its own `Date` it asks for one second. A client that
    believes the date waits for a day."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    headers = [
        ("Date", format_datetime(tomorrow, usegmt=True)),
        ("Retry-After", format_datetime(tomorrow + timedelta(seconds=1), usegmt=True)),
    ]
    await exchange.answer([dumps(_ERROR)], status=503, headers=headers)


@fault("refused", says="HTTP 307")
async def redirect_to_itself(exchange: Exchange) -> None:
    await exchange.answer([b""], status=307, headers=[("Location", "/v1/completions")])


@fault("refused", says="HTTP 302")
async def redirect_elsewhere(exchange: Exchange) -> None:
    """Whoever follows it carries the key to another host."""
    await exchange.answer(
        [b""], status=302, headers=[("Location", "http://127.0.0.2:9/v1/completions")]
    )


@fault("refused", says="HTTP 204")
async def no_content(exchange: Exchange) -> None:
    await exchange.write(head(204))


@fault("refused", says="HTTP 206")
async def part_of_the_content(exchange: Exchange) -> None:
    await exchange.answer(exchange.pieces(), status=206)


@fault("refused", "connection", says="HTTP 101|disconnected|payload|upgrade")
async def switch_of_protocols(exchange: Exchange) -> None:
    await exchange.write(head(101, [("Connection", "Upgrade"), ("Upgrade", "h2c")]))
    exchange.close()


@fault("unavailable", says="error in the reply: not today")
async def error_in_200(exchange: Exchange) -> None:
    pieces = [event(_ERROR), DONE] if exchange.request.streamed else [dumps(_ERROR)]
    await exchange.answer(pieces)


@fault("unavailable", says="error in the reply: not today")
async def error_beside_choices(exchange: Exchange) -> None:
    """A reply that is right but for an error that it also carries."""
    if exchange.request.streamed:
        *events, done = exchange.pieces()
        await exchange.answer([*events, event({**_ERROR, "choices": []}), done])
    else:
        exchange.reply.update(_ERROR)
        await exchange.answer(exchange.pieces())


@fault("contract", "connection", says="not JSON.*<html>|\\[DONE\\]")
async def html_in_200(exchange: Exchange) -> None:
    await exchange.answer([HTML])


@fault("connection", says="cut off after 0 bytes|0 events")
async def empty_body(exchange: Exchange) -> None:
    await exchange.answer([b""])
