"""Every policy loss against the token-by-token references: values, gradients, invariants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_protocol_rft.training.losses._objective import make_loss
from eval_protocol_rft.training.losses._policy import GSPO
from eval_protocol_rft.training.losses._tensors import LossError, PolicyTensors
from tests.training.test_losses_reference import (
    REFERENCES,
    Tokens,
    draw_batch,
    finite_differences,
    flat,
    padded,
    total,
)

torch.set_num_threads(1)
SEEDS = (0, 1, 2)
CLIPPED = ("ppo", "grpo", "dapo", "cispo", "gspo", "dppo_tv", "dppo_kl")


def value_and_gradient(name: str, tensors: PolicyTensors) -> tuple[float, torch.Tensor]:
    loss, _ = make_loss(name, REFERENCES[name][0]).on_tensors(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
    return loss.item(), gradient


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("old", [False, True], ids=["to-sampler", "to-old-policy"])
def test_value_is_the_weighted_sum_of_the_formula(name: str, seed: int, old: bool) -> None:
    batch = draw_batch(seed)
    value, _ = value_and_gradient(name, flat(batch, *([] if old else ["old"])))
    assert value == pytest.approx(total(batch, REFERENCES[name][1], old=old), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REFERENCES)
def test_gradient_is_the_finite_difference_of_the_formula(name: str, seed: int) -> None:
    batch = draw_batch(seed)
    _, gradient = value_and_gradient(name, flat(batch, "old"))
    reference = REFERENCES[name][1]
    expected = finite_differences(batch, lambda moved: total(moved, reference, fixed=batch))
    torch.testing.assert_close(gradient, torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)


SMOOTH = ("ppo", "dapo", "dro", "importance_sampling", "reinforce", "geo_mean", "sapo")


@pytest.mark.parametrize("name", SMOOTH)
def test_losses_without_stop_gradients_pass_gradcheck(name: str) -> None:
    tensors = flat(draw_batch(0), "old")
    loss_fn = make_loss(name, REFERENCES[name][0])

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return loss_fn.on_tensors(replace(tensors, logprobs=logprobs))[0]

    assert torch.autograd.gradcheck(loss, tensors.logprobs)


@pytest.mark.parametrize("name", CLIPPED)
def test_these_batches_clip_from_both_sides_and_with_both_signs(name: str) -> None:
    seen = set()
    for seed in SEEDS:
        tensors = flat(draw_batch(seed), "old")
        ratio, clipped = make_loss(name, REFERENCES[name][0]).policy_loss(tensors)[1:]
        assert clipped is not None
        for r, a in zip(ratio[clipped].tolist(), tensors.advantages[clipped].tolist(), strict=True):
            seen.add((r > 1.0, a > 0.0))
    both_ways = {(True, True), (False, False)}
    assert seen >= both_ways
    if name == "dapo":
        assert (True, False) in seen, "the dual clip must act"


def test_a_clipped_token_gets_no_gradient_from_ppo_but_keeps_it_under_cispo() -> None:
    batch = [Tokens([-1.0], [-3.0], [2.0], [1.0], [True], [0.0], [0.0])]
    assert value_and_gradient("ppo", flat(batch, "old"))[1].item() == 0.0
    assert value_and_gradient("cispo", flat(batch, "old"))[1].item() == -1.5 * 2.0


def test_the_dual_clip_stops_what_ppo_lets_through() -> None:
    batch = [Tokens([-1.0], [-3.0], [-2.0], [1.0], [True], [0.0], [0.0])]
    assert value_and_gradient("ppo", flat(batch, "old"))[1].item() == pytest.approx(
        2.0 * math.exp(2.0)
    )
    value, gradient = value_and_gradient("dapo", flat(batch, "old"))
    assert (value, gradient.item()) == (pytest.approx(1.6 * 2.0), 0.0)


def test_gspo_has_the_gradient_of_the_sequence_level_loss() -> None:
    """The paper's objective, min(s A, clamp(s) A) per sequence, differentiated through s."""
    batch = []
    for tokens in draw_batch(3, spread=0.2):
        weight = 1.0 / sum(tokens.mask)
        batch.append(replace(tokens, weights=[weight * m for m in tokens.mask]))
    tensors = flat(batch, "old")
    loss, _ = make_loss(
        "gspo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}
    ).on_tensors(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)

    logprobs = tensors.logprobs.detach().requires_grad_()
    rows = [x.split([len(s.lp) for s in batch]) for x in (logprobs, tensors.sampling_logprobs)]
    objective = torch.zeros((), dtype=torch.float64)
    for tokens, lp, q in zip(batch, *rows, strict=True):
        mask, advantage = torch.tensor(tokens.mask), tokens.advantages[-1]
        ratio = (lp - q)[mask].mean().exp()
        objective = objective + torch.minimum(
            ratio * advantage, ratio.clamp(0.99, 1.01) * advantage
        )
    (expected,) = torch.autograd.grad(-objective, logprobs)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert (gradient == 0).sum() > (~tensors.sampled).sum(), "some sequence must be clipped"


