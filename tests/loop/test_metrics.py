"""What steps and evaluations tell of the evaluator's own metrics."""

from __future__ import annotations

from pathlib import Path

from eval_protocol.models import EvaluateResult, EvaluationRow, Message, MetricResult
from eval_protocol.pytest import evaluation_test

from eval_protocol_rft import FireworksTrainingRolloutProcessor, score_each_completion
from eval_protocol_rft.loop._metrics import component_means
from eval_protocol_rft.loop._train import atrain
from eval_protocol_rft.training._types import PromptGroup, Trajectory
from tests.loop.runs import options, sums_file


def trajectory(**components: float | None) -> Trajectory:
    arrays = {"tokens": [1, 2], "logprobs": [0.0, -1.0], "loss_mask": [0, 1]}
    return Trajectory(**arrays, reward=1.0, components=components)


def test_the_mean_of_a_metric_is_over_the_completions_that_have_it():
    groups = [
        PromptGroup(key=1, trajectories=(trajectory(a=1.0, b=None), trajectory(a=0.5))),
        PromptGroup(key=2, trajectories=(trajectory(), trajectory(a=0.0, b=None, c=0.0))),
    ]
    assert component_means(groups) == {"a": 0.5, "c": 0.0}
    assert component_means(groups[1:]) == {"a": 0.0, "c": 0.0}
    assert component_means([PromptGroup(key=1, trajectories=(trajectory(),))]) is None


@evaluation_test(
    input_messages=[[[Message(role="user", content="1+1=")]]],
    completion_params=[{"model": "local/arithmetic", "max_tokens": 8}],
    rollout_processor=FireworksTrainingRolloutProcessor(),
)
@score_each_completion
def judged(row: EvaluationRow) -> EvaluationRow:
    answer = str(row.messages[-1].content).strip()
    metrics = {
        "digits": MetricResult(score=float(answer.isdigit()), is_score_valid=True, reason=""),
        "never": MetricResult(score=1.0, is_score_valid=False, reason="not judged"),
    }
    right = float(answer == row.ground_truth)
    row.evaluation_result = EvaluateResult(score=right, metrics=metrics)
    return row


async def test_a_run_tells_the_evaluators_metrics_at_every_step_and_evaluation(tmp_path: Path):
    result = await atrain(
        judged,
        tmp_path / "run",
        options=options(steps=1, groups_per_step=2),
        model="local/arithmetic",
        data=[sums_file(tmp_path / "sums.jsonl")],
        held_out=4,
        progress=False,
    )
    assert [line["kind"] for line in result.lines] == ["eval", "step", "eval"]
    for line in result.lines:
        assert list(line["scores"]) == ["digits"]
        assert 0.5 < line["scores"]["digits"] <= 1
    assert "The evaluator&#39;s metrics" in (tmp_path / "run" / "report.html").read_text()
