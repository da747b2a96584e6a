"""The estimators beside those of verl. Optional: needs verl (and ray, tensordict) installed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from eval_protocol_rft.training import advantages

torch = pytest.importorskip("torch")
verl = pytest.importorskip("verl.trainer.ppo.core_algos")

REWARDS = np.random.default_rng(3).choice([0.0, 0.25, 0.5, 1.0], size=(6, 5))
REWARDS[2] = 0.5  # no variance


def by_verl(estimator, **kwargs) -> np.ndarray:
    """verl works on [completions, tokens]; one token each makes it ours."""
    index = np.repeat(np.arange(len(REWARDS)), REWARDS.shape[1])
    rewards = torch.tensor(REWARDS.reshape(-1, 1))
    result, _ = estimator(
        token_level_rewards=rewards, response_mask=torch.ones_like(rewards), index=index, **kwargs
    )
    return result.numpy().reshape(REWARDS.shape)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            partial(advantages.grpo, ddof=1, eps=1e-6),
            partial(verl.compute_grpo_outcome_advantage, epsilon=1e-6),
        ),
        (
            advantages.dr_grpo,
            partial(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        ),
        (advantages.rloo, verl.compute_rloo_outcome_advantage),
        (
            partial(advantages.reinforce_pp, group_baseline=True, ddof=1),
            verl.compute_reinforce_plus_plus_baseline_outcome_advantage,
        ),
    ],
)
def test_the_estimator_agrees_with_verl(ours, theirs):
    assert ours(REWARDS) == pytest.approx(by_verl(theirs), abs=1e-6)


def test_reinforce_pp_agrees_with_verl():
    rewards = torch.tensor(REWARDS.reshape(-1, 1))
    config = type("Config", (), {"gamma": 1.0})()
    result, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, torch.ones_like(rewards), config=config
    )
    ours = advantages.reinforce_pp(REWARDS, ddof=1)
    assert ours.reshape(-1, 1) == pytest.approx(result.numpy(), abs=1e-6)
