"""Grading stored completions: many calls of one evaluator, some of which hang, die or raise.

Invariant: every item comes back exactly once, with one result per view. What an evaluator does to
itself costs the item it was called for, which is then unscored (None, never 0.0) and says why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator

from eval_protocol_rft.scoring.executors._items import Graded, GradingItem
from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator
from eval_protocol_rft.scoring.executors._pool import grade_in_processes


def grade(
    items: Iterable[GradingItem],
    evaluator: LoadedEvaluator,
    *,
    workers: int | None = None,
    timeout: float | None = 60.0,
    max_concurrency: int = 96,
) -> Generator[Graded, None, None]:
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
        GradingError: a worker cannot load the evaluator (or finds its file changed), or the
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
    checked = _checked(items, evaluator)
    return grade_in_processes(
        checked,
        evaluator,
        workers=min(size, max_concurrency) if evaluator.is_async else size,
        timeout=timeout,
        max_concurrency=max_concurrency if evaluator.is_async else None,
    )


def _checked(items: Iterable[GradingItem], evaluator: LoadedEvaluator) -> Iterator[GradingItem]:
    for item in items:
        count = len(item.views)
        if not count or (count > 1 and evaluator.mode == "pointwise"):
            raise ValueError(
                f"item {item.key!r} has {count} views: a {evaluator.mode} evaluator takes "
                f"{'exactly one' if evaluator.mode == 'pointwise' else 'at least one'}"
            )
        yield item
