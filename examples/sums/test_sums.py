r"""Every sum of two two-digit numbers, to train on: the bundled model gets a quarter of them right.

    ep-rft train examples/sums/test_sums.py::test_sums --eval-data examples/sums/held_out.jsonl \
        --steps 500 --lr 5e-4 --warmup-steps 10 --schedule linear --max-staleness 1 -o run

`held_out.jsonl` has sums that neither the bundled model's own training nor this one ever sees.
"""

from eval_protocol.data_loader import DynamicDataLoader
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, SlimLogger, score_each_completion


def is_held_out(a: int, b: int) -> bool:
    """As in `scripts/train_arithmetic.py`."""
    return (3 * a + 5 * b) % 11 == 0


def sums() -> list[EvaluationRow]:
    """All sums that may be trained on."""
    numbers = range(10, 100)
    return [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+{b}=")], ground_truth=str(a + b))
        for a in numbers
        for b in numbers
        if not is_held_out(a, b)
    ]


@evaluation_test(
    data_loaders=DynamicDataLoader(generators=[sums]),
    completion_params=[{"model": "local/arithmetic", "n": 8, "temperature": 1.0, "max_tokens": 8}],
    rollout_processor=FireworksTrainingRolloutProcessor(),
    logger=SlimLogger(),
)
@score_each_completion
def test_sums(row: EvaluationRow) -> EvaluationRow:
    """1 for the right sum, 0 for anything else."""
    right = str(row.messages[-1].content).strip() == row.ground_truth
    row.evaluation_result = EvaluateResult(score=float(right))
    return row
