r"""A sum, and a second try where the first was wrong: episodes of up to two turns.

    ep-rft train examples/retry/test_retry.py::test_retry --steps 200 --lr 5e-4 --warmup-steps 10 \
        --max-staleness 1 --held-out 64 -o run

The bundled model never saw a second turn; it learns to use one.
"""

from eval_protocol.data_loader import DynamicDataLoader
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import EpisodeRolloutProcessor, SlimLogger, score_each_completion
from eval_protocol_rft.environments import EpisodeLimits, RetryWithFeedback


def sums() -> list[EvaluationRow]:
    return [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+{b}=")], ground_truth=str(a + b))
        for a in range(10, 100)
        for b in range(10, 100)
    ]


def is_right(row: EvaluationRow) -> EvaluateResult:
    answer = str(row.messages[-1].content).strip()
    return EvaluateResult(score=float(answer == row.ground_truth), reason=f"not {answer}")


def second_try() -> RetryWithFeedback:
    return RetryWithFeedback(is_right, say=lambda result: f"{result.reason}")


@evaluation_test(
    data_loaders=DynamicDataLoader(generators=[sums]),
    completion_params=[{"model": "local/arithmetic", "n": 8, "temperature": 1.0, "max_tokens": 8}],
    rollout_processor=EpisodeRolloutProcessor(second_try, limits=EpisodeLimits(turns=2)),
    logger=SlimLogger(),
)
@score_each_completion
def test_retry(row: EvaluationRow) -> EvaluationRow:
    """1 for a right first answer, 0.5 for a right second one."""
    tries = sum(message.role == "assistant" for message in row.messages)
    row.evaluation_result = EvaluateResult(score=is_right(row).score / tries)
    return row
