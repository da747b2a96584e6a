"""Which rows are prepared ahead of the free slots, and what a prepared row is.

Invariant: a row's slot is released once, whatever happens to its row.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout._params import RolloutRequest
from eval_protocol_rft.rollout._vocabulary import VocabularyWitness
from eval_protocol_rft.sampling import RunLimiter, Sampler

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RowJob:
    """One row, ready to be sampled."""

    request: RolloutRequest
    sampler: Sampler
    tokenizer: LoadedTokenizer
    messages: list[Any]
    """Eval Protocol's, those to be answered."""
    limiter: RunLimiter
    witness: VocabularyWitness
    began_at: float
    """Unix seconds."""
    began: float
    """Of the performance counter."""
    run: int | str
    """Names this rollout among those of its row."""
    row_key: str = ""
    """Names the row among all rows."""
    seeds: list[int | None] = field(default_factory=list)
    """One per completion that is asked for."""
