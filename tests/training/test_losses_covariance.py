"""Clip-Cov and KL-Cov, which look at all tokens of a batch: by brute force, and in their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval_protocol_rft.training.losses import LossError, PolicyTensors, make_loss
from tests.training.test_losses_reference import draw_batch, flat, padded

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
COVARIANCE = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 3.0}
PENALTY = {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5}


def losses_of(name: str, tensors: PolicyTensors, **config: float) -> torch.Tensor:
    return make_loss(name, config).policy_loss(tensors).loss


def covariances(tensors: PolicyTensors) -> np.ndarray:
    """Of the sampled tokens, in order."""
    sampled = tensors.sampled
    lp = tensors.logprobs.detach()[sampled].numpy()
    a = tensors.advantages[sampled].numpy()
    return np.array([(x - lp.mean()) * (y - a.mean()) for x, y in zip(lp, a, strict=True)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kl_cov_penalises_the_tokens_of_highest_covariance_and_clips_none(seed: int) -> None:
    tensors = flat(draw_batch(seed), "old")
    sampled = tensors.sampled
    got = losses_of("kl_cov", tensors, **PENALTY)[sampled]
    plain = losses_of("importance_sampling", tensors)[sampled]
    count = int(0.2 * len(got))
    highest = np.argsort(-covariances(tensors))[:count]
    penalty = torch.zeros_like(plain)
    distance = (tensors.logprobs - tensors.sampling_logprobs)[sampled].abs()
    penalty[highest] = 0.5 * distance[highest]
    torch.testing.assert_close(got, plain + penalty)
    (gradient,) = torch.autograd.grad(got.sum(), tensors.logprobs)
    (expected,) = torch.autograd.grad((plain + penalty).sum(), tensors.logprobs)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clip_cov_leaves_out_some_of_the_tokens_between_its_bounds(seed: int) -> None:
    tensors = flat(draw_batch(seed), "old")
    sampled = tensors.sampled
    result = make_loss("clip_cov", {**CLIP, **COVARIANCE}).policy_loss(tensors)
    ppo = make_loss("ppo", CLIP).policy_loss(tensors)
    assert result.clipped is not None
    assert ppo.clipped is not None
    left_out = (result.clipped & ~ppo.clipped)[sampled]
    cov = covariances(tensors)
    eligible = torch.tensor((cov > 0.1) & (cov < 3.0)) & ~ppo.clipped[sampled]
    assert not (left_out & ~eligible).any()
    assert left_out.sum() == min(int(0.2 * len(cov)), int(eligible.sum())) > 0
    torch.testing.assert_close(result.loss[sampled][~left_out], ppo.loss[sampled][~left_out])
    assert not result.loss[sampled][left_out].any()
    (gradient,) = torch.autograd.grad(result.loss.sum(), tensors.logprobs)
    assert not gradient[sampled][left_out].any()


def test_the_seed_decides_which_are_left_out_and_nothing_else_does() -> None:
    tensors = flat(draw_batch(1), "old")
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(len(draws))
        draws.append(losses_of("clip_cov", tensors, **CLIP, **COVARIANCE, seed=seed))
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_bounds_that_no_covariance_reaches_leave_ppo_and_no_penalty_leaves_the_plain_ratio() -> (
    None
):
    tensors = flat(draw_batch(2), "old")
    far = {"clip_cov_ratio": 1.0, "clip_cov_lb": 1e6, "clip_cov_ub": 1e7}
    got = losses_of("clip_cov", tensors, **CLIP, **far)
    torch.testing.assert_close(got, losses_of("ppo", tensors, **CLIP))
    free = losses_of("kl_cov", tensors, kl_cov_ratio=1.0, ppo_kl_coef=0.0)
    torch.testing.assert_close(free, losses_of("importance_sampling", tensors))


@pytest.mark.parametrize(
    ("name", "config"), [("clip_cov", {**CLIP, **COVARIANCE}), ("kl_cov", PENALTY)]
)
@pytest.mark.parametrize("junk", [0.0, -7.5, float("nan"), float("inf")])
def test_padding_changes_nothing(name: str, config: dict[str, float], junk: float) -> None:
    batch, results = draw_batch(5), []
    for tensors in (flat(batch, "old"), padded(batch, "old", width=17, junk=junk)):
        loss, metrics = make_loss(name, config).on_tensors(tensors)
        (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
        results.append((loss, gradient[tensors.sampled], torch.tensor(list(metrics.values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_batch_without_sampled_tokens_has_no_loss(name: str) -> None:
    zeros = torch.zeros(2, 3)
    tensors = PolicyTensors(
        logprobs=zeros.clone().requires_grad_(),
        sampling_logprobs=zeros,
        advantages=zeros,
        weights=zeros,
    )
    config = {**CLIP, **COVARIANCE} if name == "clip_cov" else PENALTY
    assert make_loss(name, config).on_tensors(tensors)[0].item() == 0.0


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("clip_cov", {**CLIP, **COVARIANCE, "clip_cov_ratio": 0.0}, "clip_cov_ratio is a share"),
        ("clip_cov", {**CLIP, **COVARIANCE, "clip_cov_ub": 0.1}, "clip_cov_lb must be below"),
        ("clip_cov", {**COVARIANCE, "clip_low_threshold": 0.8, "clip_high_threshold": 0.2}, "abs"),
        ("kl_cov", {**PENALTY, "kl_cov_ratio": 1.5}, "kl_cov_ratio is a share"),
        ("kl_cov", {**PENALTY, "ppo_kl_coef": -1.0}, "ppo_kl_coef is finite"),
        ("sapo", {"tau_pos": 0.0, "tau_neg": 1.0}, "tau_pos is a temperature"),
        ("geo_mean", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.2}, "GMPO clips the log"),
        (
            "dppo_tv",
            {"divergence_low_threshold": -1, "divergence_high_threshold": 1, "ratio_cap": 2},
            "divergence_low_threshold bounds a divergence",
        ),
        (
            "dppo_kl",
            {"divergence_low_threshold": 1, "divergence_high_threshold": 1, "ratio_cap": 0.5},
            "ratio_cap bounds",
        ),
    ],
)
def test_settings_out_of_range_are_refused(
    name: str, config: dict[str, float], message: str
) -> None:
    with pytest.raises(LossError, match=message):
        make_loss(name, config)
