"""Reward functions of Eval Protocol, verl and TRL as evaluators."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pyarrow as pa
import pytest
from eval_protocol.models import EvaluationRow, InputMetadata, Message

from eval_protocol_rft import data
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.scoring._evaluator import Evaluator, EvaluatorError
from eval_protocol_rft.scoring._results import read_result
from eval_protocol_rft.scoring.executors._loading import EvaluatorNotFoundError, load_evaluator
from tests.convert_rows import completion, rollouts


def row(said: Any = "4", *, ground_truth: Any = "4", **columns: Any) -> EvaluationRow:
    return EvaluationRow(
        messages=[Message(role="user", content="2+2="), Message(role="assistant", content=said)],
        ground_truth=ground_truth,
        input_metadata=InputMetadata(dataset_info=columns),
    )


def result(function: Any, of: EvaluationRow, **given: Any) -> Any:
    return read_result(Evaluator.of(function).bind(row=None, **given).attempt(of))


READY = [
    ("math:math_reward", {}, "\\boxed{4}", "4", 1.0),
    ("math:math_reward", {}, "\\boxed{5}", "4", 0.0),
    ("math:math_reward", {}, "\\boxed{4}", 4, 1.0),
    ("accuracy:accuracy_reward", {}, "4", "4", 1.0),
    ("accuracy:accuracy_reward", {}, "5", "4", 0.3),
    ("format:format_reward", {}, "<think>\na\n</think>\n<answer>\n4\n</answer>", None, 1.0),
    ("format:format_reward", {}, "4", None, 0.0),
    ("json_schema:json_schema_reward", {"expected_schema": {"a": "int"}}, '{"a": 1}', None, None),
    ("length:length_reward", {"target_length": 2}, "two words", None, 1.0),
    ("tag_count:tag_count_reward", {"required_tags": ["a"]}, "<a>4</a>", None, 0.25),
    ("tag_count:tag_count_reward", {"required_tags": ["a"]}, "4", None, 0.0),
    ("repetition:repetition_penalty_reward", {}, "all words are new here", None, 1.0),
    ("multiple_choice_math_reward:multiple_choice_math_reward", {}, "(B)", "(B)", 1.0),
    (
        "list_comparison_math_reward:list_comparison_math_reward",
        {},
        "The answer is $1, 2$",
        "$2, 1$",
        1.0,
    ),
    ("reasoning_steps:reasoning_steps_reward", {}, "Step 1: a\nStep 2: b\nStep 3: c", None, 1.0),
    ("code_execution:local_code_execution_reward", {}, "```python\nprint(4)\n```", "4", 1.0),
    ("language_consistency:language_consistency_reward", {}, "a plain sentence here", None, None),
]


@pytest.mark.parametrize(("name", "given", "said", "truth", "expected"), READY)
def test_eval_protocols_ready_rewards_score(
    name: str, given: dict[str, Any], said: str, truth: Any, expected: float | None
) -> None:
    loaded = load_evaluator(f"eval_protocol.rewards.{name}")
    score = result(loaded.function, row(said, ground_truth=truth), **given)
    assert score.reward is not None, score.error
    if expected is not None:
        assert score.reward == expected


def test_a_column_is_what_has_no_default_and_kwargs_get_the_others() -> None:
    def reward(messages: Any, state: Any, scale: float = 1.0, **kwargs: Any) -> float:
        assert kwargs == {"statement": "s"}
        return scale * state

    columns = {"state": 3.0, "scale": 100.0, "statement": "s"}
    assert result(reward, row(**columns)).reward == 3.0
    assert result(reward, row(**columns), scale=2.0).reward == 6.0
    assert "no column state" in result(reward, row(scale=1.0)).error


def test_a_missing_ground_truth_is_never_made_up() -> None:
    def strict(messages: Any, ground_truth: str, **kwargs: Any) -> float:
        return 1.0

    def lenient(messages: Any, ground_truth: str | None, **kwargs: Any) -> float:
        return float(ground_truth is None)

    assert "the row has no ground truth" in result(strict, row(ground_truth=None)).error
    assert result(lenient, row(ground_truth=None)).reward == 1.0


def test_verls_functions_get_the_text_as_it_was_sampled_and_its_columns() -> None:
    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> Any:
        assert (data_source, extra_info) == ("gsm8k", {"index": 3})
        right = solution_str == ground_truth
        return {"score": right, "acc": right, "pred": solution_str}

    asked = row(data_source="gsm8k", extra_info={"index": 3})
    score = result(compute_score, asked)
    assert (score.reward, score.reason) == (1.0, "pred: 4")
    assert score.metrics["acc"]["score"] == 1.0
    asked.execution_metadata.extra = {
        "completions_text": ["5", "<think>a</think>4"], "completion_index": 1,
    }  # fmt: skip
    assert result(compute_score, asked).reason == "pred: <think>a</think>4"


@pytest.mark.parametrize("name", ["solution", "predict_str", "model_output", "response"])
def test_other_names_of_the_text_in_verls_functions(name: str) -> None:
    scope: dict[str, Any] = {}
    source = f"def f({name}, ground_truth, score=7.0):\n    return float({name} == ground_truth)"
    exec(source, scope)  # noqa: S102
    assert result(scope["f"], row(score=5.0)).reward == 1.0
    assert result(scope["f"], row("5")).reward == 0.0


def test_trls_functions_get_lists_of_one_and_every_column() -> None:
    def reward(prompts: Any, completions: Any, answer: Any, level: Any = None, **kw: Any) -> Any:
        assert prompts == [[{"role": "user", "content": "2+2="}]]
        assert completions == [[{"role": "assistant", "content": "4"}]]
        assert kw == {"topic": ["sums"]}
        return [float(completions[0][0]["content"] == answer[0]) + level[0]]

    assert result(reward, row(answer="4", level=2, topic="sums")).reward == 3.0

    def by_truth(completions: Any, ground_truth: Any) -> Any:
        return [None if ground_truth == ["?"] else 1.0]

    assert result(by_truth, row()).reward == 1.0
    assert "does not judge this prompt" in result(by_truth, row(ground_truth="?")).error
    assert "not a list of one" in result(lambda completions: [1, 2], row()).error


async def test_async_reward_functions_are_awaited() -> None:
    async def compute_score(solution_str: str, ground_truth: str) -> float:
        return float(solution_str == ground_truth)

    call = Evaluator.of(compute_score).bind(row=None)
    assert call.evaluator.is_async
    assert await call.attempt_async(row()) == 1.0


def test_what_is_of_no_form_is_refused_with_the_forms() -> None:
    with pytest.raises(EvaluatorError, match=r"neither, but text, flags: .*solution_str \(of verl"):
        Evaluator.of(lambda text, flags: 1.0)
    with pytest.raises(EvaluatorError, match="neither, but rollouts_messages"):
        Evaluator.of(lambda rollouts_messages: 1.0)


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """Two scored sums, and the name of a file with reward functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [
        completion(0, i, response=text, original={"level": 2.0}, ground_truth="4")
        for i, text in enumerate(["4", "5"])
    ]
    (tmp_path / "rewards_of_sums.py").write_text(
        dedent("""
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            return (solution_str == ground_truth) * (2 if data_source == "twice" else 1)

        def with_level(completions, level, **kwargs):
            return level
        """)
    )
    yield rollouts(tmp_path / "a.parquet", *rows, level=pa.float64()), "rewards_of_sums.py"
    sys.modules.pop("rewards_of_sums", None)


