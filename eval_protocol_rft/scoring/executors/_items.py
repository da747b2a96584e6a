"""What goes into an executor and comes out of it, and what its workers are sent and answer.

Light, so that naming it costs no import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.record import Score
from eval_protocol_rft.scoring.executors._channel import WorkerChannel


class GradingError(EvalProtocolRftError, RuntimeError):
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
    results: tuple[Score, ...]
    """One per view, in the order of the views."""
    seconds: float
    """How long the call took; until it was given up where it did not end by itself."""


def all_unscored(item: GradingItem, error: str, seconds: float) -> Graded:
    """The item, with no score and the same reason for each of its views."""
    return Graded(item.key, (Score(error=error),) * len(item.views), seconds)


def late(limit: float | None) -> str:
    """What is said of an item that took longer than `limit` seconds."""
    return f"no result within {limit:g} s"


LOADING = 0
"""The number of the call that says what to load; others follow."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to be like the process that asked for it: bytes as the system has them,
    for paths and the environment need not be UTF-8."""

    key: bytes = b""
    """Seals its answers."""
    timeout: float | None
    """Seconds for a call of an async evaluator. Of a sync one the caller keeps the time."""
    spec: bytes
    fingerprint: str
    cwd: bytes
    environ: dict[bytes, bytes]
    path: list[bytes]
    argv: list[bytes]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The evaluator is loaded; the first call may come."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What became of one call."""

    results: tuple[Score, ...]
    seconds: float
    is_sound: bool = True
    """False: the worker itself failed at the call, not the evaluator. An earlier call may have
    broken what the worker is made of."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The event loop of an async evaluator turns."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """No more answers will come from here, and why; the run should end."""

    reason: str


Message = Ready | Answer | Alive | Ended


def longest_answer(views: int) -> int:
    """Bytes that an answer for so many completions may have."""
    return (64 << 20) + (64 << 10) * views


def send(channel: WorkerChannel, number: int, message: Message, *, views: int = 1) -> None:
    """Send a message about the call of that number."""
    try:
        body = msgspec.json.encode(message)
        problem = f"is {len(body)} bytes long" if len(body) > longest_answer(views) else None
    except (TypeError, ValueError, RecursionError) as error:
        body, problem = b"", f"cannot be written as JSON: {type(error).__name__}"
    if problem is not None:
        result = Score(error=f"what the evaluator said {problem}")
        body = msgspec.json.encode(Answer((result,) * views, 0.0))
    channel.send(number, body)
