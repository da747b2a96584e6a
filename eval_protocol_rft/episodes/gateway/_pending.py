"""Calls that are being answered, and answers that no client has had yet.

Invariant: a client that sends a call again because its connection broke gets the completion that
was sampled for it, and not a second one; two calls alike at the same time are two calls.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from eval_protocol_rft.episodes.gateway._call import Reply


class PendingCall:
    """A call and its answer, which may be fetched again while no client has had it."""

    __slots__ = ("clients", "is_answered", "task")

    def __init__(self, task: asyncio.Future[Reply]) -> None:
        self.task = task
        self.clients = 0
        """Connections that wait for it now."""
        self.is_answered = False
        """Whether a client had all of it."""

    @contextlib.contextmanager
    def fetched(self) -> Iterator[None]:
        """A client waits for it."""
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    @property
    def is_interrupted(self) -> bool:
        """Whether its client went away without it."""
        return not self.clients and not self.is_answered and not self.has_failed

    @property
    def has_failed(self) -> bool:
        """Whether it ended without an answer."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class PendingCalls:
    """Those of one session, by what they ask."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, list[PendingCall]] = {}

    def begin(
        self, digest: bytes, answer: Callable[[], Awaitable[Reply]], *, is_retry: bool
    ) -> PendingCall:
        """The call that a request asks for again, or a new one.

        Args:
            digest: of the request, the same for the same bytes.
            answer: answers it.
            is_retry: whether the client says that it sends it again.
        """
        same = self._by_digest.setdefault(digest, [])
        found = next((one for one in same if one.is_interrupted), None)
        if found is None and is_retry and same and not same[-1].has_failed:
            found = same[-1]
        if found is None:
            found = PendingCall(asyncio.ensure_future(answer()))
            found.task.add_done_callback(_seen)
            same.append(found)
        return found

    @property
    def undelivered(self) -> int:
        """Answers that no client had whole."""
        return sum(one.is_interrupted for one in self.all())

    def all(self) -> list[PendingCall]:
        """In no order."""
        return [one for same in self._by_digest.values() for one in same]

    async def cancel(self) -> None:
        """End those that run."""
        tasks = [one.task for one in self.all()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seen(task: asyncio.Future[Reply]) -> None:
    """An error that no client waits for any more is not asyncio's to complain of."""
    if not task.cancelled():
        task.exception()
