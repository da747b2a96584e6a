"""Truncated importance sampling and the KL penalty, against the token-by-token references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from eval_protocol_rft.training.losses._corrections import (
    Combined,
    Correction,
    IcePop,
    Rejection,
    SequenceTIS,
    TokenTIS,
    parse_correction,
)
from eval_protocol_rft.training.losses._objective import make_loss
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
Weight = Callable[[Tokens, int], float]


def token_tis(cap: float) -> Weight:
    return lambda s, t: min(math.exp(s.old[t] - s.q[t]), cap)


def sequence_tis(cap: float) -> Weight:
    return lambda s, t: min(math.prod(math.exp(s.old[k] - s.q[k]) for k in s.sampled()), cap)


def geometric_tis(cap: float) -> Weight:
    def weight(s: Tokens, t: int) -> float:
        product = math.prod(math.exp(s.old[k] - s.q[k]) for k in s.sampled())
        return min(product ** (1 / len(s.sampled())), cap)

    return weight


def icepop(low: float, high: float) -> Weight:
    def weight(s: Tokens, t: int) -> float:
        ratio = math.exp(s.old[t] - s.q[t])
        return ratio if low <= ratio <= high else 0.0

    return weight


def sequence_icepop(low: float, high: float) -> Weight:
    def weight(s: Tokens, t: int) -> float:
        ratio = math.prod(math.exp(s.old[k] - s.q[k]) for k in s.sampled())
        return ratio if low <= ratio <= high else 0.0

    return weight


ESTIMATES: dict[str, Callable[[float], float]] = {
    "k1": abs,  # whose bounds here are symmetric
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(x) - 1 - x,
}


def rejection(kind: str, high: float) -> Weight:
    over, estimate = kind.rsplit("_", 1)

    def weight(s: Tokens, t: int) -> float:
        logs = [s.old[k] - s.q[k] for k in s.sampled()]
        values = logs if estimate == "k1" else [ESTIMATES[estimate](x) for x in logs]
        told = {
            "token": lambda: values[s.sampled().index(t)],
            "seq_sum": lambda: sum(values),
            "seq_mean": lambda: sum(values) / len(values),
            "seq_max": lambda: max(values),
        }[over]()
        return float(abs(told) <= math.log(high) if estimate == "k1" else told <= high)

    return weight


REJECTIONS = {
    "token_k1": 1.2,
    "token_k2": 0.03,
    "token_k3": 0.03,
    "seq_sum_k1": 1.5,
    "seq_sum_k2": 0.25,
    "seq_sum_k3": 0.25,
    "seq_mean_k1": 1.1,
    "seq_mean_k2": 0.05,
    "seq_mean_k3": 0.05,
    "seq_max_k2": 0.15,
    "seq_max_k3": 0.15,
}

CORRECTIONS: dict[str, tuple[Correction, Weight]] = {
    "icepop, sequence": (IcePop(low=0.6, high=1.5, sequence=True), sequence_icepop(0.6, 1.5)),
    "combined": (
        Combined(parts=(TokenTIS(cap=1.1), Rejection(kind="token_k3", high=0.03))),
        lambda s, t: token_tis(1.1)(s, t) * rejection("token_k3", 0.03)(s, t),
    ),
    **{
        kind: (Rejection(kind=kind, high=high), rejection(kind, high))
        for kind, high in REJECTIONS.items()
    },
    "token": (TokenTIS(cap=1.1), token_tis(1.1)),
    "sequence": (SequenceTIS(cap=1.2), sequence_tis(1.2)),
    "geometric": (SequenceTIS(cap=1.05, geometric=True), geometric_tis(1.05)),
    "icepop": (IcePop(low=0.8, high=1.25), icepop(0.8, 1.25)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["ppo", "gspo", "reinforce"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_correction_multiplies_the_policy_loss_of_each_token(
    kind: str, name: str, seed: int
) -> None:
    correction, weight = CORRECTIONS[kind]
    batch, (config, reference) = draw_batch(seed), REFERENCES[name]
    for tensors in (flat(batch), padded(batch, width=13, junk=math.nan)):
        loss, _ = make_loss(name, config, correction=correction).on_tensors(tensors)
        expected = total(batch, reference, old=True, correction=weight)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_correction_bounds_some_tokens_of_these_batches_and_not_others(kind: str) -> None:
    correction, _ = CORRECTIONS[kind]
    batch = [s for seed in range(3) for s in draw_batch(seed)]
    tensors = flat(batch)
    weights, bounded = correction(tensors)
    free = torch.tensor([s.old[t] - s.q[t] for s in batch for t in s.sampled()]).double()
    assert 0 < bounded[tensors.sampled].sum() < tensors.sampled.sum()
    if kind in ("token", "icepop"):
        kept = ~bounded[tensors.sampled]
        torch.testing.assert_close(weights[tensors.sampled][kept], free.exp()[kept])


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_correction_carries_no_gradient_even_when_the_old_policy_is_the_current_one(
    kind: str,
) -> None:
    correction, _ = CORRECTIONS[kind]
    tensors = flat(draw_batch(0))
    tensors = replace(tensors, old_logprobs=tensors.logprobs)
    loss, _ = make_loss("reinforce", {}, correction=correction).on_tensors(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
    expected = -correction(tensors)[0] * tensors.weights * tensors.advantages
    torch.testing.assert_close(gradient, torch.where(tensors.sampled, expected, 0.0))


def test_every_kind_of_rejection_is_tried() -> None:
    assert set(REJECTIONS) == set(Rejection.KINDS)


@pytest.mark.parametrize("correction", [TokenTIS, SequenceTIS])
def test_normalised_weights_are_one_in_the_mean(correction: type[TokenTIS | SequenceTIS]) -> None:
    tensors = flat([s for seed in range(3) for s in draw_batch(seed)])
    plain, _ = correction(cap=1.1)(tensors)
    weights, _ = correction(cap=1.1, normalized=True)(tensors)
    sampled, ids = tensors.sampled, tensors.sequence_ids
    assert ids is not None
    if correction is TokenTIS:
        assert weights[sampled].mean().item() == pytest.approx(1.0)
    else:
        each = [weights[sampled & (ids == i)][0].item() for i in range(int(ids.max()) + 1)]
        assert sum(each) / len(each) == pytest.approx(1.0)
    factors = (weights / plain)[sampled]
    torch.testing.assert_close(factors, factors[0].expand_as(factors))
    assert make_loss("ppo", REFERENCES["ppo"][0], correction=correction(cap=2.0)).whole_batch is (
        False
    )
    whole = Combined(parts=(correction(cap=2.0, normalized=True),))
    assert make_loss("ppo", REFERENCES["ppo"][0], correction=whole).whole_batch


def test_rejection_by_the_current_policy_needs_no_old_logprobs() -> None:
    """As in verl's bypass mode: ratios against the sampler, and what is far from it left out."""
    batch = draw_batch(1)
    tensors = flat(batch, "old")
    correction = Rejection(kind="token_k1", low=0.7, high=1.5, current=True)
    loss, _ = make_loss("ppo", REFERENCES["ppo"][0], correction=correction).on_tensors(tensors)
    kept = lambda s, t: float(0.7 <= math.exp(s.lp[t] - s.q[t]) <= 1.5)  # noqa: E731
    expected = total(batch, REFERENCES["ppo"][1], correction=kept)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token:2", TokenTIS(cap=2.0)),
        ("sequence:5", SequenceTIS(cap=5.0)),
        ("geometric:2", SequenceTIS(cap=2.0, geometric=True)),
        ("icepop:0.5:5", IcePop(low=0.5, high=5.0)),
        ("icepop_sequence:0.5:5", IcePop(low=0.5, high=5.0, sequence=True)),
        ("seq_mean_k3:0.01", Rejection(kind="seq_mean_k3", high=0.01)),
        ("token_k1:0.5:3", Rejection(kind="token_k1", low=0.5, high=3.0)),
        (
            "token:2, seq_max_k2:0.1",
            Combined(parts=(TokenTIS(cap=2.0), Rejection(kind="seq_max_k2", high=0.1))),
        ),
    ],
)
def test_corrections_have_a_short_form(text: str, expected: Correction) -> None:
    assert parse_correction(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a name and one or two numbers"),
        ("token", "a name and one or two numbers"),
        ("token:x", "a name and one or two numbers"),
        ("token:1:2:3", "a name and one or two numbers"),
        ("token:1:2", "none of token:CAP"),
        ("tokens:2", "none of token:CAP"),
        ("icepop:2", "none of token:CAP"),
        ("token:0.5", "below 1"),
        ("token:nan", "cap is nan"),
        ("seq_mean_k3:0.1:0.2", "bounded by high alone"),
        ("token_k1:0.5", "between 0 < low"),
        ("token_k1:0:2", "between 0 < low"),
        ("token:2,", "a name and one or two numbers"),
    ],
)
def test_what_is_no_correction_is_refused(text: str, message: str) -> None:
    with pytest.raises(LossError, match=message):
        parse_correction(text)