def gradient_of(name: str, tensors: PolicyTensors, **config: float) -> torch.Tensor:
    loss, _ = make_loss(name, config).on_tensors(tensors)
    return torch.autograd.grad(loss, tensors.logprobs)[0]


def test_gmpo_of_one_token_is_ppo() -> None:
    batch = [
        Tokens([s.lp[t]], [s.q[t]], [s.advantages[t]], [s.weights[t]], [True], [0.0], [0.0])
        for s in draw_batch(1)
        for t in s.sampled()
    ]
    tensors = flat(batch, "old")
    bounds = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.25}
    torch.testing.assert_close(
        gradient_of("geo_mean", tensors, **bounds), gradient_of("ppo", tensors, **bounds)
    )


def test_gmpo_without_bounds_is_gspo_without_them() -> None:
    """The gradient of one geometric mean of ratios, spread over the tokens of equal weight."""
    batch = [replace(s, weights=[float(m) for m in s.mask]) for s in draw_batch(3)]
    tensors = flat(batch, "old")
    far = {"clip_low_threshold": 1e-6, "clip_high_threshold": 1e6}
    torch.testing.assert_close(
        gradient_of("geo_mean", tensors, **far), gradient_of("gspo", tensors, **far)
    )


def test_sapo_with_a_flat_gate_is_importance_sampling() -> None:
    tensors = flat(draw_batch(1), "old")
    torch.testing.assert_close(
        gradient_of("sapo", tensors, tau_pos=1e-6, tau_neg=1e-6),
        gradient_of("importance_sampling", tensors),
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_with_a_region_without_end_is_cispo(name: str) -> None:
    tensors = flat(draw_batch(1), "old")
    region = {"divergence_low_threshold": 1e6, "divergence_high_threshold": 1e6}
    torch.testing.assert_close(
        gradient_of(name, tensors, **region, ratio_cap=1.3),
        gradient_of("cispo", tensors, clip_low_threshold=0.0, clip_high_threshold=1.3),
    )


def test_dppo_bounds_the_probability_where_ppo_bounds_the_ratio() -> None:
    """A rare token ten times as likely moves little; a likely one at 1.15 times moves much."""
    rare = [Tokens([math.log(0.01)], [math.log(0.001)], [1.0], [1.0], [True], [0.0], [0.0])]
    likely = [Tokens([math.log(0.92)], [math.log(0.8)], [1.0], [1.0], [True], [0.0], [0.0])]
    region = {"divergence_low_threshold": 0.1, "divergence_high_threshold": 0.1, "ratio_cap": 20.0}
    bounds = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    moved = [gradient_of("dppo_tv", flat(b, "old"), **region).item() for b in (rare, likely)]
    assert moved == [pytest.approx(-10.0), 0.0]
    moved = [gradient_of("ppo", flat(b, "old"), **bounds).item() for b in (rare, likely)]
    assert moved == [0.0, pytest.approx(-1.15)]


@pytest.mark.parametrize("name", REFERENCES)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name: str) -> None:
    tensors = flat(draw_batch(4, spread=0.0), "old")
    expected = -tensors.weights * tensors.advantages
    _, gradient = value_and_gradient(name, tensors)
    torch.testing.assert_close(gradient, torch.where(tensors.sampled, expected, 0.0))


