"""What TRL's rollout_func returns; with TRL installed, its GRPOTrainer takes it for a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eval_protocol_rft
from eval_protocol_rft.training._prompt_groups import group_rows
from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory
from eval_protocol_rft.training.export import trl
from tests.training_batches import prompt_groups
from tests.training_rows import failed_row, scored


def test_a_result_by_hand() -> None:
    groups = group_rows([scored("a", 1.0, None, truncated=[1]), scored("b", 0.0, 0.5)])
    result = trl.rollout_result(groups, prompts=["a", "a", "b", "b"])
    assert result == {
        "prompt_ids": [[1, 2, 3]] * 4,
        "completion_ids": [[100, 101], [200, 201], [100, 101], [200, 201]],
        "logprobs": [[-0.25, -0.5]] * 4,
        "reward": [1.0, None, 0.0, 0.5],
        "truncated": [False, True, False, False],
        "row_id": ["a", "a", "b", "b"],
    }


def test_tool_output_is_masked() -> None:
    two_turns = Trajectory(
        tokens=[1, 2, 3, 4, 5],
        logprobs=[0, -0.5, 0, 0, -0.25],
        loss_mask=[0, 1, 0, 0, 1],
        reward=1.0,
    )
    result = trl.rollout_result([PromptGroup(key="k", trajectories=(two_turns,))])
    assert result["prompt_ids"] == [[1]]
    assert result["completion_ids"] == [[2, 3, 4, 5]]
    assert result["env_mask"] == [[1, 0, 0, 1]]
    assert result["logprobs"] == [[-0.5, 0.0, 0.0, -0.25]]


def test_the_recorded_reward_is_a_reward_function() -> None:
    reward = trl.recorded_reward(
        prompts=["a"], completions=["x"], completion_ids=[[1]], reward=[None], trainer_state=None
    )
    assert reward == [None]


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        ([scored("a", 1.0, failures=1)], ["a", "a"], "1 of its completions or rows failed"),
        ([scored("a", 1.0), failed_row("b")], ["a", "b"], "the first: no server"),
        ([scored("a", 1.0, 0.0)], ["a"], "has 2 completions .* prompts 0 to 1 of 1"),
        ([scored("a", 1.0, 0.0), scored("b", 1.0)], list("abb"), "prompts 0 to 1 of 3"),
        ([scored("a", 1.0)], ["a", "a"], "TRL gave 2 prompts, there are 1 completions"),
    ],
)
def test_a_completion_beside_the_wrong_prompt_is_refused(
    rows: list[Any], prompts: list[str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        trl.rollout_result(group_rows(rows), prompts=prompts)


def test_equal_prompts_of_two_rows_may_stand_together() -> None:
    groups = group_rows([scored("a", 1.0, 0.0), scored("b", 1.0, 0.0)])
    assert len(trl.rollout_result(groups, prompts=["same"] * 4)["reward"]) == 4


def test_grpo_trainer_takes_a_step_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    groups = prompt_groups(groups=2, size=4)
    small = [_within(group, vocabulary=32) for group in groups]
    seen: dict[str, Any] = {}

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen["prompts"] = prompts
        return trl.rollout_result(small, prompts=prompts)

    def reward(**columns: Any) -> list[float | None]:
        seen["reward"] = columns["reward"]
        return trl.recorded_reward(**columns)

    model = Path(eval_protocol_rft.__file__).parent / "models" / "arithmetic"
    trainer = consumer.GRPOTrainer(
        model=str(model),
        args=consumer.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}]),
        reward_funcs=reward,
        rollout_func=rollout_func,
    )
    assert trainer.train().global_step == 1
    assert len(seen["prompts"]) == 8
    assert seen["reward"] == [t.reward for group in small for t in group.trajectories]
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(np.mean(seen["reward"]))


def _within(group: PromptGroup, *, vocabulary: int) -> PromptGroup:
    return PromptGroup(
        key=group.key,
        trajectories=tuple(
            Trajectory(
                tokens=t.tokens % vocabulary,
                logprobs=t.logprobs,
                loss_mask=t.loss_mask,
                reward=t.reward,
            )
            for t in group.trajectories
        ),
    )
