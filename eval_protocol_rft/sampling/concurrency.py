"""How many requests may be in flight: the interface, and the simple choice. Pure.

Invariant: a limit owns no task, client or clock. It hears of every request that ended and answers
with a number, at least 1. See `adaptive.py` for the one that finds it by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from eval_protocol_rft.sampling.attempts import Attempt


class ConcurrencyLimit(Protocol):
    """How many requests may be in flight."""

    @property
    def limit(self) -> int:
        """At least 1."""
        ...

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """A request has ended; `in_flight` others have not."""
        ...

    def outage(self) -> None:
        """The server is away: what failed just now was no sign of too many requests."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLimit:
    """Always the same."""

    limit: int

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def ended(self, attempt: Attempt, *, in_flight: int) -> None:
        """Changes nothing."""

    def outage(self) -> None:
        """Changes nothing."""
