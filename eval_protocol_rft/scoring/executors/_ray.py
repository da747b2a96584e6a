"""Scoring on a Ray cluster: one actor per node, each with workers of its own.

Invariant: as for `score_items`: every item comes back exactly once, scored by the same workers with
the same time limit. An item whose node is lost is scored again elsewhere; it comes back unscored if
that happens to it again and again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator, load_evaluator
from eval_protocol_rft.scoring.executors._messages import (
    ScoredItem,
    ScoringError,
    ScoringItem,
    all_unscored,
)
from eval_protocol_rft.scoring.executors._pool import Pool, score_items
from eval_protocol_rft.scoring.executors._ray_nodes import (
    EAGER_SECONDS,
    Node,
    NodeActor,
    NodeActors,
    Work,
)

MOST_LOSSES = 3
"""So many nodes are lost under an item before it is taken for the reason."""
_QUEUED_PER_WORKER = 1
"""Items that wait at a node, so that no worker waits for the way to the driver and back."""


def score_items_on_ray(
    items: Iterable[ScoringItem],
    evaluator: LoadedEvaluator,
    *,
    address: str | None = None,
    workers: int | None = None,
    timeout: float | None = 60.0,
    max_concurrency: int = 96,
) -> Generator[ScoredItem, None, None]:
    """`score_items`, on all nodes of a cluster.

    The evaluator's file has to be on every node at the same path, with the same contents.

    Args:
        items, evaluator, timeout: as for `score_items`.
        address: see `NodeActors`.
        workers: processes per node for a sync evaluator. None: as many as the node has CPUs.
        max_concurrency: calls of an async evaluator in flight, over all nodes.

    Raises:
        RayEngineError: Ray is not installed, there is no cluster, or a node cannot load the
            evaluator.
        ScoringError, ValueError: as for `score_items`.
    """
    # Checks the options; nothing runs until the first result is asked for.
    score_items(
        (), evaluator, workers=workers, timeout=timeout, max_concurrency=max_concurrency
    ).close()

    def work(node: Node) -> Work:
        limits = {"spec": evaluator.spec, "fingerprint": evaluator.fingerprint, "timeout": timeout}
        arguments = {**limits, "cwd": os.getcwd()}
        if evaluator.is_async:
            own = {**arguments, "calls": max_concurrency}
            return Work(LoopScorer, own, cpus=1, calls=max_concurrency)
        size = node.cpus if workers is None else workers
        queued = size * _QUEUED_PER_WORKER
        return Work(PoolScorer, {**arguments, "workers": size}, size, calls=size, queued=queued)

    return _Run(NodeActors(address, work), max_concurrency if evaluator.is_async else None).run(
        iter(items)
    )


@dataclass(frozen=True, slots=True)
class _Sent:
    """An item that is at a node."""

    item: ScoringItem
    losses: int
    """Nodes that were lost under it before."""
    actor: NodeActor
    answer: Future[ScoredItem]


class _Run:
    """Items, and where they are. All on the caller's thread."""

    def __init__(self, actors: NodeActors, most: int | None) -> None:
        self._actors = actors
        self._most = most
        """Calls in flight; None: as many as the actors have room for."""
        self._in_flight = 0
        self._again: deque[tuple[ScoringItem, int]] = deque()
        self._done: queue.SimpleQueue[_Sent] = queue.SimpleQueue()

    def run(self, items: Iterator[ScoringItem]) -> Generator[ScoredItem, None, None]:
        try:
            self._actors.connect()
            while self._fill(items) or self._in_flight:
                try:
                    # Not for good: nodes may have joined or become ready.
                    sent = self._done.get(timeout=EAGER_SECONDS)
                except queue.Empty:
                    continue
                scored = self._take(sent)
                if scored is not None:
                    yield scored
        finally:
            self._actors.close()

    def _fill(self, items: Iterator[ScoringItem]) -> bool:
        """Hand out what there is room for; whether there may be more."""
        while self._most is None or self._in_flight < self._most:
            actor = self._actors.free()
            if actor is None:
                return True
            if self._again:
                item, losses = self._again.popleft()
            elif (following := next(items, None)) is not None:
                item, losses = following, 0
            else:
                return False
            self._send(item, losses, actor)
        return True

    def _send(self, item: ScoringItem, losses: int, actor: NodeActor) -> None:
        answer = actor.handle.score.remote(item.views).future()
        sent = _Sent(item, losses, actor, answer)
        actor.busy += 1
        self._in_flight += 1
        answer.add_done_callback(lambda _: self._done.put(sent))

    def _take(self, sent: _Sent) -> ScoredItem | None:
        """What became of an item; None: it has to be scored again."""
        sent.actor.busy -= 1
        self._in_flight -= 1
        try:
            scored = sent.answer.result()
        except ScoringError as error:
            # Ray's error is of that type too, and its message a traceback.
            raise ScoringError(str(getattr(error, "cause", error))) from None
        except self._actors.gone as error:
            self._actors.lost(sent.actor)
            if sent.losses + 1 < MOST_LOSSES:
                self._again.append((sent.item, sent.losses + 1))
                return None
            how = f"its Ray node was lost {MOST_LOSSES} times ({type(error).__name__})"
            return all_unscored(sent.item, how, 0.0)
        return dataclasses.replace(scored, key=sent.item.key)


