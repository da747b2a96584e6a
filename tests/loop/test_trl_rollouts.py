"""`trl_rollouts`: what a trainer of TRL's shape gets, with the local model and over HTTP; and, with
the marker `trl`, a real `GRPOTrainer` that learns."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest import evaluation_test
from transformers import AutoTokenizer

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop import trl as loop_trl
from eval_protocol_rft.loop._run_options import SetupError
from eval_protocol_rft.loop._trainer import TrainerError
from eval_protocol_rft.loop._watch import (
    UNSCORED_GROUPS,
    NothingToTrainOnError,
    TrainingStoppedError,
)
from eval_protocol_rft.loop.trl import TrlRollouts, trl_rollouts
from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor
from eval_protocol_rft.training._types import MissingPackageError, require
from examples.sums import test_sums as sums
from tests.loop.policies import change, forward_logprobs, grpo_trainer

FOLDER = bundled_model_path("arithmetic")
G = 4


@pytest.fixture(autouse=True)
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is looked at; the trainers of most tests here are none of its."""
    monkeypatch.setattr(loop_trl, "_require_trl", lambda: None)


def rows(*sums: tuple[int, int]) -> list[EvaluationRow]:
    return [
        EvaluationRow(messages=[Message(role="user", content=f"{a}+{b}=")], ground_truth=str(a + b))
        for a, b in sums
    ]


def prompt(a: int, b: int) -> list[dict[str, Any]]:
    """As TRL passes it on, with the nulls of a data set's columns."""
    return [{"role": "user", "content": f"{a}+{b}=", "tool_calls": None}]


@pytest.fixture
def rollouts() -> Any:
    with trl_rollouts(sums.test_sums, rows((12, 34), (56, 41), (20, 30))) as made:
        yield made


def test_of_several_sets_of_parameters_one_must_be_chosen() -> None:
    sets = [{"model": "local/arithmetic"}, {"model": "local/other"}]

    def pass_on(row: EvaluationRow) -> EvaluationRow:
        return row

    # Eval Protocol looks at the annotations as they are, and here they are text.
    pass_on.__annotations__ = {"row": EvaluationRow, "return": EvaluationRow}
    test = evaluation_test(
        input_rows=[rows((1, 2))],
        completion_params=sets,
        rollout_processor=FireworksTrainingRolloutProcessor(),
    )(pass_on)
    with pytest.raises(SetupError, match="2 sets of completion_params: choose a model"):
        trl_rollouts(test)
    with trl_rollouts(test, model="local/arithmetic", completion_params={"n": 1}) as made:
        assert made.model == str(FOLDER)


def test_each_completion_is_scored_with_the_row_behind_its_prompt(rollouts: TrlRollouts) -> None:
    asked = [prompt(56, 41)] * G + [prompt(12, 34)] * 2 * G
    result = rollouts(asked, grpo_trainer(rollouts))
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    answers = ["97"] * G + ["46"] * 2 * G
    said = tokenizer.batch_decode(result["completion_ids"], skip_special_tokens=True)
    assert result["reward"] == [float(a.strip() == b) for a, b in zip(said, answers, strict=True)]
    for asked_prompt, ids in zip(asked, result["prompt_ids"], strict=True):
        messages = [{"role": m["role"], "content": m["content"]} for m in asked_prompt]
        assert ids == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    assert (
        rollouts.reward(**{k: v for k, v in result.items() if k != "logprobs"})
        == (result["reward"])
    )
    groups = [result["completion_ids"][i : i + G] for i in range(0, 3 * G, G)]
    assert groups[1] != groups[2]  # the same prompt twice is two draws


def test_every_step_samples_from_the_weights_that_the_trainer_has(rollouts: TrlRollouts) -> None:
    trainer = grpo_trainer(rollouts)
    change(trainer.model)  # not what training began with: a run that was resumed
    for step in range(3):
        trainer.state.global_step = step
        result = rollouts([prompt(12, 34)] * G + [prompt(20, 30)] * G, trainer)
        for i in range(2 * G):
            expected = forward_logprobs(
                trainer.model, result["prompt_ids"][i], result["completion_ids"][i]
            )
            np.testing.assert_allclose(result["logprobs"][i], expected, atol=1e-4)
        assert rollouts.last.tokens > 0
        assert rollouts.last.mean_ratio == pytest.approx(1, abs=1e-5)
        change(trainer.model, seed=step)
    assert trainer.model.training
    # Without a step, as `load_best_model_at_end` does.
    result = rollouts([prompt(12, 34)] * G, trainer)
    expected = forward_logprobs(trainer.model, result["prompt_ids"][0], result["completion_ids"][0])
    np.testing.assert_allclose(result["logprobs"][0], expected, atol=1e-4)


