"""The JSONL of a reinforcement fine-tuning step, written and read back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message

from eval_protocol_rft.training._types import (
    BiasedSamplingWarning,
    EmptyBatchError,
    TrainingDataError,
)
from eval_protocol_rft.training.export import rl_step
from tests.scored_rows import answered
from tests.training_rows import failed_row, scored


def evaluated(
    *texts: str, rewards: list[float | None], row_id: str = "a", **options: Any
) -> EvaluationRow:
    """A row as Eval Protocol holds it after rollout and scoring."""
    row = answered(*texts, **options)
    row.input_metadata.row_id = row_id
    row.execution_metadata.experiment_id = "exp"
    assert row.execution_metadata.extra is not None
    row.execution_metadata.extra["rewards"] = rewards
    row.evaluation_result = EvaluateResult(score=0.5)
    return row


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_prompt_group_is_a_line_and_each_completion_a_sample(tmp_path: Path) -> None:
    rows = [
        evaluated("4", "<think>hm</think>five", rewards=[1.0, 0.0], question="2+2?"),
        evaluated("9", rewards=[0.25], question="3+3?", row_id="b"),
        evaluated("vier", rewards=[0.5], question="2+2?"),  # another run of the first
    ]
    data = rl_step.write_jsonl(rows, tmp_path / "step.jsonl")
    assert data.dropped == {}
    question = {"role": "user", "content": "2+2?"}

    def sample(text: str, score: float) -> dict[str, Any]:
        answer = {"role": "assistant", "content": text}
        return {"messages": [question, answer], "evals": {"score": score}}

    assert read(tmp_path / "step.jsonl") == [
        {"samples": [sample("4", 1.0), sample("<think>hm</think>five", 0.0), sample("vier", 0.5)]},
        {
            "samples": [
                {
                    "messages": [
                        {"role": "user", "content": "3+3?"},
                        {"role": "assistant", "content": "9"},
                    ],
                    "evals": {"score": 0.25},
                }
            ]
        },
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["step.jsonl"]


def test_rows_and_their_json_give_the_same_lines() -> None:
    row = evaluated("4", "5", rewards=[1.0, 0.0])
    row.messages.insert(0, Message(role="system", content="Be brief."))
    as_json = json.loads(row.model_dump_json())
    lines = rl_step.to_lines([as_json]).lines
    assert lines == rl_step.to_lines([row]).lines
    assert lines[0]["samples"][0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "4"},
    ]


def test_tools_and_tool_calls_travel_with_the_sample() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = evaluated("4", rewards=[1.0])
    row.tools = tools
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    row.messages[1:1] = [
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        Message(role="tool", content="2", tool_call_id="c1"),
    ]
    ((line,), _) = rl_step.to_lines([row])
    (sample,) = line["samples"]
    assert sample["tools"] == tools
    assert sample["messages"][1:3] == [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def test_an_unscored_completion_is_an_error_or_counted_and_never_zero() -> None:
    rows = [
        evaluated("4", "5", "6", rewards=[1.0, None, 0.0], num_failed=2),
        failed_row("a"),
    ]
    with pytest.raises(TrainingDataError, match="'a', completion 1: it has no score"):
        rl_step.to_lines(rows)
    lines, dropped = rl_step.to_lines(rows, unscored="drop")
    assert [sample["evals"] for sample in lines[0]["samples"]] == [{"score": 1.0}, {"score": 0.0}]
    assert dropped == {"unscored": 1, "failed": 2, "failed_row": 1}


def test_a_group_without_a_scored_completion_has_no_line() -> None:
    rows = [evaluated("4", rewards=[1.0]), evaluated("5", rewards=[None], row_id="b")]
    lines, dropped = rl_step.to_lines(rows, unscored="drop")
    assert (len(lines), dropped) == (1, {"unscored": 1})


def test_samples_of_several_models_are_warned_of(tmp_path: Path) -> None:
    rows = [evaluated("4", "5", rewards=[1.0, 0.0]), evaluated("6", rewards=[1.0], row_id="b")]
    rows += [evaluated("7", rewards=[None], row_id="c")]
    for row, model in zip(rows, ("m", "other", "unscored"), strict=True):
        assert row.execution_metadata.extra is not None
        row.execution_metadata.extra["sampling"]["model"] = model
    message = "2 models, 2 of 'm', 1 of 'other':"
    with pytest.warns(BiasedSamplingWarning, match=message) as caught:
        rl_step.to_lines(rows, unscored="drop")
    with pytest.warns(BiasedSamplingWarning, match=message) as written:
        rl_step.write_jsonl(rows, tmp_path / "step.jsonl", unscored="drop")
    assert [caught[0].filename, written[0].filename] == [__file__] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is dropped is no sample
        rl_step.to_lines([rows[0], rows[2]], unscored="drop")


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(EmptyBatchError, match="failed_row: 1, unscored: 1"):
        rl_step.write_jsonl(
            [evaluated("5", rewards=[None]), failed_row("b")],
            tmp_path / "step.jsonl",
            unscored="drop",
        )
    assert not list(tmp_path.iterdir())


def test_rows_of_one_key_must_have_one_prompt() -> None:
    rows = [evaluated("4", rewards=[1.0]), evaluated("5", rewards=[1.0], question="other?")]
    with pytest.raises(TrainingDataError, match="messages differ from those of another row"):
        rl_step.to_lines(rows)
    (line,), _ = rl_step.to_lines(rows, key=lambda row: "all")
    assert len(line["samples"]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (scored("a", 1.0), "do not end in the rollout's answer"),  # only the user's message
        ({**scored("a", 1.0), "execution_metadata": {"extra": None}}, "no rollout record"),
        (scored("a", 1.0, completions=[([1, 2], [-0.5])]), "2 token ids and 1 logprobs"),
    ],
)
def test_a_wrong_row_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingDataError, match=rf"row 'a'.*{message}"):
        rl_step.to_lines([row])
