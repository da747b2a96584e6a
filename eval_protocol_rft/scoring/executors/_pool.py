"""Scoring stored completions in worker processes: many calls of one evaluator, some of which hang,
die or raise, without harm to others.

Invariant: every item comes back exactly once, with one result per view. What an evaluator does to
itself costs the item that it was called for, which is then unscored (None, never 0.0) and says why.
Each worker has a channel of its own, so a death says which calls it was in. It is held against a
call only where the worker had run nothing else: what an earlier call left behind (a thread, a child
that kills, an alarm), or a call beside it, costs no other one. Such a call is made again: with
others if another one's code ran when the worker died, and alone, in a new worker, if it was its own
or it happens once more.

A pool of our own: `concurrent.futures` gives up all items at the first death, and pebble loses
the item of an evaluator that ends its process with exit code 0, and has its workers share a lock.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from eval_protocol_rft.scoring.executors import _messages
from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator
from eval_protocol_rft.scoring.executors._messages import ScoredItem, ScoringError, ScoringItem
from eval_protocol_rft.scoring.executors._process import Call, WorkerProcess, in_words

GOODBYE_SECONDS = 2.0
"""How long workers without work, and async calls that are cancelled, may take to end."""
MOST_FAILED_STARTS = 3
"""So many workers may die one after the other while they load what others have loaded."""
SILENT_TIMEOUTS = 1.5
"""A worker whose event loop says nothing for so many times the time of a call is blocked."""
_CHUNK = 1 << 12


def score_items(
    items: Iterable[ScoringItem],
    evaluator: LoadedEvaluator,
    *,
    workers: int | None = None,
    timeout: float | None = 60.0,
    max_concurrency: int = 96,
) -> Generator[ScoredItem, None, None]:
    """Call `evaluator` once per item, many at a time.

    The evaluator runs in worker processes, each of which loads it once and is replaced when a
    call takes too long or ends the process. Ended with a worker is all that its evaluator started
    (where there is no /proc: as far as it stayed in the worker's process group). A call whose
    worker dies is made once more, in a new worker, where the old one had run other calls before,
    for one of those may have been the reason. Workers are forked from a server process that
    outlives them and ends with this one; they import nothing of a script that calls this. POSIX
    only.

    Calls of an async evaluator run beside each other in the event loop of one worker (of several
    if you ask for them), so what its module holds, a client or a semaphore, is one for all. Where
    the worker dies, or a call blocks its loop for longer than `timeout`, the calls in flight are
    made again: with each other, but the one whose code ran, and what meets a second such end,
    alone in a worker of its own. So a call may be made three times before it has a result.

    Items are read on the calling thread, as results are taken: no more than two per worker, or
    `max_concurrency`, are read and not yet given back (and what is to be made again). Closing the
    generator ends all calls; async ones are cancelled and have a moment to clean up.

    Args:
        items: one call each. `key` may be anything.
        evaluator: from `load_evaluator`; a worker loads it again by its spec.
        workers: processes. None: as many as there are processors; for an async evaluator, one.
        timeout: seconds one call may take, from when a worker has the item; None: any time.
            A pause of the caller between two results is not held against a call that ended
            meanwhile.
        max_concurrency: calls of an async evaluator in flight, over all workers.

    Yields:
        Items as they finish, in any order.

    Raises:
        ScoringError: a worker cannot load the evaluator (or finds its file changed), or the
            evaluator called `pytest.exit`.
        ValueError: an option is out of range, or an item has no view, or several for a pointwise
            evaluator.
    """
    size = workers
    if size is None:
        size = 1 if evaluator.is_async else os.cpu_count() or 1
    if size < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout must be finite and above 0 seconds, or None; got {timeout}")
    pool = Pool(
        evaluator,
        min(size, max_concurrency) if evaluator.is_async else size,
        timeout,
        max_concurrency if evaluator.is_async else None,
    )
    return _run(pool, _checked(items, evaluator))


def _run(pool: Pool, items: Iterator[ScoringItem]) -> Generator[ScoredItem, None, None]:
    # Ours runs before multiprocessing's own, which would wait for the workers forever.
    atexit.register(pool.kill)
    try:
        yield from pool.run(lambda: next(items, None))
        pool.say_goodbye()
    finally:
        try:
            if pool.is_async:
                pool.say_goodbye()
        finally:
            pool.kill()
            atexit.unregister(pool.kill)


def _checked(items: Iterable[ScoringItem], evaluator: LoadedEvaluator) -> Iterator[ScoringItem]:
    for item in items:
        count = len(item.views)
        if not count or (count > 1 and evaluator.mode == "pointwise"):
            raise ValueError(
                f"item {item.key!r} has {count} views: a {evaluator.mode} evaluator takes "
                f"{'exactly one' if evaluator.mode == 'pointwise' else 'at least one'}"
            )
        yield item


class Pool:
    """Workers, and the items that are here. All on the caller's thread.

    Args:
        size: workers. For calls that are made alone there may be as many again where workers have
            several calls at a time.
        max_concurrency: calls in flight over all workers; None: one per worker.
    """

    def __init__(
        self,
        evaluator: LoadedEvaluator,
        size: int,
        timeout: float | None,
        max_concurrency: int | None = None,
    ) -> None:
        self._name = evaluator.name
        self._size = size
        self._most = max_concurrency or size
        self._each = -(-self._most // size)
        self._spare = size if self._each > 1 else 0
        self._ahead = 0 if max_concurrency else size
        """Items that may be here beside those in flight."""
        self.is_async = evaluator.is_async
        self._timeout = timeout
        self._silence = timeout
        """Seconds after which a worker with calls that says nothing is given up."""
        if timeout is not None and evaluator.is_async:
            self._silence = timeout * SILENT_TIMEOUTS
        self._setup = _messages.Setup(
            timeout=timeout,
            spec=os.fsencode(evaluator.spec),
            fingerprint=evaluator.fingerprint,
            cwd=os.fsencode(Path.cwd()),
            environ=dict(os.environb),
            path=[os.fsencode(folder) for folder in sys.path],
            argv=[os.fsencode(argument) for argument in sys.argv],
        )
        self._workers: set[WorkerProcess] = set()
        self._events = selectors.DefaultSelector()
        self._bell, self._bell_heard = socket.socketpair()
        for end in (self._bell, self._bell_heard):
            end.setblocking(False)
        self._events.register(self._bell_heard, selectors.EVENT_READ)
        self._waiting: deque[Call] = deque()
        """Read, and in no worker."""
        self._suspects: deque[Call] = deque()
        """To be made alone, in a new worker: one died that had run others too."""
        self._failed_starts: int | None = None
        """In a row; None: no worker has loaded the evaluator yet."""

    def run(self, take: Callable[[], ScoringItem | None]) -> Iterator[ScoredItem]:
        """Score all items, in the order in which they finish. `take` gives the next one, or None:
        there may be more later, as long as some are in flight; see `ring`."""
        while True:
            self._fill(take)
            if not self._in_flight + len(self._waiting) + len(self._suspects):
                return
            self._make_room()
            self._hand_out()
            for worker in self._next_events():
                yield from self._attend(worker)
            yield from self._give_up_silent_ones()

    def ring(self) -> None:
        """Have `run` look whether there are further items now. From any thread."""
        with contextlib.suppress(OSError):  # it has been rung often enough, or all is over
            self._bell.send(b"\0")

    def say_goodbye(self) -> None:
        """Let workers end by themselves: those without calls, and those that can cancel theirs."""
        able = [w for w in self._workers if w.is_ready and (self.is_async or not w.calls)]
        for worker in able:
            worker.let_go()
        deadline = time.monotonic() + GOODBYE_SECONDS
        for worker in able:
            worker.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End all workers at once. May be called again."""
        self._events.close()
        self._bell.close()
        self._bell_heard.close()
        for worker in self._workers:
            worker.kill()
        while self._workers:
            self._workers.pop().bury()

    @property
    def _in_flight(self) -> int:
        return sum(len(worker.calls) for worker in self._workers)

    def _fill(self, take: Callable[[], ScoringItem | None]) -> None:
        room = self._most + self._ahead - self._in_flight - len(self._waiting)
        while room > 0 and len(self._suspects) < self._most:
            item = take()
            if item is None:
                return
            self._waiting.append(Call(item))
            room -= 1

    def _make_room(self) -> None:
        """As many workers as there is work for; for a suspect, one that has run nothing."""
        wanted = min(self._size, self._in_flight + len(self._waiting) + len(self._suspects))
        while sum(not (w.is_alone and self._spare) for w in self._workers) < wanted:
            self._add_worker()
        idle = [worker for worker in self._workers if worker.is_ready and not worker.calls]
        if not self._suspects:
            for worker in idle[: max(0, len(self._workers) - self._size)]:
                self._remove(worker)
        elif not any(worker.is_fresh for worker in self._workers):
            if len(self._workers) >= self._size + self._spare and idle:
                self._remove(idle[0])
            if len(self._workers) < self._size + self._spare:
                self._add_worker()

    def _add_worker(self) -> None:
        worker = WorkerProcess(self._setup)
        self._workers.add(worker)
        self._events.register(worker.channel, selectors.EVENT_READ, worker)
        # As well as the channel, which a process that the evaluator forked may keep open.
        self._events.register(worker.life, selectors.EVENT_READ, worker)

    def _remove(self, worker: WorkerProcess) -> tuple[int | None, int]:
        self._workers.discard(worker)
        self._events.unregister(worker.channel)
        self._events.unregister(worker.life)
        worker.kill()
        return worker.bury()

    def _hand_out(self) -> None:
        free = self._most - self._in_flight
        most_alone = self._spare or self._size
        ready = [worker for worker in self._workers if worker.is_ready]
        for worker in ready:
            alone = sum(worker.is_alone for worker in self._workers)
            if self._suspects and worker.is_fresh and free > 0 and alone < most_alone:
                worker.is_alone = True
                worker.give(self._suspects.popleft())
                free -= 1
        shared = [worker for worker in ready if not worker.is_alone]
        while self._waiting and shared and free > 0:
            worker = min(shared, key=lambda worker: len(worker.calls))
            if len(worker.calls) >= self._each:
                return
            worker.give(self._waiting.popleft())
            free -= 1

    def _next_events(self) -> set[WorkerProcess]:
        """Wait until a worker says something or dies, or has been silent for too long."""
        for worker in self._workers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.has_unsent else 0)
            if self._events.get_key(worker.channel).events != wanted:
                self._events.modify(worker.channel, wanted, worker)
        seconds = None
        busy = [worker.seen for worker in self._workers if worker.calls]
        if busy and self._silence is not None:
            seconds = max(0.0, min(busy) + self._silence - time.monotonic())
        ready = {key.data for key, _ in self._events.select(seconds)}
        with contextlib.suppress(BlockingIOError):
            while self._bell_heard.recv(_CHUNK):
                pass
        return {worker for worker in ready if worker is not None}

    def _attend(self, worker: WorkerProcess) -> Iterator[ScoredItem]:
        worker.send()
        while worker in self._workers:
            try:
                received = worker.read()
            except _messages.RubbishError:
                why = "the worker process died (someone wrote into the channel of its answers)"
                yield from self._lose(worker, why)
                return
            if received is None:
                if worker.is_over:
                    yield from self._lose(worker, None)
                return
            number, message = received
            match message:
                case _messages.Ready():
                    worker.is_ready = True
                    self._failed_starts = 0
                case _messages.Answer(results, seconds, is_sound) if number in worker.calls:
                    item = worker.calls[number].item
                    if not is_sound and not worker.is_first(number):
                        yield from self._lose(worker, None, guilty=number)
                        return
                    if len(results) == len(item.views):
                        del worker.calls[number]
                        worker.is_alone = False
                        yield ScoredItem(item.key, results, seconds)
                    if not is_sound:
                        yield from self._lose(worker, None)
                        return
                case _messages.Ended(reason):
                    raise ScoringError(f"{self._name}: {reason}")

    def _lose(
        self, worker: WorkerProcess, why: str | None, guilty: int | None = None
    ) -> Iterator[ScoredItem]:
        """`why`: None where it died by itself. `guilty`: the call for which it is given up; None:
        the one whose code ran."""
        calls, now = worker.calls, time.monotonic()
        code, running = self._remove(worker)
        running = running if guilty is None else guilty
        how = in_words(code)
        for number, call in calls.items():
            call.losses += 1
            if worker.given == 1:
                error = why or f"the worker process died ({how})"
                yield _messages.all_unscored(call.item, error, now - call.began)
            elif self._each == 1 or number == running or call.losses > 1:
                self._suspects.append(call)
            else:
                self._waiting.appendleft(call)
        if not worker.is_ready:
            if self._failed_starts is not None:
                self._failed_starts += 1
            if self._failed_starts in (None, MOST_FAILED_STARTS):
                raise ScoringError(
                    f"{self._name}: a worker process died while it loaded the evaluator ({how})"
                )

    def _give_up_silent_ones(self) -> Iterator[ScoredItem]:
        if self._silence is None:
            return
        for worker in tuple(self._workers):
            if not worker.calls or time.monotonic() - worker.seen < self._silence:
                continue
            # An answer that came while the caller held us up is an answer.
            yield from self._attend(worker)
            silent = time.monotonic() - worker.seen >= self._silence
            if not (worker.calls and silent and worker in self._workers):
                continue
            if self.is_async:
                yield from self._lose(worker, _messages.late(self._timeout))
            else:
                ((_, call),) = worker.calls.items()
                self._remove(worker)
                yield _messages.all_unscored(
                    call.item, _messages.late(self._timeout), time.monotonic() - call.began
                )