@pytest.mark.parametrize("junk", [0.0, -7.5, math.nan, math.inf])
@pytest.mark.parametrize("name", REFERENCES)
def test_padding_changes_neither_value_nor_gradient_nor_metrics(name: str, junk: float) -> None:
    batch = draw_batch(5)
    loss_fn = make_loss(name, REFERENCES[name][0], kl_beta=0.1)
    results = []
    for tensors in (flat(batch), padded(batch, width=17, junk=junk)):
        loss, metrics = loss_fn.on_tensors(tensors)
        (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
        inside = torch.tensor([s.lp + [math.nan] * (17 - len(s.lp)) for s in batch]).isfinite()
        if gradient.ndim == 2:
            assert (gradient[~inside] == 0).all()
            gradient = gradient[inside]
        results.append((loss, gradient, {k: torch.tensor(v) for k, v in metrics.items()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(REFERENCES)),
    seed=st.integers(0, 10_000),
    spread=st.floats(0.0, 8.0),
    scale=st.floats(0.01, 100.0),
)
def test_any_batch_agrees_with_the_formula_and_scales_with_its_weights(
    name: str, seed: int, spread: float, scale: float
) -> None:
    batch = [
        replace(s, weights=[scale * w for w in s.weights]) for s in draw_batch(seed, spread=spread)
    ]
    value, gradient = value_and_gradient(name, flat(batch, "old"))
    unscaled = total(draw_batch(seed, spread=spread), REFERENCES[name][1])
    limit = max(lp - q for s in batch for lp, q in zip(s.lp, s.q, strict=True))
    if limit < 20.0:
        assert value == pytest.approx(scale * unscaled, rel=1e-9, abs=1e-9 * scale)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", REFERENCES)
def test_an_absurd_log_ratio_leaves_loss_and_gradient_finite_in_float32(name: str) -> None:
    tensors = PolicyTensors(
        logprobs=torch.tensor([[-0.1, -300.0, -1.0]], requires_grad=True),
        sampling_logprobs=torch.tensor([[-400.0, -0.1, -1.0]]),
        advantages=torch.tensor([[1.0, -1.0, 1.0]]),
        weights=torch.ones(1, 3),
    )
    value, gradient = value_and_gradient(name, tensors)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_a_sequence_ratio_over_a_flat_batch_needs_to_know_the_sequences() -> None:
    tensors = replace(flat(draw_batch(0), "old"), sequence_ids=None)
    with pytest.raises(LossError, match="sequence_ids"):
        GSPO(clip_low_threshold=0.9, clip_high_threshold=1.1)(tensors)


def test_the_mask_is_where_weights_are_not_zero_unless_it_is_given() -> None:
    batch = draw_batch(6)
    without = flat(batch, "old", "mask")
    given_mask = flat(batch, "old")
    assert torch.equal(without.sampled, given_mask.sampled)
    assert value_and_gradient("gspo", without)[0] == value_and_gradient("gspo", given_mask)[0]


@pytest.mark.parametrize("field", ["advantages", "weights", "old_logprobs"])
def test_tensors_of_other_shapes_are_refused_by_name(field: str) -> None:
    values = {
        name: torch.zeros(2, 3)
        for name in ("logprobs", "sampling_logprobs", "advantages", "weights")
    }
    with pytest.raises(LossError, match=rf"{field} has shape \(2, 4\) but logprobs \(2, 3\)"):
        PolicyTensors(**values | {field: torch.zeros(2, 4)})


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "dapo"])
@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 0.28), (1.1, 1.2), (-0.1, 1.2), (0.8, math.inf), (math.nan, 1.2)]
)
def test_thresholds_that_cannot_be_absolute_bounds_are_refused(
    name: str, low: float, high: float
) -> None:
    with pytest.raises(LossError, match="absolute bounds on the ratio"):
        make_loss(name, {"clip_low_threshold": low, "clip_high_threshold": high})
