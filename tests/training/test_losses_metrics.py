"""What a loss reports, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eval_protocol_rft.training.losses._corrections import TokenTIS
from eval_protocol_rft.training.losses._objective import make_loss
from eval_protocol_rft.training.losses._tensors import LossError, PolicyTensors
from tests.training.test_losses_reference import REFERENCES, Tokens, draw_batch, flat

torch.set_num_threads(1)
PPO = REFERENCES["ppo"][0]


def metrics_of(tensors: PolicyTensors, name: str = "ppo") -> dict[str, float]:
    return make_loss(name, REFERENCES[name][0]).on_tensors(tensors)[1]


def tokens_with_ratios(ratios: list[float], advantages: list[float]) -> PolicyTensors:
    """One sequence with an unsampled token in front, and these ratios to the sampler after it."""
    q = [-2.0 - 0.1 * t for t in range(len(ratios))]
    lp = [x + math.log(r) for x, r in zip(q, ratios, strict=True)]
    size = len(ratios)
    return flat(
        [
            Tokens(
                lp=[-9.0, *lp],
                q=[0.0, *q],
                advantages=[0.0, *advantages],
                weights=[0.0] + [1.0] * size,
                mask=[False] + [True] * size,
                old=[0.0, *q],
                reference=[0.0, *q],
            )
        ],
        "old",
        "reference",
    )


def test_ratio_clipping_and_sample_size_of_four_tokens() -> None:
    ratios = [0.5, 1.0, 1.5, 3.0]
    metrics = metrics_of(tokens_with_ratios(ratios, [-1.0, 1.0, 1.0, -1.0]))
    assert metrics["tokens:sum"] == 4
    assert metrics["ratio:mean"] == pytest.approx(1.5)
    assert metrics["ratio:max"] == pytest.approx(3.0)
    # 0.5 with A < 0 and 1.5 with A > 0 are clipped; 3.0 with A < 0 is let through.
    assert metrics["clip_fraction:mean"] == 0.5
    assert metrics["effective_sample_fraction:mean"] == pytest.approx(6.0**2 / (4 * 12.5))
    assert metrics["sampler_entropy:mean"] == pytest.approx(2.15)


def test_k1_and_k3_of_two_tokens() -> None:
    metrics = metrics_of(tokens_with_ratios([2.0, 0.25], [1.0, 1.0]))
    assert metrics["sampler_kl_k1:mean"] == pytest.approx(-math.log(0.5) / 2)
    assert metrics["sampler_kl_k3:mean"] == pytest.approx((2.25 - 2 - math.log(0.5)) / 2)


def test_k1_and_k3_average_to_the_true_divergence_over_all_tokens_of_a_vocabulary() -> None:
    """Each token of a small vocabulary as often as the sampler draws it: no sampling noise."""
    q, p = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    drawn = [token for token, times in enumerate([5, 3, 2]) for _ in range(times)]
    tensors = PolicyTensors(
        logprobs=torch.tensor([p[t] for t in drawn]).double().log().requires_grad_(),
        sampling_logprobs=torch.tensor([q[t] for t in drawn]).double().log(),
        advantages=torch.zeros(10).double(),
        weights=torch.ones(10).double(),
    )
    metrics = metrics_of(tensors)
    divergence = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert metrics["sampler_kl_k1:mean"] == pytest.approx(divergence)
    assert metrics["sampler_kl_k3:mean"] == pytest.approx(divergence)
    entropy = -sum(b * math.log(b) for b in q)
    assert metrics["sampler_entropy:mean"] == pytest.approx(entropy)


def test_k3_sees_a_difference_that_single_precision_noise_would_hide() -> None:
    lp = torch.full((64,), -3.0, requires_grad=True)
    q = torch.full((64,), -3.0) + 1.2e-6
    tensors = PolicyTensors(
        logprobs=lp, sampling_logprobs=q, advantages=torch.ones(64), weights=torch.ones(64)
    )
    gap = float(q[0].double() + 3.0)
    k3 = metrics_of(tensors)["sampler_kl_k3:mean"]
    assert k3 == pytest.approx(gap**2 / 2, rel=1e-4, abs=0)
    assert 0 < k3 < 1e-12


def test_the_clip_fraction_counts_where_ppo_would_have_no_gradient() -> None:
    for seed in range(3):
        tensors = flat(draw_batch(seed), "old")
        loss, metrics = make_loss("ppo", PPO).on_tensors(tensors)
        (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
        still = (gradient == 0) & tensors.sampled & (tensors.advantages != 0)
        expected = still.sum().item() / tensors.sampled.sum().item()
        assert metrics["clip_fraction:mean"] == pytest.approx(expected)


def test_gspo_reports_the_ratio_of_sequences() -> None:
    tensors = tokens_with_ratios([0.5, 8.0], [1.0, 1.0])
    metrics = metrics_of(tensors, "gspo")
    assert metrics["ratio:mean"] == pytest.approx(2.0)
    assert metrics["ratio:max"] == pytest.approx(2.0)
    assert metrics["clip_fraction:mean"] == 1.0


def test_what_cannot_be_had_is_absent() -> None:
    tensors = flat(draw_batch(0), "old", "reference")
    absent = {"entropy:mean", "reference_kl_k3:mean", "correction:mean", "kl_loss:sum"}
    assert not absent & set(metrics_of(tensors))
    assert "clip_fraction:mean" not in metrics_of(tensors, "reinforce")


def test_what_the_batch_brings_is_reported() -> None:
    batch = draw_batch(0)
    tensors = replace(flat(batch), entropies=torch.arange(40).double())
    _, metrics = make_loss("ppo", PPO, correction=TokenTIS(cap=1.1)).on_tensors(tensors)
    sampled = tensors.sampled
    assert metrics["entropy:mean"] == pytest.approx(
        torch.arange(40).double()[sampled].mean().item()
    )
    pairs = [(s.reference[t] - s.lp[t], s.old[t] - s.q[t]) for s in batch for t in s.sampled()]
    k3 = sum(math.exp(x) - 1 - x for x, _ in pairs) / len(pairs)
    assert metrics["reference_kl_k3:mean"] == pytest.approx(k3)
    weights = [min(math.exp(x), 1.1) for _, x in pairs]
    assert metrics["correction:mean"] == pytest.approx(sum(weights) / len(weights))
    bounded = sum(math.exp(x) > 1.1 for _, x in pairs) / len(pairs)
    assert metrics["correction_bounded:mean"] == pytest.approx(bounded)


def test_keys_follow_the_reduction_rule_of_the_training_wire() -> None:
    tensors = replace(flat(draw_batch(0)), entropies=torch.ones(40).double())
    loss_fn = make_loss("dapo", REFERENCES["dapo"][0], correction=TokenTIS(cap=2.0), kl_beta=0.1)
    for key in loss_fn.on_tensors(tensors)[1]:
        name, reduction = key.split(":")
        assert name
        assert reduction in ("mean", "sum", "max")


def test_a_batch_in_which_nothing_was_sampled_has_no_loss_no_gradient_and_no_means() -> None:
    tensors = flat([replace(s, mask=[False] * len(s.lp)) for s in draw_batch(0)], "old")
    for name, (config, _) in REFERENCES.items():
        loss, metrics = make_loss(name, config).on_tensors(tensors)
        (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
        assert loss.item() == 0.0
        assert not gradient.any()
        assert metrics == {"policy_loss:sum": 0.0, "tokens:sum": 0.0}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("field", ["logprobs", "sampling_logprobs", "advantages", "entropies"])
@pytest.mark.parametrize("name", REFERENCES)
def test_an_input_that_is_not_finite_is_an_error_that_names_the_token(
    name: str, field: str, bad: float
) -> None:
    tensors = replace(flat(draw_batch(0), "old"), entropies=torch.ones(40).double())
    index = int(tensors.sampled.nonzero()[3])
    values = getattr(tensors, field).detach().clone()
    values[index] = bad
    with pytest.raises(LossError, match=rf"not finite: {field}\[{index}\] is {bad}"):
        metrics_of(replace(tensors, **{field: values}), name)
