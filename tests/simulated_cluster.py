"""A run of `generate` at the size of a cluster, on one core: our own `SamplingRun`, with its tasks,
limiter, breaker, budget and retries, in an event loop whose time is simulated, against simulated
engines.

Nothing here waits. Time passes when nothing is ready to run, up to the next timer, and when
`VirtualLoop.spend` says that the loop's thread was busy: that is how the CPU of the head counts,
whatever this machine's clock says. So a run is the same on any machine, however slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import random
import selectors
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from eval_protocol_rft.data._format import CompletionRow, FileMetadata, schema
from eval_protocol_rft.data._generate_output import DoneIndex
from eval_protocol_rft.data._job_store import failed_rows, row_keys
from eval_protocol_rft.data._sampling_run import Prompt, SamplingRun
from eval_protocol_rft.rollout import parse_completion_params
from eval_protocol_rft.sampling import ConcurrencyLimit, RetryPolicy, _clock
from eval_protocol_rft.sampling._fanout import derive_seeds
from eval_protocol_rft.sampling._telemetry import AttemptEvent
from eval_protocol_rft.sampling._types import (
    Completion,
    SamplingError,
    SamplingParams,
    TokenIds,
)

ROUND_TRIP = 0.05
"""Seconds that a refusal takes."""
N = 8
"""Completions of a prompt."""
PROMPT = TokenIds(range(150))
REQUEST = parse_completion_params(
    {"model": "simulated", "api_base": "http://nowhere", "n": N, "max_tokens": 8192}
)
SCHEMA = schema(FileMetadata(), {})


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is simulated. Threads that it is asked for are simulated too:
    what they run is run at once, and is done when `thread_seconds` of it have passed."""

    def __init__(self, thread_seconds: Callable[[tuple[Any, ...]], float] = lambda _: 0.0) -> None:
        self.now = 0.0
        self.busy = 0.0
        """Seconds that were spent."""
        self.thread_cpu = 0.0
        """Real seconds of CPU of what threads were asked for."""
        self._thread_seconds = thread_seconds
        self._thread_free_at = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """The thread of the loop is busy for so long."""
        self.now += seconds
        self.busy += seconds

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        """One thread for all, which does one thing after the other."""
        began = time.process_time()
        result = function(*args)
        self.thread_cpu += time.process_time() - began
        done = self.create_future()
        self._thread_free_at = max(self.now, self._thread_free_at) + self._thread_seconds(args)
        self.call_at(self._thread_free_at, lambda: done.cancelled() or done.set_result(result))
        return done


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self._loop.now += max(0.0, timeout)
        return []


@contextlib.contextmanager
def simulated_time(loop: VirtualLoop) -> Iterator[None]:
    """The clock of sampling is the loop's."""
    with mock.patch.object(_clock, "time", SimpleNamespace(monotonic=loop.time)):
        yield


