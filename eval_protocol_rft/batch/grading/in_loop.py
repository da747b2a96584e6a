"""Async evaluators: all in one event loop, on a thread of its own.

Invariant: every item gets one `Graded`, and at most `max_concurrency` calls are in flight. When
the caller stops early, the calls in flight are cancelled before the thread ends.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING

from eval_protocol_rft.batch.grading.evaluators import LoadedEvaluator
from eval_protocol_rft.batch.grading.items import (
    Graded,
    GradingError,
    GradingItem,
    all_unscored,
    late,
)
from eval_protocol_rft.sampling.clock import Deadline

if TYPE_CHECKING:
    from eval_protocol_rft.batch.grading.call import Judge

GOODBYE_SECONDS = 5.0
"""How long cancelled calls may take to end before their thread is left behind."""


def grade_in_loop(
    items: Iterable[GradingItem],
    evaluator: LoadedEvaluator,
    *,
    max_concurrency: int,
    timeout: float | None,
) -> Generator[Graded, None, None]:
    """Grade with an async evaluator; see `grade`."""
    import pytest

    from eval_protocol_rft.batch.grading.call import Judge

    judge = Judge.of(evaluator)
    done: queue.SimpleQueue[Future[Graded]] = queue.SimpleQueue()
    in_flight = 0
    source = iter(items)
    with _LoopThread() as thread:
        while True:
            for item in islice(source, max_concurrency - in_flight):
                future = asyncio.run_coroutine_threadsafe(
                    grade_one(item, judge, timeout), thread.loop
                )
                future.add_done_callback(done.put)
                in_flight += 1
            if not in_flight:
                return
            try:
                graded = done.get().result()
            except pytest.exit.Exception as error:
                raise GradingError(
                    f"{evaluator.name}: the evaluator ended the run: {error}"
                ) from error
            in_flight -= 1
            yield graded


async def grade_one(item: GradingItem, judge: Judge, limit: float | None) -> Graded:
    began = time.monotonic()
    try:
        async with Deadline(limit):  # a call that blocks the loop makes no other late
            results = await judge.judge_async(item.views)
    except TimeoutError:
        # Only ours gets here: one that the evaluator raised is a result by now.
        return all_unscored(item, late(limit), time.monotonic() - began)
    return Graded(item.key, results, time.monotonic() - began)


class _LoopThread:
    """An event loop running on a daemon thread, from `with` to the end of the block."""

    def __enter__(self) -> _LoopThread:
        self.loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="grading", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(GOODBYE_SECONDS)

    def _run(self) -> None:
        # On leaving, the runner cancels what is in flight and waits for it.
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._until_the_end())

    async def _until_the_end(self) -> None:
        await self._end.wait()
