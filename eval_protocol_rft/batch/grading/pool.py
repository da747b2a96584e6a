"""Sync evaluators in worker processes, which may hang or die without harm to others.

Invariant: every item gets one `Graded`, whatever becomes of the workers. An item is in one worker
at a time, and each worker has a channel of its own, so a death says which item it was. It is held
against that item only where the worker had run nothing else: what an earlier call left behind (a
thread, a child that kills, an alarm) costs no later one, which a new worker is given instead.

A pool of our own: `concurrent.futures` gives up all items at the first death, and pebble loses
the item of an evaluator that ends its process with exit code 0, and has its workers share a lock.
"""

from __future__ import annotations

import atexit
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from eval_protocol_rft.batch.grading.channel import RubbishError
from eval_protocol_rft.batch.grading.evaluators import LoadedEvaluator
from eval_protocol_rft.batch.grading.items import (
    Graded,
    GradingError,
    GradingItem,
    all_unscored,
    late,
)
from eval_protocol_rft.batch.grading.process import WorkerProcess, in_words
from eval_protocol_rft.batch.grading.worker import Answer, Ended, Ready, Setup

GOODBYE_SECONDS = 2.0
"""How long workers without work may take to end: time for exit handlers, no more."""
MOST_FAILED_STARTS = 3
"""So many workers may die one after the other while they load what others have loaded."""


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
            spec=os.fsencode(evaluator.spec),
            fingerprint=evaluator.fingerprint,
            cwd=os.fsencode(Path.cwd()),
            environ=dict(os.environb),
            path=[os.fsencode(folder) for folder in sys.path],
            argv=[os.fsencode(argument) for argument in sys.argv],
        )
        self._workers: set[WorkerProcess] = set()
        self._events = selectors.DefaultSelector()
        self._waiting: deque[GradingItem] = deque()
        """Read, and in no worker: never more than there may be workers."""
        self._suspects: deque[GradingItem] = deque()
        """Their worker died, and had run others before them."""
        self._failed_starts: int | None = None
        """In a row; None: no worker has loaded the evaluator yet."""

    def run(self, items: Iterator[GradingItem]) -> Iterator[Graded]:
        """Grade all items, in the order in which they finish."""
        while True:
            self._fill(items)
            busy = sum(worker.item is not None for worker in self._workers)
            wanted = busy + len(self._waiting) + len(self._suspects)
            if not wanted:
                return
            self._make_room(wanted)
            self._hand_out()
            for worker in self._next_events():
                yield from self._attend(worker)
            yield from self._give_up_late_ones()

    def say_goodbye(self) -> None:
        """Let workers that have nothing left to do end by themselves."""
        idle = [worker for worker in self._workers if worker.is_ready]
        for worker in idle:
            worker.let_go()
        deadline = time.monotonic() + GOODBYE_SECONDS
        for worker in idle:
            worker.wait(max(0.0, deadline - time.monotonic()))

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

    def _make_room(self, wanted: int) -> None:
        """As many workers as there is work for; for a suspect, one that has run nothing."""
        while len(self._workers) < min(self._size, wanted):
            self._add_worker()
        if self._suspects and all(worker.answered for worker in self._workers):
            idle = [worker for worker in self._workers if worker.item is None]
            if len(self._workers) == self._size and idle:
                self._remove(idle[0])
            if len(self._workers) < self._size:
                self._add_worker()

    def _add_worker(self) -> None:
        worker = WorkerProcess(self._setup)
        self._workers.add(worker)
        self._events.register(worker.channel, selectors.EVENT_READ, worker)
        # As well as the channel, which a process that the evaluator forked may keep open.
        self._events.register(worker.life, selectors.EVENT_READ, worker)

    def _remove(self, worker: WorkerProcess) -> int | None:
        self._workers.discard(worker)
        self._events.unregister(worker.channel)
        self._events.unregister(worker.life)
        worker.kill()
        return worker.bury()

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.is_ready and worker.item is None:
                if self._suspects and not worker.answered:
                    worker.give(self._suspects.popleft())
                elif self._waiting:
                    worker.give(self._waiting.popleft())

    def _next_events(self) -> set[WorkerProcess]:
        """Wait until a worker says something or dies, or an item's time is up."""
        for worker in self._workers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.has_unsent else 0)
            if self._events.get_key(worker.channel).events != wanted:
                self._events.modify(worker.channel, wanted, worker)
        seconds = None
        busy = [worker.began for worker in self._workers if worker.item is not None]
        if busy and self._timeout is not None:
            seconds = max(0.0, min(busy) + self._timeout - time.monotonic())
        return {key.data for key, _ in self._events.select(seconds)}

    def _attend(self, worker: WorkerProcess) -> Iterator[Graded]:
        worker.send()
        try:
            message, item = worker.read(), worker.item
        except RubbishError:
            yield from self._lose(worker, "someone wrote into the channel of its answers")
            return
        match message:
            case None if worker.is_over:
                yield from self._lose(worker, None)
            case Ready() if not worker.is_ready:
                worker.is_ready = True
                self._failed_starts = 0
            case Answer(results, seconds) if item is not None and len(results) == len(item.views):
                worker.item = None
                worker.answered += 1
                yield Graded(item.key, results, seconds)
            case Ended(reason):
                raise GradingError(f"{self._name}: {reason}")

    def _lose(self, worker: WorkerProcess, why: str | None) -> Iterator[Graded]:
        """`why`: None where it died by itself."""
        item, seconds = worker.item, time.monotonic() - worker.began
        code = self._remove(worker)
        how = in_words(code) if why is None else why
        if item is not None and worker.answered:
            self._suspects.append(item)
        elif item is not None:
            yield all_unscored(item, f"the worker process died ({how})", seconds)
        elif not worker.is_ready:
            if self._failed_starts is not None:
                self._failed_starts += 1
            if self._failed_starts in (None, MOST_FAILED_STARTS):
                raise GradingError(
                    f"{self._name}: a worker process died while it loaded the evaluator ({how})"
                )

    def _give_up_late_ones(self) -> Iterator[Graded]:
        if self._timeout is None:
            return
        for worker in tuple(self._workers):
            if worker.item is None or time.monotonic() - worker.began < self._timeout:
                continue
            # An answer that came while the caller held us up is an answer.
            yield from self._attend(worker)
            item, seconds = worker.item, time.monotonic() - worker.began
            if item is not None and worker in self._workers:
                self._remove(worker)
                yield all_unscored(item, late(self._timeout), seconds)
