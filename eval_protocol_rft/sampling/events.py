"""One event per request, for whoever watches a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from eval_protocol_rft.sampling.attempts import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEvent:
    """One request that has ended, and what it was for."""

    attempt: Attempt
    number: int
    """Which of its completion's attempts, from 1."""
    model: str
    prompt: Hashable
    """Which prompt: the row id."""
    prompt_tokens: int | None = None
    """Its length, where whoever makes the run tells it."""
    index: int
    """Which of the prompt's completions."""
    seed: int | None
    request_id: str | None
    in_flight: int
    """Requests of the run that have not ended, this one not counted."""
    gives_up: bool
    """It failed, and there will be no other attempt."""
    repeated: bool = False
    """It failed for good of what another completion of the run had failed for good of before."""


Observer = Callable[[AttemptEvent], None]
