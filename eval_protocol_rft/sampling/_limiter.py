"""What every request of a run goes through before it starts, and what a vLLM server says of its
queue, polled while a run goes on.

Invariant: a request starts in the same step of the event loop in which `_limits.py` allowed it, and
whoever waits is woken when its turn may have come. Polling never breaks a run and never slows one
down: a server without such metrics is asked once; none is asked more often than every
`POLL_SECONDS`, and no answer is read beyond `MOST_BYTES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import AbstractAsyncContextManager

import aiohttp

from eval_protocol_rft.sampling import _limits
from eval_protocol_rft.sampling._adaptive import AdaptiveLimit, ServerLoad
from eval_protocol_rft.sampling._clock import Deadline, loop_clock, sampling_time
from eval_protocol_rft.sampling._connections import NO_CLOCKS
from eval_protocol_rft.sampling._endpoint import Endpoint, endpoint_headers, proxy_for
from eval_protocol_rft.sampling._retry import Attempt, failed_attempt
from eval_protocol_rft.sampling._types import Completion, RefusedError, SamplingError

_NO_LIMIT = 1 << 30
_SHORTEST_WAIT = 1e-4
"""Seconds. A date that is nearer may have come by the time that it is looked at, but for a
rounding."""
_NUMBER = re.compile(r"[0-9]+")
_MOST_MET = 256
"""Kinds of failures that are kept in mind."""
logger = logging.getLogger(__name__)


class Turn:
    """One request that may be made now. Tell it how it ended."""

    def __init__(self, started: float, probe: bool, prompt: Hashable) -> None:
        self.started, self.probe, self.prompt = started, probe, prompt
        self.attempt: Attempt | None = None
        """None while it has not ended."""

    def succeeded(self, completion: Completion) -> Attempt:
        self.attempt = Attempt(
            started=self.started,
            ended=sampling_time(),
            tokens=len(completion.token_ids),
            queue_seconds=completion.queue_seconds,
            probe=self.probe,
            prompt=self.prompt,
        )
        return self.attempt

    def failed(self, error: SamplingError) -> Attempt:
        self.attempt = failed_attempt(
            error,
            started=self.started,
            ended=sampling_time(),
            probe=self.probe,
            prompt=self.prompt,
        )
        return self.attempt


class RunLimiter:
    """What all requests of a run against one server go through. Belongs to one event loop."""

    def __init__(
        self,
        *,
        limit: _limits.ConcurrencyLimit | None = None,
        patience_seconds: float = 1800.0,
        proven: bool = False,
    ) -> None:
        """
        Args:
            limit: how many requests may be in flight; None: the caller sees to it.
            patience_seconds: how long the server may be away.
            proven: the same settings have brought completions before this run.
        """
        self.limits = _limits.RunLimits(
            limit=limit or _limits.FixedLimit(_NO_LIMIT),
            breaker=_limits.CircuitBreaker(patience_seconds=patience_seconds, proven=proven),
            budget=_limits.RetryBudget(began=sampling_time()),
        )
        self._met: set[str] = set()
        self._waiting: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}
        """Who waits, first come first served: completions that were begun already, and others."""
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def turn(
        self, slots: AbstractAsyncContextManager[object], *, retry: bool, prompt: Hashable
    ) -> AsyncIterator[Turn]:
        """Wait until a request may be made, and hold a slot while it is.

        Args:
            slots: a further bound, of the caller's. Nothing waits for the server while holding one.
            retry: it is not its completion's first request.
            prompt: which prompt it is for.

        Raises:
            RunStoppedError: no further request is made in this run.
        """
        with loop_clock().runs():
            while True:
                await self._may_start(retry)
                async with slots:
                    turn = self._start(retry, prompt)
                    if turn is None:
                        continue
                    try:
                        yield turn
                    finally:
                        if turn.attempt is None:
                            self.limits.abandoned(probe=turn.probe)
                        else:
                            self._ended(turn.attempt)
                        self._wake()
                    return

    def has_met(self, attempt: Attempt) -> bool:
        """Whether a failure like this one, numbers in its message aside, was asked about before."""
        failure = f"{attempt.cause}: {_NUMBER.sub('0', attempt.message)}"
        met = failure in self._met
        if len(self._met) < _MOST_MET:
            self._met.add(failure)
        return met

    def _ended(self, attempt: Attempt) -> None:
        """Tell the limits, and the user when the server goes away or comes back."""
        was_away = self._is_away()
        self.limits.ended(attempt)
        if self._is_away() and not was_away:
            why = f"{attempt.cause}: {attempt.message}"
            logger.warning("the server is away (%s); asking now and then until it is back", why)
        elif was_away and not self._is_away():
            logger.warning("the server is back")

    def _is_away(self) -> bool:
        return self.limits.breaker.state in ("open", "half-open")

    async def _may_start(self, retry: bool) -> None:
        """Come back when a request might start.

        Raises:
            RunStoppedError: none ever will.
        """
        queue = self._waiting[retry]
        if not queue and self._earliest(retry) <= sampling_time():
            return
        woken = asyncio.get_running_loop().create_future()
        queue.append(woken)
        self._wake()
        while True:
            try:
                await woken
            except asyncio.CancelledError:
                if not woken.cancelled():
                    self._wake()  # it was our turn; let another have it
                raise
            if self._earliest(retry) <= sampling_time():
                # Once we have started, or wait for a slot.
                asyncio.get_running_loop().call_soon(self._wake)
                return
            woken = asyncio.get_running_loop().create_future()
            queue.appendleft(woken)
            self._wake()

    def _earliest(self, retry: bool) -> float:
        return self.limits.earliest(sampling_time(), retry=retry)

    def _start(self, retry: bool, prompt: Hashable) -> Turn | None:
        now = sampling_time()
        if self.limits.earliest(now, retry=retry) > now:
            return None
        return Turn(now, self.limits.started(now, retry=retry), prompt)

    def _wake(self) -> None:
        """Wake the first who may start now, or see to it that the first is woken when he may.

        One at a time: who was woken calls this again. To wake all who might start, for each to find
        that only one can, takes the square of their number: with 2,000 requests in flight, two
        minutes without a server took minutes of CPU.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.limits.breaker.stopped is not None:
            self._wake_all()
            return
        now = sampling_time()
        at = math.inf
        # What was begun first: how many of these there may be is the budget's to say.
        for retry in (True, False):
            queue = self._waiting[retry]
            while queue and queue[0].done():
                queue.popleft()  # cancelled
            if queue:
                own = self.limits.earliest(now, retry=retry)
                if own <= now:
                    queue.popleft().set_result(None)
                    return
                at = min(at, own)
        if at < math.inf:
            seconds = max(_SHORTEST_WAIT, at - now)
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake_all(self) -> None:
        for queue in self._waiting.values():
            while queue:
                woken = queue.popleft()
                if not woken.done():
                    woken.set_result(None)


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
    endpoint: Endpoint | None, limit: _limits.ConcurrencyLimit, *, every: float = POLL_SECONDS
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
                logger.debug("the server has no metrics of vLLM's: its replies alone set the limit")
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
