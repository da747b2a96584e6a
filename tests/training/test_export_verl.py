"""Tensors in verl's shape; with verl installed, its own DataProto and code take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval_protocol_rft.training import Trajectory, build_batch
from eval_protocol_rft.training.export import ExportError, MissingPackageError, verl
from eval_protocol_rft.training.trajectory import PromptGroup
from tests.training_batches import batch_of, prompt_groups

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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eval-protocol-rft\[local\]'"):
        verl.to_tensors(two_datums(), pad_token_id=0)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(MissingPackageError, match="pip install 'verl'"):
        verl.to_data_proto(two_datums(), pad_token_id=0)
