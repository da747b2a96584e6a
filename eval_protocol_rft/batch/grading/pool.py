"""Sync evaluators in worker processes, which may hang or die without harm to others.

Invariant: every item gets one `Graded`, whatever becomes of the workers. An item is in one worker
at a time, and each worker has a pipe of its own, so a death says which item it was and no other
item is lost or judged twice.

A pool of our own: `concurrent.futures` gives up all items at the first death, and pebble loses
the item of an evaluator that ends its process with exit code 0, and has its workers share a lock.
"""

from __future__ import annotations

import atexit
import os
import selectors
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from eval_protocol_rft.batch.grading.evaluators import LoadedEvaluator
from eval_protocol_rft.batch.grading.items import (
    Graded,
    GradingError,
    GradingItem,
    all_unscored,
    late,
)
from eval_protocol_rft.batch.grading.process import WorkerProcess, in_words, start_fork_server
from eval_protocol_rft.batch.grading.worker import Answer, Ended, Ready, Setup

GOODBYE_SECONDS = 2.0
"""How long workers without work may take to end: time for exit handlers, no more."""


def grade_in_processes(
    items: Iterable[GradingItem],
    evaluator: LoadedEvaluator,
    *,
    workers: int,
    timeout: float | None,
) -> Generator[Graded, None, None]:
    """Grade with a sync evaluator; see `grade`."""
    pool = Pool(evaluator, workers, timeout)
    # Ours runs before multiprocessing's own, which would wait for the workers forever.
    atexit.register(pool.kill)
    try:
        yield from pool.run(iter(items))
        pool.say_goodbye()
    finally:
        pool.kill()
        atexit.unregister(pool.kill)


class Pool:
    """Workers, and the items that are here. All on the caller's thread."""

    def __init__(self, evaluator: LoadedEvaluator, size: int, timeout: float | None) -> None:
        self._name = evaluator.name
        self._size = size
        self._timeout = timeout
        self._setup = Setup(
            spec=evaluator.spec,
            fingerprint=evaluator.fingerprint,
            cwd=str(Path.cwd()),
            environ=dict(os.environ),
        )
        self._workers: set[WorkerProcess] = set()
        self._events = selectors.DefaultSelector()
        self._waiting: deque[GradingItem] = deque()
        """Read, and in no worker: never more than there may be workers."""

    def run(self, items: Iterator[GradingItem]) -> Iterator[Graded]:
        """Grade all items, in the order in which they finish."""
        start_fork_server()
        while True:
            self._fill(items)
            busy = sum(worker.item is not None for worker in self._workers)
            if not busy and not self._waiting:
                return
            while len(self._workers) < min(self._size, busy + len(self._waiting)):
                self._add_worker()
            self._hand_out()
            for worker in self._next_events():
                yield from self._attend(worker)
            yield from self._give_up_late_ones()

    def say_goodbye(self) -> None:
        """Let workers that have nothing left to do end by themselves."""
        idle = [worker for worker in self._workers if worker.is_ready]
        for worker in idle:
            worker.connection.close()
        deadline = time.monotonic() + GOODBYE_SECONDS
        for worker in idle:
            worker.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End all workers at once. May be called again."""
        self._events.close()
        for worker in self._workers:
            worker.kill()
        while self._workers:
            self._workers.pop().bury()

    def _fill(self, items: Iterator[GradingItem]) -> None:
        while len(self._waiting) < self._size and (item := next(items, None)) is not None:
            self._waiting.append(item)

    def _add_worker(self) -> None:
        worker = WorkerProcess(self._setup)
        self._workers.add(worker)
        self._events.register(worker.connection, selectors.EVENT_READ, worker)
        # As well as the pipe, which a process that the evaluator forked may keep open.
        self._events.register(worker.process.sentinel, selectors.EVENT_READ, worker)

    def _remove(self, worker: WorkerProcess) -> int | None:
        self._workers.discard(worker)
        self._events.unregister(worker.connection)
        self._events.unregister(worker.process.sentinel)
        worker.kill()
        return worker.bury()

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.is_ready and worker.item is None:
                item = self._waiting.popleft()
                if not worker.give(item):
                    self._waiting.appendleft(item)

    def _next_events(self) -> set[WorkerProcess]:
        """Wait until a worker says something or dies, or an item's time is up."""
        seconds = None
        busy = [worker.began for worker in self._workers if worker.item is not None]
        if busy and self._timeout is not None:
            seconds = max(0.0, min(busy) + self._timeout - time.monotonic())
        return {key.data for key, _ in self._events.select(seconds)}

    def _attend(self, worker: WorkerProcess) -> Iterator[Graded]:
        message, item = worker.read(), worker.item
        match message:
            case Ready():
                worker.is_ready = True
            case Answer(results, seconds) if item is not None:
                worker.item = None
                yield Graded(item.key, results, seconds)
            case Ended(reason):
                raise GradingError(f"{self._name}: {reason}")
            case _:
                how = in_words(self._remove(worker))
                if item is not None:
                    seconds = time.monotonic() - worker.began
                    yield all_unscored(item, f"the worker process died ({how})", seconds)
                elif not worker.is_ready:
                    raise GradingError(
                        f"{self._name}: a worker process died while it loaded the evaluator ({how})"
                    )

    def _give_up_late_ones(self) -> Iterator[Graded]:
        if self._timeout is None:
            return
        for worker in tuple(self._workers):
            item, seconds = worker.item, time.monotonic() - worker.began
            # An answer that came while the caller held us up is an answer.
            if item is not None and seconds >= self._timeout and not worker.connection.poll():
                self._remove(worker)
                yield all_unscored(item, late(self._timeout), seconds)