class Engine:
    """One node: all requests in service get the same, and the more there are the more they get
    together, `peak * n / (n + half)` tokens a second."""

    def __init__(self, loop: VirtualLoop, peak: float, half: float) -> None:
        self._loop, self._peak, self._half = loop, peak, half
        self.alive = True
        self.served = 0
        self._work = self._updated = 0.0
        self._serial = itertools.count()
        self._requests: list[tuple[float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, tokens: int) -> asyncio.Future[None]:
        """Resolves when the tokens were sampled; raises where the node died before."""
        self._advance()
        done = self._loop.create_future()
        heapq.heappush(self._requests, (self._work + tokens, next(self._serial), done))
        self._wait()
        return done

    def cut_off(self) -> None:
        """Whatever is in service ends here."""
        self._advance()
        requests, self._requests = self._requests, []
        for *_, done in requests:
            if not done.done():
                done.set_exception(SamplingError("connection reset", kind="connection"))
        self._wait()

    def _pace(self) -> float:
        return self._peak / (len(self._requests) + self._half)

    def _advance(self) -> None:
        self._work += (self._loop.now - self._updated) * self._pace()
        self._updated = self._loop.now

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._requests:
            seconds = (self._requests[0][0] - self._work) / self._pace()
            self._timer = self._loop.call_at(self._loop.now + max(0.0, seconds), self._serve)

    def _serve(self) -> None:
        self._timer = None
        self._advance()
        while self._requests and self._requests[0][0] <= self._work + 1e-6:
            *_, done = heapq.heappop(self._requests)
            if not done.done():
                done.set_result(None)
                self.served += 1
        self._wait()


@dataclass(frozen=True, slots=True)
class Outage:
    """Nodes that are away for a while."""

    start: float
    end: float
    nodes: range


@dataclass(slots=True)
class Cluster:
    """A `Sampler` over all nodes: each request goes to one at random of those that are in rotation.

    A node that died stays in rotation for `notice_seconds`, and refuses connections.
    """

    nodes: int = 100
    peak: float = 24_000.0
    """Tokens per second of a node with endlessly many requests: with 500 it has 15,000, 30 each."""
    half: float = 300.0
    mean_tokens: int = 2000
    sigma: float = 0.5
    """Of the lognormal lengths."""
    outages: Sequence[Outage] = ()
    notice_seconds: float = 10.0
    head_seconds: float = 0.0
    """For which a reply keeps the thread of the head's loop busy."""
    refused: int = field(default=0, init=False)
    engines: list[Engine] = field(default_factory=list, init=False)
    _rotation: list[Engine] = field(default_factory=list, init=False)
    _replies: list[Completion] = field(default_factory=list, init=False)
    _random: random.Random = field(default_factory=lambda: random.Random(0), init=False)
    _loop: VirtualLoop = field(init=False)

    def start(self, loop: VirtualLoop) -> None:
        """Nodes begin, with what is to happen to them."""
        assert all(outage.nodes.stop <= self.nodes for outage in self.outages)
        self._loop = loop
        self.engines = [Engine(loop, self.peak, self.half) for _ in range(self.nodes)]
        self._rotation = list(self.engines)
        self._replies = [_reply(tokens) for tokens in self.lengths()]
        for outage in self.outages:
            loop.call_at(outage.start, self._lose, outage)
            loop.call_at(outage.end, self._regain, outage)

    def cut_off(self) -> None:
        """The head is gone: nobody waits for what is in service."""
        for engine in self.engines:
            engine.cut_off()

    def lengths(self) -> list[int]:
        """Of completions: equally likely ones."""
        rng = random.Random(1)
        drawn = [rng.lognormvariate(0.0, self.sigma) for _ in range(1024)]
        return [
            max(1, round(self.mean_tokens * value * len(drawn) / sum(drawn))) for value in drawn
        ]

    def tokens_per_second(self, in_flight: int) -> float:
        """Of all nodes together, with so many requests evenly over them."""
        each = in_flight / self.nodes
        return self.nodes * self.peak * each / (each + self.half)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        assert seed is not None
        reply = self._replies[seed % len(self._replies)]
        engine = self._random.choice(self._rotation)
        if not engine.alive:
            self.refused += 1
            await asyncio.sleep(ROUND_TRIP)
            raise SamplingError("connection refused", kind="connection")
        await engine.begin(len(reply.token_ids))
        self._loop.spend(self.head_seconds)
        return reply

    async def aclose(self) -> None:
        """Nothing is held."""

    def _lose(self, outage: Outage) -> None:
        for number in outage.nodes:
            self.engines[number].alive = False
            self.engines[number].cut_off()
        self._loop.call_later(self.notice_seconds, self._rotate)

    def _regain(self, outage: Outage) -> None:
        for number in outage.nodes:
            self.engines[number].alive = True
        self._rotate()

    def _rotate(self) -> None:
        # Where all are away, the router goes on asking them.
        self._rotation = [engine for engine in self.engines if engine.alive] or list(self.engines)


def _reply(tokens: int) -> Completion:
    """Arrays, so that a copy of them costs nothing to speak of: what tokens cost is `spend`t."""
    ids: Any = array("i", [1]) * tokens
    logprobs: Any = array("f", [-0.5]) * tokens
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop", text="4")


class PlainTokenizer:
    """Reads every completion as it is."""

    name = "simulated"
    tokenizer = SimpleNamespace(chat_template=None)

    def read(self, completion: Completion, *_: object) -> Completion:
        return completion

    def decode(self, token_ids: object) -> str:
        return "4"


@dataclass(slots=True)
class Store:
    """In the place of `JobStore`: keeps which completions are there, and loses what comes after
    `lost` was set, as a process does that is killed."""

    done: DoneIndex
    schema: pa.Schema = SCHEMA
    lost: bool = False
    rows: int = 0

    def append(self, batch: pa.RecordBatch) -> None:
        if not self.lost:
            self.done.add(row_keys(batch, None), failed_rows(batch))
            self.rows += batch.num_rows


def prompts(done: DoneIndex, count: int) -> Iterator[Prompt]:
    """As `Questions.prompts`, of a data set of so many rows."""
    ids = np.array(PROMPT, np.int32)
    for number in range(count):
        samples = done.missing(number, retry_failed=False)
        if samples:
            row = CompletionRow(
                row_id=f"data-{number}", data_idx=number, sample_idx=0, prompt="", prompt_ids=ids,
                max_tokens=8192,
            )  # fmt: skip
            yield Prompt(row, PROMPT, samples, derive_seeds(0, str(number), N))


@dataclass(slots=True)
class Head:
    """What a run cost and came to."""

    seconds: float = 0.0
    completions: int = 0
    tokens: int = 0
    attempts: int = 0
    failed: int = 0
    busy: float = 0.0
    """Seconds for which the loop's thread was busy, as far as `spend` knows."""
    thread_cpu: float = 0.0
    """Real seconds of CPU that rows took on their way into the store."""
    most_in_flight: int = 0
    most_tasks: int = 0
    ends: list[float] = field(default_factory=list)
    """When each hundredth completion came. Of the loop: the clock of sampling stands still for one
    that is busy."""

    def add(self, event: AttemptEvent) -> None:
        self.attempts += 1
        self.most_in_flight = max(self.most_in_flight, event.in_flight + 1)
        if event.attempt.kind is None:
            self.completions += 1
            self.tokens += event.attempt.tokens
            if self.completions % 100 == 0:
                self.ends.append(asyncio.get_running_loop().time())


def simulate(
    cluster: Cluster,
    completions: int,
    limit: Callable[[], ConcurrencyLimit],
    *,
    highest: int,
    append_seconds: float = 0.003,
    row_seconds: float = 0.0004,
    dies_at: Iterable[float] = (),
    restart_seconds: float = 60.0,
    watch: Callable[[], None] | None = None,
) -> Head:
    """A job from its beginning to its end.

    Args:
        highest: most requests in flight.
        append_seconds, row_seconds: that storing rows takes the thread which does it: whatever
            they are, and each of them.
        dies_at: when the process of the run is killed (seconds). It begins again after
            `restart_seconds`.
        watch: called about every 10 s of the simulated run.
    """
    random.seed(0)
    head = Head()
    done = DoneIndex(completions // N, N)

    def seconds_of(args: tuple[Any, ...]) -> float:
        return append_seconds + sum(len(rows) for rows in args) * row_seconds

    loop = VirtualLoop(seconds_of)
    with simulated_time(loop), asyncio.Runner(loop_factory=lambda: loop) as runner:
        cluster.start(loop)
        for death in (*dies_at, math.inf):
            store = Store(done)
            run = SamplingRun(
                sampler=cluster,
                tokenizer=PlainTokenizer(),  # type: ignore[arg-type]
                request=REQUEST,
                store=store,  # type: ignore[arg-type]
                retry=RetryPolicy(),
                limit=limit(),
                highest=highest,
                on_stored=lambda rows: None,
                observe=head.add,
                fresh=not done.done,
            )
            if runner.run(_until(run, store, death, head, completions, watch)):
                break
            cluster.cut_off()
            runner.run(asyncio.sleep(restart_seconds))
    head.seconds, head.busy, head.thread_cpu = loop.now, loop.busy, loop.thread_cpu
    head.failed = done.failed
    assert done.done + done.failed == completions
    return head


async def _until(
    run: SamplingRun,
    store: Store,
    death: float,
    head: Head,
    completions: int,
    watch: Callable[[], None] | None,
) -> bool:
    """Whether the job was done before it was killed."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run.run(prompts(store.done, completions // N)))

    async def watching() -> None:
        while True:
            head.most_tasks = max(head.most_tasks, len(asyncio.all_tasks()))
            if watch is not None:
                watch()
            await asyncio.sleep(10)

    watcher = asyncio.ensure_future(watching())
    try:
        await asyncio.wait([task], timeout=None if death == math.inf else death - loop.time())
    finally:
        watcher.cancel()
    if task.done():
        task.result()
        return True
    store.lost = True
    task.cancel()
    await asyncio.wait([task])
    return False