@dataclass(slots=True)
class _RayScorer:
    """What the actors have in common."""

    spec: str
    fingerprint: str
    timeout: float | None
    cwd: str

    def load(self) -> LoadedEvaluator:
        os.chdir(self.cwd)
        loaded = load_evaluator(self.spec)
        if loaded.fingerprint != self.fingerprint:
            raise ScoringError(f"{self.spec} is not the same file as where the run was started")
        return loaded


@dataclass(slots=True)
class PoolScorer(_RayScorer):
    """Scores with a sync evaluator. Each of its threads has a worker process."""

    workers: int
    _pools: Any = None

    def ready(self) -> None:
        loaded = self.load()
        self._pools = queue.SimpleQueue[Pool]()
        for _ in range(self.workers):
            self._pools.put(Pool(loaded, 1, self.timeout))

    def score(self, views: tuple[bytes, ...]) -> ScoredItem:
        pool: Pool = self._pools.get()
        try:
            (scored,) = pool.run(iter([ScoringItem(None, views)]))
        finally:
            self._pools.put(pool)
        return scored


@dataclass(slots=True)
class LoopScorer(_RayScorer):
    """Scores with an async evaluator, all calls in the event loop of one worker process. A thread
    of the actor's own has the pool; its items' keys are what callers wait for."""

    calls: int
    _asked: queue.SimpleQueue[ScoringItem] = field(default_factory=queue.SimpleQueue)
    _pool: Any = None

    async def ready(self) -> None:
        self._pool = Pool(self.load(), 1, self.timeout, self.calls)
        threading.Thread(target=self._serve, name="scoring", daemon=True).start()

    async def score(self, views: tuple[bytes, ...]) -> ScoredItem:
        answer = Future[ScoredItem]()
        self._asked.put(ScoringItem(answer, views))
        self._pool.ring()
        return await asyncio.wrap_future(answer)

    def _serve(self) -> None:
        waiting: set[Future[ScoredItem]] = set()
        while True:
            item = self._asked.get()
            try:
                for scored in self._pool.run(_Arrivals(item, self._asked, waiting)):
                    waiting.discard(scored.key)
                    scored.key.set_result(dataclasses.replace(scored, key=None))
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                for answer in waiting:
                    answer.set_exception(ScoringError(str(error)))
                waiting.clear()


@dataclass(slots=True)
class _Arrivals:
    """Items that are there now: an iterator that may end and have more later."""

    first: ScoringItem | None
    asked: queue.SimpleQueue[ScoringItem]
    waiting: set[Future[ScoredItem]]

    def __iter__(self) -> _Arrivals:
        return self

    def __next__(self) -> ScoringItem:
        item, self.first = self.first, None
        if item is None:
            try:
                item = self.asked.get_nowait()
            except queue.Empty:
                raise StopIteration from None
        self.waiting.add(item.key)
        return item
