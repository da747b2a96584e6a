"""Which rows are prepared ahead of the free slots.

Invariant: a ticket is handed back once, whatever happens to its row.
"""

from __future__ import annotations

import asyncio

ROWS_AHEAD = 8
"""Rows whose prompt is rendered while their completions still wait for a slot: enough to keep every
slot busy, few enough that the first request does not wait for the whole data set's rendering."""


class Ticket:
    """A row's place among those that are prepared. It is handed back once all of the row's
    completions have started, so that the next row is ready when a slot comes free."""

    def __init__(self, admission: asyncio.Semaphore) -> None:
        self._admission = admission
        self._unused = 1
        self._held = False

    async def __aenter__(self) -> Ticket:
        await self._admission.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    def good_for(self, n: int) -> None:
        """The row has n completions."""
        self._unused = n

    def used(self) -> None:
        """One of them has started."""
        self._unused -= 1
        if self._unused == 0:
            self._give_back()

    def _give_back(self) -> None:
        if self._held:
            self._held = False
            self._admission.release()
