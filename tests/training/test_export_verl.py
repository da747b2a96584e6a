"""Tensors in verl's shape; with verl installed, its own DataProto and code take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training import advantages
from eval_protocol_rft.training._batch import build_batch
from eval_protocol_rft.training._filters import Filters
from eval_protocol_rft.training._types import (
    ExportError,
    MissingPackageError,
    PromptGroup,
    Trajectory,
)
from eval_protocol_rft.training.export import verl
from tests.training_batches import batch_of, prompt_groups
from tests.training_rows import scored

torch = pytest.importorskip("torch")


def two_datums() -> Any:
    short = Trajectory(
        tokens=[1, 2, 3], logprobs=[0, 0, -0.5], loss_mask=[0, 0, 1], reward=1.0, row_id="r"
    )
    turns = Trajectory(
        tokens=[4, 5, 6, 7, 8],
        logprobs=[0, -1, 0, -2, -3],
        loss_mask=[0, 1, 0, 1, 1],
        reward=0.0,
        row_id="r",
        completion=1,
    )
    return build_batch([PromptGroup(key="k", trajectories=(short, turns))], algorithm="dr_grpo")


def test_two_datums_by_hand() -> None:
    tensors, non_tensors, _ = verl.to_tensors(two_datums(), pad_token_id=9)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "prompts": [[1, 2], [9, 4]],
        "responses": [[3, 9, 9, 9], [5, 6, 7, 8]],
        "input_ids": [[1, 2, 3, 9, 9, 9], [9, 4, 5, 6, 7, 8]],
        "attention_mask": [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 2, 2, 2], [0, 0, 1, 2, 3, 4]],
        "response_mask": [[1, 0, 0, 0], [1, 0, 1, 1]],
        "rollout_log_probs": [[-0.5, 0, 0, 0], [-1, 0, -2, -3]],
        "rm_scores": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "token_level_scores": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "token_level_rewards": [[1, 0, 0, 0], [0, 0, 0, 0]],
        "advantages": [[0.5, 0, 0, 0], [-0.5, 0, -0.5, -0.5]],
        "returns": [[0.5, 0, 0, 0], [-0.5, 0, -0.5, -0.5]],
    }
    assert len(set(non_tensors["uid"])) == 1
    assert non_tensors["row_id"].tolist() == ["r", "r"]
    assert non_tensors["completion"].tolist() == [0, 1]


def test_ids_are_integers_and_values_float32() -> None:
    tensors, _, _ = verl.to_tensors(two_datums(), pad_token_id=9)
    floats = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert floats == {
        "rollout_log_probs", "rm_scores", "token_level_scores", "token_level_rewards",
        "advantages", "returns",
    }  # fmt: skip
    assert {t.dtype for name, t in tensors.items() if name not in floats} == {torch.int64}


def test_every_sampled_token_stands_in_a_response_once() -> None:
    batch = batch_of(prompt_groups(groups=6))
    tensors, _, _ = verl.to_tensors(batch, pad_token_id=0, prompt_length=10, response_length=40)
    assert tensors["prompts"].shape == (24, 10)
    assert tensors["responses"].shape == (24, 40)
    for i, datum in enumerate(batch.datums):
        mask = tensors["response_mask"][i].bool()
        assert tensors["responses"][i][mask].tolist() == datum.target_tokens[datum.mask].tolist()
        logprobs = tensors["rollout_log_probs"][i]
        assert logprobs[mask].tolist() == datum.logprobs[datum.mask].tolist()
        assert not logprobs[~mask].any()
        attended = tensors["input_ids"][i][tensors["attention_mask"][i].bool()].tolist()
        assert attended == [*datum.input_tokens.tolist(), int(datum.target_tokens[-1])]
        assert tensors["token_level_rewards"][i].sum() == datum.reward


def test_prompt_groups_of_two_batches_stay_apart() -> None:
    first, second = (verl.to_tensors(two_datums(), pad_token_id=0) for _ in range(2))
    assert not set(first.non_tensors["uid"]) & set(second.non_tensors["uid"])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"prompt_length": 1}, "'r', completion 0: its prompt has 2 tokens, prompt_length is 1"),
        ({"response_length": 3}, "completion 1: its response has 4 tokens, response_length is 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_cut(lengths: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        verl.to_tensors(two_datums(), pad_token_id=0, **lengths)


def test_a_batch_that_is_divided_already_is_refused() -> None:
    batch = batch_of(prompt_groups(), normalization="token")
    with pytest.raises(ExportError, match=r'normalization="token" .* verl divides'):
        verl.to_tensors(batch, pad_token_id=0)


def test_verls_own_code_computes_our_advantages() -> None:
    pytest.importorskip("verl", reason="needs verl")
    trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    model = pytest.importorskip("verl.utils.model")
    batch = batch_of(prompt_groups(groups=5), algorithm="dr_grpo")
    data = verl.to_data_proto(batch, pad_token_id=0)
    data.check_consistency()
    assert torch.equal(
        model.compute_position_id_with_mask(data.batch["attention_mask"]),
        data.batch["position_ids"],
    )
    ours = data.batch["advantages"].clone()
    theirs = trainer.compute_advantage(
        data, algos.AdvantageEstimator.GRPO, norm_adv_by_std_in_grpo=False
    )
    np.testing.assert_allclose(theirs.batch["advantages"], ours, atol=1e-6)


def test_a_reward_stands_on_the_last_sampled_token_not_on_what_was_said_behind_it() -> None:
    ends_masked = Trajectory(
        tokens=[1, 2, 3, 4], logprobs=[0, -1, 0, 0], loss_mask=[0, 1, 0, 0], reward=0.5
    )
    other = Trajectory(tokens=[1, 2], logprobs=[0, -1], loss_mask=[0, 1], reward=1.0)
    batch = build_batch([PromptGroup(key="k", trajectories=(ends_masked, other))])
    tensors, _, _ = verl.to_tensors(batch, pad_token_id=9)
    assert tensors["responses"].tolist() == [[2, 3, 4], [2, 9, 9]]
    for name in ("rm_scores", "token_level_scores", "token_level_rewards"):
        assert tensors[name].tolist() == [[0.5, 0, 0], [1, 0, 0]]
        assert not tensors[name][tensors["response_mask"] == 0].any()


def test_completions_that_count_in_the_baseline_alone_are_refused() -> None:
    """verl computes the baseline from the rows that it has: 0.5 here, and ours is 1/3."""
    rows = [scored("a", 1.0, 0.0, 0.0, truncated=[2])]
    masked = build_batch(rows, algorithm="dr_grpo", filters=Filters(truncated="mask"))
    with pytest.raises(ExportError, match=r'1 completions .* \(truncated="mask"\)'):
        verl.to_tensors(masked, pad_token_id=0)
    for kept in ("keep", "drop"):
        batch = build_batch(rows, algorithm="dr_grpo", filters=Filters(truncated=kept))
        tensors, _, _ = verl.to_tensors(batch, pad_token_id=0)
        rewards = tensors["token_level_rewards"].sum(dim=1)
        ours = tensors["advantages"][:, 0]
        np.testing.assert_allclose(ours, rewards - rewards.mean(), atol=1e-6)


METRICS = [{"right": 1.0, "short": 0.0}, {"right": 0.0, "short": 1.0}, {"right": 0.0, "short": 0.5}]


def by_components(metrics: list[dict[str, float]]) -> Any:
    rows = [scored(name, 1.0, 0.5, 0.25, metrics=metrics) for name in "ab"]
    names = tuple(metrics[0])
    return build_batch(rows, estimator=advantages.gdpo, components=names)


def test_components_stand_under_their_names() -> None:
    _, non_tensors, _ = verl.to_tensors(by_components(METRICS), pad_token_id=0)
    assert non_tensors["right"].tolist() == [1.0, 0.0, 0.0] * 2
    assert non_tensors["short"].tolist() == [0.0, 1.0, 0.5] * 2
    assert "right" not in verl.to_tensors(two_datums(), pad_token_id=0).non_tensors
    lacking = by_components([METRICS[0], METRICS[1], {"right": 0.0}])
    with pytest.raises(ExportError, match="row 'a', completion 2: it has no component 'short'"):
        verl.to_tensors(lacking, pad_token_id=0)
    with pytest.raises(ExportError, match="called 'uid'"):
        verl.to_tensors(by_components([{"uid": m["right"]} for m in METRICS]), pad_token_id=0)


def test_verls_own_gdpo_reads_them() -> None:
    pytest.importorskip("verl", reason="needs verl")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    data = verl.to_data_proto(by_components(METRICS), pad_token_id=0)
    theirs, _ = algos.compute_gdpo_outcome_advantage(
        token_level_rewards=data.batch["token_level_rewards"],
        response_mask=data.batch["response_mask"],
        index=data.non_tensor_batch["uid"],
        config={"gdpo_reward_keys": ["right", "short"]},
        non_tensor_batch=data.non_tensor_batch,
        batch=data.batch,
    )
    # Both whiten over the batch, with different denominators.
    ratio = (theirs / data.batch["advantages"])[data.batch["response_mask"].bool()]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert ratio[0] == pytest.approx(1.0, rel=0.2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eval-protocol-rft\[local\]'"):
        verl.to_tensors(two_datums(), pad_token_id=0)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(MissingPackageError, match="pip install 'verl'"):
        verl.to_data_proto(two_datums(), pad_token_id=0)
