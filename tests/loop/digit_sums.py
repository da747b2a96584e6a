"""Sums of two digits for a small chat model, judged by the number that its short answer ends on."""

from __future__ import annotations

import re

from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, SlimLogger, score_each_completion

ROWS = [
    EvaluationRow(
        messages=[Message(role="user", content=f"What is {a} + {b}? Answer with the number only.")],
        ground_truth=str(a + b),
        input_metadata=InputMetadata(row_id=f"{a}+{b}"),
    )
    for a in range(10)
    for b in range(10)
]


@evaluation_test(
    input_rows=[ROWS],
    completion_params=[{"model": "smollm2", "n": 8, "temperature": 1.0, "max_tokens": 16}],
    rollout_processor=FireworksTrainingRolloutProcessor(),
    logger=SlimLogger(),
)
@score_each_completion
def test_digit_sum(row: EvaluationRow) -> EvaluationRow:
    """1 where the last number is the sum: `3 + 4 = 7` counts, a list of guesses does not."""
    answer = str(row.messages[-1].content)
    numbers = re.findall(r"[\d.]*\d", answer)
    right = numbers[-1:] == [row.ground_truth]
    row.evaluation_result = EvaluateResult(score=float(right), reason=f"answered {answer!r}")
    return row
