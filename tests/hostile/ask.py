"""What a run asks for, and how its book hears of attempts.

Invariant: what is asked follows from `Ask` alone. What was tried is told by the package's own log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.sampling._retry import RetryPolicy
from eval_protocol_rft.sampling._telemetry import LOGGER
from tests.hostile.book import GROUP, MAX_TOKENS, Book


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a run asks for."""

    url: str
    """Base URL, without `/v1`."""
    completions: int
    seed: int
    patience: float
    """Seconds for one attempt."""
    in_flight: int
    retry: RetryPolicy

    @property
    def prompts(self) -> range:
        return range(self.completions // GROUP)

    def params(self, *, stream: bool) -> dict[str, Any]:
        """completion_params."""
        return {
            "model": "m",
            "base_url": self.url,
            "n": GROUP,
            "max_tokens": MAX_TOKENS,
            "timeout": self.patience,
            "seed": self.seed,
            "stream": stream,
        }


Client = Callable[[Ask, Book], Coroutine[Any, Any, None]]
"""Asks for everything, once, and tells the book what came out."""


@contextlib.contextmanager
def listening(book: Book, number: Callable[[Any, int], int]) -> Iterator[None]:
    """Tell `book` of every attempt in the package's log; `number` finds the completion by the
    prompt's name and the index."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fields: dict[str, Any] = record.attempt  # type: ignore[attr-defined]
            book.told(fields, number(fields["prompt"], fields["index"]))

    logger, handler = logging.getLogger(LOGGER), Handler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
