"""Rewards on their way to the disk.

Invariant: what `add` was given is on disk after one wait for the disk, not when the next result
comes: a judge may take minutes for that. However the block ends, all of it is stored.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.grading.grade import Graded
from eval_protocol_rft.batch.grading.reward_files import SCORES
from eval_protocol_rft.batch.grading.views import Place
from eval_protocol_rft.batch.store.parts import PartStore
from eval_protocol_rft.record import CompletionResult

Result = tuple[Place, CompletionResult]


class GradedStore:
    """Stores results from a thread of its own, many with one wait. A context manager.

    Args:
        store: of rows like `SCORES`.
        on_stored: called in that thread with how many were stored so far.

    Raises:
        OSError: from `add` or at the end: the disk is full or failed.
    """

    def __init__(self, store: PartStore, *, on_stored: Callable[[int], None]) -> None:
        self._store = store
        self._on_stored = on_stored
        self._queue: queue.SimpleQueue[Graded | None] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(1, "rewards-store")
        self._writing: Future[int] = self._executor.submit(self._write)
        self.count = 0
        """Results stored; known at the end."""

    def add(self, graded: Graded) -> None:
        self._queue.put(graded)
        if self._writing.done():
            self._writing.result()

    def __enter__(self) -> GradedStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._executor.shutdown()
        self.count = self._writing.result()

    def _write(self) -> int:
        count = 0
        more = True
        while more:
            taken = [self._queue.get()]
            while not self._queue.empty():
                taken.append(self._queue.get_nowait())
            more = taken[-1] is not None
            results = [
                result
                for graded in taken
                if graded is not None
                for result in zip(graded.key, graded.results, strict=True)
            ]
            if results:
                self._store.append(_batch(results))
                count += len(results)
                self._on_stored(count)
        return count


def _batch(results: Sequence[Result]) -> pa.RecordBatch:
    """Results as rows of `SCORES`."""
    said = [result for _, result in results]
    metrics = [msgspec.json.encode(r.metrics).decode() if r.metrics else None for r in said]
    columns = [
        [place[0] for place, _ in results],
        [place[1] for place, _ in results],
        [result.score for result in said],
        [result.reason for result in said],
        metrics,
        [result.error for result in said],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCORES)
