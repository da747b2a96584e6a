"""Which rows are prepared ahead of the free slots.

Invariant: a row's slot is released once, whatever happens to its row.
"""

from __future__ import annotations

import asyncio

ROWS_AHEAD = 8
"""Rows whose prompt is rendered while their completions still wait for a slot: enough to keep every
slot busy, few enough that the first request does not wait for the whole data set's rendering."""


class RowSlot:
    """A row's place among those that are prepared. It is released once all of the row's completions
    have started, so that the next row is ready when a slot comes free."""

    def __init__(self, rows_ahead: asyncio.Semaphore) -> None:
        self._rows_ahead = rows_ahead
        self._to_start = 1
        self._held = False

    async def __aenter__(self) -> RowSlot:
        await self._rows_ahead.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def expect(self, n: int) -> None:
        """The row has n completions."""
        self._to_start = n

    def started(self) -> None:
        """One of them has started."""
        self._to_start -= 1
        if self._to_start == 0:
            self._release()

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._rows_ahead.release()