def test_steps_draw_anew_and_evaluations_draw_the_same(rollouts: TrlRollouts) -> None:
    trainer = grpo_trainer(rollouts, num_generations_eval=2)
    drawn = []
    for step in range(2):
        trainer.state.global_step = step
        drawn.append(rollouts([prompt(20, 30)] * G, trainer)["completion_ids"])
    assert drawn[0] != drawn[1]
    trainer.model.eval()
    one, other = (rollouts([prompt(20, 30)] * 2, trainer)["completion_ids"] for _ in range(2))
    assert one == other


def test_metrics_reach_the_log(rollouts: TrlRollouts) -> None:
    logged: dict[str, float] = {}
    rollouts([prompt(20, 30)] * G, grpo_trainer(rollouts))
    rollouts.reward(reward=[1.0], log_metric=logged.__setitem__)
    assert logged["sampler/ratio"] == pytest.approx(1, abs=1e-5)
    assert logged["sampler/compared_tokens"] > 0


@pytest.mark.parametrize("name", ["foreign", "step-0"])
def test_weights_of_others_in_the_sampler_stop_the_run(rollouts: TrlRollouts, name: str) -> None:
    trainer = grpo_trainer(rollouts)
    rollouts([prompt(20, 30)] * G, trainer)
    other = copy.deepcopy(trainer.model)
    change(other)
    sampler = rollouts._sampler
    rollouts._thread.run(sampler.load_weights(other.state_dict(), policy_version=name))
    message = "'foreign', and 'step-0' was published" if name == "foreign" else "does not draw from"
    with pytest.raises(TrainingStoppedError, match=message):
        rollouts([prompt(20, 30)] * G, trainer)


def test_a_prompt_without_a_row_is_refused(rollouts: TrlRollouts) -> None:
    trainer = grpo_trainer(rollouts)
    with pytest.raises(SetupError, match=r"no row has the prompt .*99\+99="):
        rollouts([prompt(99, 99)] * G, trainer)
    with pytest.raises(SetupError, match="no row has the prompt"):
        rollouts(["12+34="] * G, trainer)


def test_repetitions_that_are_no_groups_are_refused(rollouts: TrlRollouts) -> None:
    with pytest.raises(SetupError, match="6 times, which is no multiple of the 4"):
        rollouts([prompt(12, 34)] * 6, grpo_trainer(rollouts))


