"""`RetryWithFeedback`: the user's own evaluator judges each answer, and the model may try again.

Invariant: what the model is told is the evaluator's reason (or what `say` makes of it), and every
answer's score is on record as a step reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.environments.environment import Environment, Step

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

    from eval_protocol_rft.record import CompletionResult


def _reason(result: CompletionResult) -> str:
    return f"That is not right: {result.reason or 'wrong'}. Try again."


class RetryWithFeedback(Environment):
    """Ends when an answer scores `threshold`, or the turns are up.

    Args:
        evaluator: a function of `row`, under `@evaluation_test` or not, or of `row` to a number or
            an `EvaluateResult`.
        threshold: from which an answer is right.
        say: what the model is told of a wrong answer, from its score and reason.
    """

    def __init__(
        self,
        evaluator: Callable[..., Any],
        *,
        threshold: float = 1.0,
        say: Callable[[CompletionResult], str] = _reason,
    ) -> None:
        self._evaluator = evaluator
        self._threshold = threshold
        self._say = say
        self._row: EvaluationRow | None = None

    def reset(self, row: EvaluationRow) -> None:
        self._row = row.model_copy(deep=True)

    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        from eval_protocol_rft.scoring import ascore_rows
        from eval_protocol_rft.scoring.results import read_result

        assert self._row is not None  # noqa: S101 - narrows the type
        row = self._row.model_copy(deep=True)
        row.messages = [*messages, assistant]
        (judged,) = await ascore_rows([row], self._evaluator, mode="pointwise")
        result = read_result(judged)
        if result.score is None:
            raise ValueError(f"the evaluator gave no score: {result.error}")
        if result.score >= self._threshold:
            return Step(done=True, reward=result.score)
        told = {"role": "user", "content": self._say(result)}
        return Step(messages=[told], reward=result.score)
