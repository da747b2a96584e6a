"""What goes into grading and what comes out: light, so that naming it costs no import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.record import CompletionResult


class GradingError(RuntimeError):
    """Grading cannot go on: not one item's fault, and the message says whose."""


@dataclass(frozen=True, slots=True)
class GradingItem:
    """One call of the evaluator."""

    key: Any
    """Opaque; given back with the results. It does not leave this process."""
    views: tuple[bytes, ...]
    """JSON of one EvaluationRow per completion: exactly one for a pointwise evaluator, else the
    completions to be judged in one call."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What became of one item."""

    key: Any
    results: tuple[CompletionResult, ...]
    """One per view, in the order of the views."""
    seconds: float
    """How long the call took; until it was given up where it did not end by itself."""


def all_unscored(item: GradingItem, error: str, seconds: float) -> Graded:
    """The item, with no score and the same reason for each of its views."""
    return Graded(item.key, (CompletionResult(score=None, error=error),) * len(item.views), seconds)


def late(limit: float | None) -> str:
    """What is said of an item that took longer than `limit` seconds."""
    return f"no result within {limit:g} s"
