"""A real evaluator turned into training data: 64 additions, 8 completions each, all of them scored.

Run it from the repository's folder, then look at what it left:

    EP_OUTPUT_DIR=results pytest examples/arithmetic
    ep-rft show results

`MODEL` is the one line to change for another model or server; see the README.
"""

from pathlib import Path

from eval_protocol.models import EvaluateResult, EvaluationRow
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, SlimLogger, score_each_completion

MODEL = {"model": "local/arithmetic"}


@evaluation_test(
    input_dataset=[str(Path(__file__).with_name("problems.jsonl"))],
    completion_params=[{**MODEL, "n": 8, "temperature": 1.0, "max_tokens": 8}],
    rollout_processor=FireworksTrainingRolloutProcessor(),
    logger=SlimLogger(),
)
@score_each_completion
def test_arithmetic(row: EvaluationRow) -> EvaluationRow:
    """1 for the right sum, 0 for anything else."""
    answer = str(row.messages[-1].content).strip()
    right = answer == row.ground_truth
    row.evaluation_result = EvaluateResult(
        score=float(right), reason=f"answered {answer!r}, the sum is {row.ground_truth}"
    )
    return row