def rewards(path: Path) -> list[float | None]:
    return [row.reward for row in RolloutDataset(path)]


def score(path: Path, evaluator: str, **options: Any) -> None:
    data.score(path, evaluator, workers=1, progress=False, **options)


def test_a_file_is_scored_with_reward_functions(sums: tuple[Path, str]) -> None:
    path, file = sums
    score(path, f"{file}::with_level")
    assert rewards(path) == [2.0, 2.0]
    with pytest.raises(data.JobError, match=r"default that no column .* is: data_source\. The col"):
        score(path, f"{file}:compute_score", overwrite=True)
    given = {"data_source": "twice"}
    score(path, f"{file}:compute_score", evaluator_args=given, overwrite=True)
    assert rewards(path) == [2.0, 0.0]
    known = RolloutDataset(path).metadata.rewards["reward"].evaluator
    assert known == file + ':compute_score?{"data_source": "twice"}'
    with pytest.raises(data.JobError, match="has rewards of"):  # they are of other arguments
        score(path, f"{file}:compute_score", evaluator_args={"data_source": "once"})


def test_arguments_that_do_not_fit_are_refused_before_anything_is_scored(
    sums: tuple[Path, str],
) -> None:
    path, file = sums
    with pytest.raises(EvaluatorError, match="cannot be called with `row` and its arguments"):
        load_evaluator(file + ':compute_score?{"typo": 1}')
    for text in ("{", "[1]"):
        with pytest.raises(EvaluatorNotFoundError, match="behind the \\? is no JSON"):
            load_evaluator(f"{file}:compute_score?{text}")
    with pytest.raises(EvaluatorNotFoundError, match="its arguments are no JSON"):
        score(path, f"{file}:compute_score", evaluator_args={"a": {1}})
