"""Items as the grading tests give them, and their outcomes by key."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval_protocol.models import EvaluationRow, Message

from eval_protocol_rft.scoring.executors._loading import LoadedEvaluator, load_evaluator
from eval_protocol_rft.scoring.executors._messages import ScoredItem, ScoringItem
from eval_protocol_rft.scoring.executors._pool import score_items
from tests.data.graders import NO_QUESTION
from tests.waiting import PATIENCE

GRADERS = Path(__file__).with_name("graders.py")


def grader(name: str) -> LoadedEvaluator:
    return load_evaluator(f"{GRADERS}::{name}")


def view(text: str, *, question: str = NO_QUESTION, index: int = 0) -> bytes:
    row = EvaluationRow(
        messages=[
            Message(role="user", content=question),
            Message(role="assistant", content=text),
        ]
    )
    row.execution_metadata.rollout_id = "r1"
    row.execution_metadata.extra = {"completion_index": index}
    return row.model_dump_json().encode()


def one_each(texts: Iterable[str]) -> list[ScoringItem]:
    """An item per text, the text as its key."""
    return [ScoringItem(text, (view(text),)) for text in texts]


def group(key: Any, texts: Sequence[str]) -> ScoringItem:
    return ScoringItem(key, tuple(view(text, index=i) for i, text in enumerate(texts)))


def outcomes(name: str, items: Iterable[ScoringItem], **options: Any) -> dict[Any, ScoredItem]:
    """What became of each item; none may come twice."""
    done = list(score_items(items, grader(name), **options))
    by_key = {graded.key: graded for graded in done}
    assert len(by_key) == len(done)
    return by_key


def scores(graded: ScoredItem) -> list[float | None]:
    return [result.reward for result in graded.results]


def errors(graded: ScoredItem) -> list[str | None]:
    return [result.error for result in graded.results]


def is_gone(pid: int, *, within: float = PATIENCE) -> bool:
    """Whether a process ends; `within` so many seconds, or it never will."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if _is_zombie(pid):
            return True
        time.sleep(0.02)
    return False


def _is_zombie(pid: int) -> bool:
    """An orphan that nobody has waited for yet, which is over all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
