"""The score of an episode while its environment is alive: files, databases and servers that it has
changed are still there, and are its own.

Invariant: an episode is scored once, after its last turn and before its environment is closed, and
the record keeps what was said and by whom, whoever scores it later. What goes wrong costs the
episode its score, with the reason, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft import scoring
from eval_protocol_rft._segments import EpisodeRecord
from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call
from eval_protocol_rft.record import Score

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow


class AliveScorer:
    """Scores episodes with an evaluator of `row`, under `@evaluation_test` or not, sync or async;
    one that is not async runs in a thread.

    Raises:
        EvaluatorError: it is none.
    """

    def __init__(self, evaluator: Callable[..., Any]) -> None:
        inner = scoring.inner_evaluator(evaluator)
        if inner.parameter != "row":
            raise scoring.EvaluatorError(
                f"evaluator {inner.name} takes `rows`, and an episode is scored by itself while "
                "its environment is alive: pass one of `row`"
            )
        self._evaluator, self._kwargs = inner, scoring.own_kwargs(evaluator)
        self.name = inner.name
        self.function = inner.function

    def __call__(self, row: EvaluationRow) -> Any:
        """What the evaluator says; an awaitable where it is async."""
        return self._evaluator.bind(row=row, **self._kwargs)(row)


async def score_alive(
    score: Callable[[EvaluationRow], Any],
    name: str,
    row: EvaluationRow,
    index: int,
    record: EpisodeRecord,
    *,
    seconds: float,
) -> EpisodeRecord:
    """`record` with what `score`, called `name`, says of episode `index` of `row`.

    Args:
        score: takes the episode as an evaluator sees it; returns what an evaluator may, or None
            where it says nothing; an awaitable of it too.
        seconds: it may take.
    """
    view = scoring.episode_view(row, index, record)
    try:
        returned = await call(score, view, what=name, seconds=seconds)
        if returned is None:
            return record
        result = scoring.read_result(returned)
    except EnvironmentFaultError as error:
        result = scoring.unscored(str(error))
    said = {"by": name, **msgspec.to_builtins(result)}
    return msgspec.structs.replace(record, metrics={**record.metrics, scoring.ALIVE_KEY: said})


def alive_score(record: EpisodeRecord) -> Score | None:
    """What was said of an episode while its environment was alive."""
    said = record.metrics.get(scoring.ALIVE_KEY)
    if not isinstance(said, Mapping) or "by" not in said:
        return None
    return msgspec.convert({k: v for k, v in said.items() if k != "by"}, Score)