def test_one_prompt_of_two_rows_is_refused_where_they_differ() -> None:
    with trl_rollouts(sums.test_sums, [*rows((12, 34)), *rows((12, 34))]) as made:
        assert len(made._rows) == 1
    wrong = rows((12, 34))
    wrong[0].ground_truth = "47"
    with pytest.raises(SetupError, match="have the same prompt and differ otherwise"):
        trl_rollouts(sums.test_sums, [*rows((12, 34)), *wrong])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": [lambda **_: 0.0]}, "reward_funcs=rollouts.reward"),
        ({"args": SimpleNamespace(temperature=0.7, max_completion_length=8)}, "temperature=1.0"),
        ({"args": SimpleNamespace(temperature=1.0, max_completion_length=4)}, "to at most 4"),
        ({"accelerator": SimpleNamespace(num_processes=2)}, "in 2 processes"),
    ],
)
def test_settings_that_contradict_ours_are_refused(
    rollouts: TrlRollouts, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        rollouts([prompt(12, 34)] * G, grpo_trainer(rollouts, **changes))


def test_a_second_trainer_is_refused(rollouts: TrlRollouts) -> None:
    rollouts([prompt(12, 34)] * G, grpo_trainer(rollouts))
    with pytest.raises(SetupError, match="belongs to one trainer"):
        rollouts([prompt(12, 34)] * G, grpo_trainer(rollouts))


def test_nothing_scored_ends_the_run() -> None:
    def broken(row: EvaluationRow) -> EvaluationRow:
        raise KeyError("ground_truth")

    params = {"model": "local/arithmetic", "max_tokens": 8}
    with (
        trl_rollouts(broken, rows((12, 34)), completion_params=params) as made,
        pytest.raises(NothingToTrainOnError, match="KeyError"),
    ):
        made([prompt(12, 34)] * G, grpo_trainer(made))


def test_a_batch_with_scores_behind_many_failures_is_no_end() -> None:
    """Its rows are sampled at once: what stands first in it did not come first."""
    known = UNSCORED_GROUPS + 1

    def scores_the_last(row: EvaluationRow) -> EvaluationRow:
        if int(str(row.ground_truth)) != known:
            raise KeyError("ground_truth")
        row.evaluation_result = EvaluateResult(score=1.0)
        return row

    params = {"model": "local/arithmetic", "max_tokens": 8}
    asked = [(number, 0) for number in range(1, known + 1)]
    with trl_rollouts(scores_the_last, rows(*asked), completion_params=params) as made:
        trainer = grpo_trainer(made, num_generations=1)
        result = made([prompt(*pair) for pair in asked], trainer)
        assert result["reward"] == [None] * UNSCORED_GROUPS + [1.0]
        # Behind the last score they count, over batches too.
        made([prompt(*pair) for pair in asked[:40]], trainer)
        with pytest.raises(NothingToTrainOnError, match="64 rows in a row"):
            made([prompt(*pair) for pair in asked[:40]], trainer)


def test_what_can_not_be_set_up_is_refused_at_once() -> None:
    data = rows((1, 2))
    with pytest.raises(SetupError, match="greedily"):
        trl_rollouts(sums.test_sums, data, completion_params={"temperature": 0, "n": 1})
    served = {"model": "m", "api_base": "http://127.0.0.1:1/v1"}
    with pytest.raises(SetupError, match="weights="):
        trl_rollouts(sums.test_sums, data, completion_params=served)
    with pytest.raises(SetupError, match="names its own"):
        trl_rollouts(sums.test_sums, data, weights=str(FOLDER))
    with pytest.raises(SetupError, match="no rows"):
        trl_rollouts(sums.test_sums, [])


def test_an_older_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(loop_trl.metadata, "version", lambda name: "0.29.1")
    with pytest.raises(MissingPackageError, match=r"trl 0\.29\.1 .*trl>=1\.0"):
        trl_rollouts(sums.test_sums, rows((1, 2)))


def test_adapters_are_merged_or_refused(rollouts: TrlRollouts) -> None:
    peft = pytest.importorskip("peft")
    trainer = grpo_trainer(rollouts)
    model = peft.get_peft_model(
        trainer.model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    trainer.model = model.train()
    result = rollouts([prompt(12, 34)] * G, trainer)
    expected = forward_logprobs(model, result["prompt_ids"][0], result["completion_ids"][0])
    np.testing.assert_allclose(result["logprobs"][0], expected, atol=1e-4)
    with trl_rollouts(sums.test_sums, rows((12, 34))) as made:
        trainer = grpo_trainer(made)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
        trainer.model = peft.get_peft_model(trainer.model, config).train()
        with pytest.raises(TrainerError, match="no plain LoRA"):
            made([prompt(12, 34)] * G, trainer)


@pytest.mark.trl
def test_grpo_trainer_learns(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute on one core: sums of two digits, from a quarter right to a good third."""
    trl = pytest.importorskip("trl", reason="needs trl>=1.0")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    with trl_rollouts(sums.test_sums) as made:
        trainer = trl.GRPOTrainer(
            model=made.model,
            args=trl.GRPOConfig(
                output_dir=str(tmp_path),
                temperature=made.temperature,
                max_completion_length=8,
                num_generations=8,
                per_device_train_batch_size=256,
                learning_rate=5e-4,
                adam_beta2=0.99,
                max_steps=40,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                bf16=False,
                save_strategy="no",
            ),
            train_dataset=made.dataset,
            rollout_func=made,
            reward_funcs=made.reward,
        )
        assert trainer.train().global_step == 40
    steps = [line for line in trainer.state.log_history if "reward" in line]
    rewards = [line["reward"] for line in steps]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.08
    for line in steps:
        assert line["sampler/compared_tokens"] > 0
        assert line["sampler/ratio"] == pytest.approx(1, abs=1e-4)


def test_the_data_set_has_the_prompts(rollouts: TrlRollouts) -> None:
    require("datasets", install="datasets")
    asked = [line["prompt"] for line in rollouts.dataset]
    assert [messages[0]["content"] for messages in asked] == ["12+34=", "56+41=", "20+30="]
    result = rollouts([asked[1]] * G, grpo_trainer(rollouts))
    assert len(result["reward"]) == G