@pytest.mark.parametrize("name", ["ppo", "importance_sampling", "gspo", "cispo", "dro"])
def test_no_gradient_flows_through_what_the_ratio_is_taken_against(name: str) -> None:
    tensors = flat(draw_batch(0))
    tensors = replace(tensors, old_logprobs=tensors.logprobs)
    loss, _ = make_loss(name, REFERENCES[name][0]).on_tensors(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
    expected = -tensors.weights * tensors.advantages
    torch.testing.assert_close(gradient, torch.where(tensors.sampled, expected, 0.0))


def test_a_correction_changes_nothing_where_trainer_and_sampler_agree() -> None:
    tensors = flat(draw_batch(0))
    tensors = replace(tensors, old_logprobs=tensors.sampling_logprobs)
    plain, _ = make_loss("ppo", REFERENCES["ppo"][0]).on_tensors(tensors)
    for correction, _ in CORRECTIONS.values():
        loss, metrics = make_loss("ppo", REFERENCES["ppo"][0], correction=correction).on_tensors(
            tensors
        )
        assert loss.item() == plain.item()
        assert metrics["correction:mean"] == 1.0
        assert metrics["correction_bounded:mean"] == 0.0


def test_a_sequence_a_thousand_times_off_is_capped_not_infinite() -> None:
    tensors = replace(flat(draw_batch(0)), sampling_logprobs=torch.full((40,), -1000.0).double())
    weights, bounded = SequenceTIS(cap=2.0)(tensors)
    torch.testing.assert_close(weights[tensors.sampled].unique(), torch.tensor([2.0]).double())
    assert bounded[tensors.sampled].all()
    weights, _ = IcePop(low=0.5, high=5.0)(tensors)
    assert (weights[tensors.sampled] == 0.0).all()


def test_a_correction_without_old_logprobs_is_an_error_that_says_so() -> None:
    loss_fn = make_loss("ppo", REFERENCES["ppo"][0], correction=TokenTIS(cap=2.0))
    with pytest.raises(LossError, match="needs old_logprobs"):
        loss_fn.on_tensors(flat(draw_batch(0), "old"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenTIS(cap=0.5),
        lambda: SequenceTIS(cap=math.inf),
        lambda: IcePop(low=1.1, high=2.0),
        lambda: IcePop(low=0.0, high=2.0),
        lambda: IcePop(low=0.5, high=0.9),
    ],
)
def test_bounds_that_would_alter_agreement_are_refused(make: Callable[[], Correction]) -> None:
    with pytest.raises(LossError):
        make()


@pytest.mark.parametrize("name", REFERENCES)
def test_the_kl_penalty_is_k3_to_the_reference_under_the_same_weights(name: str) -> None:
    batch, (config, reference) = draw_batch(2), REFERENCES[name]
    tensors = flat(batch, "old")
    loss, metrics = make_loss(name, config, kl_beta=0.3).on_tensors(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)

    assert loss.item() == pytest.approx(total(batch, reference, kl_beta=0.3), rel=1e-12)
    expected = finite_differences(
        batch, lambda moved: total(moved, reference, fixed=batch, kl_beta=0.3)
    )
    torch.testing.assert_close(gradient, torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)
    parts = metrics["policy_loss:sum"] + metrics["kl_loss:sum"]
    assert loss.item() == pytest.approx(parts, rel=1e-12)


def test_the_kl_penalty_pulls_a_token_towards_the_reference() -> None:
    for reference, sign in ((-0.5, -1.0), (-3.0, 1.0), (-1.0, 0.0)):
        tensors = flat([Tokens([-1.0], [-1.0], [0.0], [1.0], [True], [-1.0], [reference])], "old")
        loss, _ = make_loss("reinforce", {}, kl_beta=1.0).on_tensors(tensors)
        (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
        assert torch.sign(gradient).item() == sign


def test_the_kl_penalty_of_a_small_difference_keeps_its_digits_in_float32() -> None:
    lp = torch.full((8,), -2.0, requires_grad=True)
    reference = torch.full((8,), -2.0) + 1e-4
    tensors = PolicyTensors(
        logprobs=lp,
        sampling_logprobs=lp.detach(),
        advantages=torch.zeros(8),
        weights=torch.ones(8),
        reference_logprobs=reference,
    )
    gap = float(reference[0].double() + 2.0)
    loss, _ = make_loss("reinforce", {}, kl_beta=1.0).on_tensors(tensors)
    assert loss.item() == pytest.approx(8 * gap**2 / 2, rel=1e-3)


def test_the_kl_penalty_is_not_scaled_by_a_correction() -> None:
    batch = [replace(s, advantages=[0.0] * len(s.lp)) for s in draw_batch(2)]
    config = REFERENCES["ppo"][0]
    losses = [
        make_loss("ppo", config, kl_beta=0.3, correction=correction).on_tensors(flat(batch))[0]
        for correction in (None, IcePop(low=0.9, high=1.1))
    ]
    assert losses[0].item() == losses[1].item() > 0.0


def test_a_kl_penalty_without_a_reference_is_an_error_that_says_so() -> None:
    with pytest.raises(LossError, match="needs reference_logprobs"):
        make_loss("reinforce", {}, kl_beta=0.1).on_tensors(flat(draw_batch(0), "reference"))


@pytest.mark.parametrize("kl_beta", [-0.1, math.inf, math.nan])
def test_a_kl_weight_that_is_no_weight_is_refused(kl_beta: float) -> None:
    with pytest.raises(LossError, match="kl_beta"):
        make_loss("reinforce", {}, kl_beta=kl_beta)
