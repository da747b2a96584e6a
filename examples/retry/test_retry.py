r"""A sum, and a second try where the first was wrong: episodes of up to two turns.

    ep-rft train examples/retry/test_retry.py::test_retry --steps 150 --lr 5e-4 --warmup-steps 10 \
        --schedule linear --max-staleness 1 --held-out 64 -o run

The bundled model never saw a second turn; it learns to use one. `after_feedback`, on the run's page
and in `metrics.jsonl`, says how often the second answer is right where the first was not.
"""

from eval_protocol.data_loader import DynamicDataLoader
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, MetricResult
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import EpisodeRolloutProcessor, SlimLogger, score_each_completion
from eval_protocol_rft.episodes import EpisodeLimits, RetryWithFeedback


def sums() -> list[EvaluationRow]:
    return [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+{b}=")], ground_truth=str(a + b))
        for a in range(10, 100)
        for b in range(10, 100)
    ]


def is_right(row: EvaluationRow) -> EvaluateResult:
    answer = str(row.messages[-1].content).strip()
    again = f"no. {row.messages[0].content}"
    return EvaluateResult(score=float(answer == row.ground_truth), reason=again)


def second_try() -> RetryWithFeedback:
    return RetryWithFeedback(is_right, say=lambda result: str(result.reason))


@evaluation_test(
    data_loaders=DynamicDataLoader(generators=[sums]),
    completion_params=[{"model": "local/arithmetic", "n": 8, "temperature": 1.0, "max_tokens": 8}],
    rollout_processor=EpisodeRolloutProcessor(second_try, limits=EpisodeLimits(turns=2)),
    logger=SlimLogger(),
)
@score_each_completion
def test_retry(row: EvaluationRow) -> EvaluationRow:
    """1 if an answer was right, the first or the second; and how often the second was."""
    tries = sum(message.role == "assistant" for message in row.messages)
    right = is_right(row).score
    after = MetricResult(score=right, is_score_valid=tries == 2, reason="of second answers")
    row.evaluation_result = EvaluateResult(score=right, metrics={"after_feedback": after})
    return row
