"""What the server notes of each request, and what decides beforehand how it treats them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.hostile.exchange import Request
from tests.hostile.faults import Fault
from tests.hostile.replies import Dialect


class Plan(Protocol):
    """Which fault strikes; None: an honest answer."""

    def of_request(self, request: Request, dialect: Dialect) -> Fault | None: ...
    def of_connection(self, number: int) -> Fault | None: ...


@dataclass(slots=True)
class Entry:
    """One request, or one connection that a fault met before it could ask."""

    connection: int
    fault: str
    """Name of the fault; empty: answered honestly."""
    request: Request | None = None
    """None where the fault struck at accept."""
    whole: bool = False
    """The true reply went out to its last byte, rightly framed."""
    sent: int = 0
    """Bytes of the answer that were given to the socket."""
    written_at: float = 0.0
    """When the last of them were, on the monotonic clock."""
    done: bool = False
    """The server has finished with it; False while it answers or stalls."""
    cut: bool = False
    """The server died while this was the last on an open connection: part of it may be lost."""
    surplus: bool = False
    """A reply that nobody asked for followed it, on a connection that stayed open."""
    crossed: bool = False
    """It came over such a connection: what its client reads may be the reply before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """In mid run the server dies, and comes back on the same port."""

    after_requests: int
    seconds: float


def dialect_of(prompt: Sequence[int]) -> Dialect:
    """What a server of both dialects speaks to this prompt."""
    return "vllm" if sum(prompt) % 2 else "fireworks"
