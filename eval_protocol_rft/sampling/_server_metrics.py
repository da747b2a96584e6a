"""What a vLLM server says of its queue, polled while a run goes on, for the adaptive limit.

Invariant: it never breaks a run and never slows one down. A server without such metrics is asked
once; none is asked more often than every `POLL_SECONDS`, and no answer is read beyond `MOST_BYTES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections import deque
from collections.abc import AsyncIterator

import aiohttp

from eval_protocol_rft.sampling._adaptive import AdaptiveLimit, ServerLoad
from eval_protocol_rft.sampling._clock import Deadline
from eval_protocol_rft.sampling._endpoint import Endpoint, endpoint_headers, proxy_for
from eval_protocol_rft.sampling._http import NO_CLOCKS
from eval_protocol_rft.sampling._limiter import ConcurrencyLimit
from eval_protocol_rft.sampling._types import RefusedError

POLL_SECONDS = 2.0
"""A page costs the server some milliseconds."""
STANDING_POLLS = 3
"""A queue is one that all of so many polls found. What one poll finds may be a burst that has just
arrived and is gone with the next step: of a small vLLM server, polls found nine requests in ten
waiting, and half a second later none. The limit would go to a tenth on such a poll. The least over
an interval is how CoDel tells the two apart (Nichols and Jacobson, "Controlling Queue Delay", ACM
Queue 2012)."""
ANSWER_SECONDS = 5.0
"""Patience with one poll: a page that is longer in coming is no news."""
MOST_BYTES = 4 << 20
"""A page has some 100 kB; one that counts several engines and models, a few times that."""

_SAMPLE = re.compile(
    r"vllm:num_(requests_running|requests_waiting|preemptions_total)"
    r'(?:\{(?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*\})?[ \t]+(\S+)'
)
"""One sample in Prometheus' text format: name, labels, value, and perhaps a time."""
_log = logging.getLogger(__name__)


def parse_metrics(text: str) -> ServerLoad | None:
    """Read a page of metrics (Prometheus' text format); None where vLLM's two gauges are not on
    it, or one is no number of requests. Sums over the engines and models of the server; preemptions
    since it started."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            name, value = sample[1], _number(sample[2])
            sums[name] = sums.get(name, 0.0) + value
    if not {"requests_running", "requests_waiting"} <= sums.keys():
        return None
    if not all(0 <= value < math.inf for value in sums.values()):
        return None
    return ServerLoad(
        running=int(sums["requests_running"]),
        waiting=int(sums["requests_waiting"]),
        preempted=int(sums.get("preemptions_total", 0.0)),
    )


class StandingQueue:
    """From polls to what they show together. Pure."""

    def __init__(self) -> None:
        self._polls: deque[ServerLoad] = deque(maxlen=STANDING_POLLS)

    def saw(self, now: ServerLoad) -> ServerLoad:
        """The load after one more poll: of the last `STANDING_POLLS`, the one that found the least
        share waiting, and nothing while there are fewer; and the preemptions since the last poll.
        """
        before = self._polls[-1] if self._polls else now
        # A counter that went down began anew.
        preempted = max(0, now.preempted - before.preempted)
        self._polls.append(now)
        if len(self._polls) < STANDING_POLLS:
            return ServerLoad(running=0, waiting=0, preempted=preempted)
        least = min(self._polls, key=_share_waiting)
        return least._replace(preempted=preempted)


def _share_waiting(poll: ServerLoad) -> float:
    return poll.waiting / max(1, poll.waiting + poll.running)


@contextlib.asynccontextmanager
async def polling(
    endpoint: Endpoint | None, limit: ConcurrencyLimit, *, every: float = POLL_SECONDS
) -> AsyncIterator[None]:
    """Tell `limit` of the server's load for as long as the block runs, where that can be: the limit
    adapts, and the endpoint is a server of the user's. Fireworks tells its queues in each reply."""
    if endpoint is None or endpoint.is_fireworks or not isinstance(limit, AdaptiveLimit):
        yield
        return
    task = asyncio.create_task(_poll(endpoint, limit, every))
    try:
        yield
    finally:
        task.cancel()
        # Not awaited: what it raises is asyncio's to report, and not the run's end.
        await asyncio.wait([task])


async def _poll(endpoint: Endpoint, limit: AdaptiveLimit, every: float) -> None:
    url = f"{endpoint.base_url.removesuffix('/v1')}/metrics"
    try:
        proxy = proxy_for(url)
    except RefusedError:
        return  # requests for completions say so
    queue: StandingQueue | None = None
    async with aiohttp.ClientSession(
        headers=endpoint_headers(endpoint),
        cookie_jar=aiohttp.DummyCookieJar(),
        # A connection that waits for seconds is often closed from there; a new one costs nothing.
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=NO_CLOCKS,
    ) as session:
        while True:
            now = await _ask(session, url, proxy)
            if now is not None:
                queue = queue or StandingQueue()
                limit.observe(queue.saw(now))
            elif queue is None:
                _log.debug("the server has no metrics of vLLM's: its replies alone set the limit")
                return
            # A server that had metrics and has none is away or overloaded, and may come back.
            await asyncio.sleep(every)


async def _ask(session: aiohttp.ClientSession, url: str, proxy: str | None) -> ServerLoad | None:
    """One poll; None for whatever is no page of metrics."""
    try:
        async with (
            Deadline(ANSWER_SECONDS),
            session.get(url, allow_redirects=False, proxy=proxy) as response,
        ):
            if response.status != 200:
                return None
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > MOST_BYTES:
                    return None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return parse_metrics(page.decode("utf-8", errors="replace"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
