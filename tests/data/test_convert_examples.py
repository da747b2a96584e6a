"""Examples out of scored rollouts, read as TRL's trainers read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._example_rules import ExampleRules
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.record import Score
from tests.convert_rows import (
    METADATA,
    PROMPTS,
    REWARD_B,
    SAMPLING,
    TOOL,
    completion,
    failure,
    loaded,
    rollouts,
)

ROWS = (
    completion(0, 0, 0.5),
    failure(0, 1),
    completion(0, 2, 1.0),
    completion(0, 3),  # unscored
    completion(0, 4, 1.0, truncated=True, finish_reason="length"),
    completion(0, 5, 0.0),
    completion(1, 0, 0.0),
    completion(1, 1, 0.0),
    failure(2, 0),
)


def written(tmp_path: Path, kind: Any, *rows: Any, name: str = "b.parquet", **rules: Any) -> Any:
    source = rollouts(tmp_path / "a.parquet", *(rows or ROWS))
    summary = convert(source, tmp_path / name, to_format=kind, rules=ExampleRules(**rules))
    found = loaded(tmp_path / name)
    assert summary.examples == len(found)
    return found, summary


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_the_best_completion_of_each_prompt_with_its_own_tokens(tmp_path: Path, name: str) -> None:
    found, summary = written(tmp_path, "sft", name=name, reward_min=0.5)
    [only] = found
    assert only["prompt"] == [{"role": "user", "content": "q"}]
    assert only["completion"] == said("0.2")
    assert only["input_ids"] == [1, 2, 12, 5]
    assert only["completion_mask"] == [0, 0, 1, 1]
    assert (only["row_id"], only["sample_idx"], only["reward"]) == ("r0", 2, 1.0)
    assert (summary.data_rows, summary.completions) == (1, 1)


def test_what_is_left_out_is_counted_under_one_reason(tmp_path: Path) -> None:
    found, summary = written(tmp_path, "sft", best=9, reward_min=0.5)
    assert [row["completion"] for row in found] == [said("0.2"), said("0.0")]
    assert "completions without a reward (1) are in no example" in summary.notes
    cut = "completions cut off at max_tokens (keep_truncated takes them) (1) are in no example"
    assert cut in summary.notes
    assert "failed completions (2) are not in the output" in summary.notes
    assert "data rows (1) give none: no completion that is left reaches reward_min" in summary.notes
    assert "lowest reward of an example: 0.5" in summary.notes
    assert str(summary).startswith(f"{summary.target} (sft): 2 examples of 2 completions of 1 data")


def test_truncated_completions_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    found, summary = written(tmp_path, "sft", best=2, keep_truncated=True)
    assert [row["sample_idx"] for row in found[:2]] == [2, 4]
    assert any("truncated completions (1) are among them" in note for note in summary.notes)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_pair_is_two_completions_of_a_prompt_with_their_tokens(tmp_path: Path, kind: Any) -> None:
    found, summary = written(tmp_path, kind)
    [pair] = found
    assert pair["prompt"] == [{"role": "user", "content": "q"}]
    assert (pair["chosen"], pair["rejected"]) == (said("0.2"), said("0.5"))
    assert (pair["score_chosen"], pair["score_rejected"]) == (1.0, 0.0)
    assert (pair["chosen_sample_idx"], pair["rejected_sample_idx"]) == (2, 5)
    assert "margin" not in pair  # RewardTrainer would subtract it
    before = [1, 2] if kind == "reward" else []
    assert pair["chosen_ids"] == [*before, 12, 5]
    assert pair["rejected_ids"] == [*before, 15, 5]
    assert pair.get("prompt_ids") == ([1, 2] if kind == "dpo" else None)
    assert (summary.data_rows, summary.completions) == (1, 2)
    assert any(note.startswith("data rows (1) give none: no two") for note in summary.notes)


def test_labels_by_threshold_and_their_numbers(tmp_path: Path) -> None:
    found, summary = written(tmp_path, "kto", pass_threshold=1.0, fail_threshold=0.0)
    labels = {row["completion"][0]["content"]: row["label"] for row in found}
    assert labels == {"0.2": True, "0.5": False, "1.0": False, "1.1": False}
    assert found[0]["prompt_ids"] == [1, 2]
    assert found[0]["completion_ids"] == [12, 5]
    assert "1 desirable, 3 undesirable" in summary.notes
    between = "completions with a reward between the thresholds (1) are in no example"
    assert between in summary.notes


@pytest.mark.parametrize(
    ("dedupe", "kept"), [("text", ["x", "y"]), ("tokens", ["x", "x", "y"]), ("none", list("xxxy"))]
)
def test_equal_completions_of_a_prompt_are_taken_once(
    tmp_path: Path, dedupe: str, kept: list[str]
) -> None:
    ids = [np.array(each, np.int32) for each in ([7, 5], [7, 5], [8, 5], [9, 5])]
    rows = [
        completion(0, i, 1.0, response=text, completion_ids=ids[i])
        for i, text in enumerate(["x", "x", "x", "y"])
    ]
    found, _ = written(tmp_path, "sft", *rows, best=9, dedupe=dedupe)
    assert [row["completion"][0]["content"] for row in found] == kept


def test_a_pair_has_one_prompt_to_the_token(tmp_path: Path) -> None:
    other = np.array([1, 3], np.int32)
    rows = [
        completion(0, 0, 1.0), completion(0, 1, 0.0, prompt_ids=other),
        completion(0, 2, 0.5), completion(0, 3, 0.25, prompt_ids=other),
    ]  # fmt: skip
    found, _ = written(tmp_path, "dpo", *rows, pairs="all")
    assert [(row["chosen_sample_idx"], row["rejected_sample_idx"]) for row in found] == [
        (0, 2),
        (3, 1),
    ]
    assert [row["prompt_ids"] for row in found] == [[1, 2], [1, 3]]


def test_tools_and_arguments_of_the_chat_template_go_along(tmp_path: Path) -> None:
    sampling = msgspec.structs.replace(SAMPLING, chat_template_kwargs={"enable_thinking": False})
    metadata = msgspec.structs.replace(METADATA, sampling=sampling)
    rows = [completion(0, i, float(i), prompt=PROMPTS[2], tools=[TOOL]) for i in range(2)]
    source = rollouts(tmp_path / "a.parquet", *rows, metadata=metadata)
    convert(source, tmp_path / "b.parquet", to_format="dpo")
    [pair] = loaded(tmp_path / "b.parquet")
    assert msgspec.json.decode(pair["tools"]) == [TOOL]
    assert pair["chat_template_kwargs"] == {"enable_thinking": False}
    assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "tool"]


def test_another_reward_can_choose(tmp_path: Path) -> None:
    rows = [
        completion(0, i, scores={"reward": Score(reward=i), "reward_b": Score(reward=-i)})
        for i in range(3)
    ]
    found, _ = written(tmp_path, "sft", *rows, reward="b")
    assert [row["sample_idx"] for row in found] == [0]
    with pytest.raises(JobError, match="no reward 'c'"):
        written(tmp_path, "sft", *rows, name="c.parquet", reward="c")
    assert REWARD_B.evaluator == METADATA.rewards["reward_b"].evaluator


def test_nothing_is_written_where_there_is_no_example(tmp_path: Path) -> None:
    rows = [completion(0, 0, 1.0), completion(0, 1, 1.0), completion(0, 2)]
    with pytest.raises(JobError, match=r"not one example for dpo.*without a reward \(1\)"):
        written(tmp_path, "dpo", *rows)
    with pytest.raises(JobError, match="best is for sft"):
        written(tmp_path, "dpo", *rows, best=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
