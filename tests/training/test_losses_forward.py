"""`token_logprobs`: a padded forward pass against a plain one, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training.losses import _forward as forward
from eval_protocol_rft.training.losses._forward import token_logprobs
from eval_protocol_rft.training.losses._tensors import LossError

torch.set_num_threads(1)
VOCABULARY = 50


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_datum(mask: str, seed: int = 0) -> TrainingDatum:
    """A datum of random tokens; `mask` has an x at each sampled target."""
    rng = np.random.default_rng([seed, len(mask)])
    tokens = rng.integers(0, VOCABULARY, len(mask) + 1)
    weights = np.array([float(c == "x") for c in mask], np.float32)
    return TrainingDatum(
        input_tokens=tokens[:-1],
        target_tokens=tokens[1:],
        logprobs=-weights,
        advantages=weights,
        weights=0.25 * weights,
        prompt_length=1,
        reward=1.0,
        truncated=False,
        group=0,
        row_id=None,
        completion=0,
    )


BATCH = [make_datum(mask) for mask in ("--xxxxx", "---xx---xxxx", "--x", "---------x-x-x")]


def one_by_one(model: Any, datum: TrainingDatum, temperature: float) -> torch.Tensor:
    """[T, V] log-probabilities in float64, from an unpadded forward pass."""
    ids = torch.from_numpy(datum.input_tokens)[None]
    return (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_sequence_alone(model: Any, temperature: float) -> None:
    result = token_logprobs(model, BATCH, temperature=temperature)
    assert result.entropies is None
    for datum, logprobs in zip(BATCH, result.logprobs, strict=True):
        full = one_by_one(model, datum, temperature)
        expected = full.gather(-1, torch.from_numpy(datum.target_tokens)[:, None])[:, 0]
        expected = torch.where(torch.from_numpy(datum.mask), expected, 0.0)
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=3e-6)


def test_entropies_are_of_the_whole_distribution_and_without_gradient(model: Any) -> None:
    result = token_logprobs(model, BATCH, temperature=0.7, entropies=True)
    assert result.entropies is not None
    for datum, entropies in zip(BATCH, result.entropies, strict=True):
        full = one_by_one(model, datum, 0.7)
        expected = torch.where(torch.from_numpy(datum.mask), -(full.exp() * full).sum(-1), 0.0)
        torch.testing.assert_close(entropies.double(), expected.detach(), rtol=0, atol=1e-5)
        assert not entropies.requires_grad


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("chunk", [0, 1, 5, 1024])
def test_chunks_change_neither_values_nor_the_gradient(
    model: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk * VOCABULARY)
    weights = [torch.arange(1.0, len(datum) + 1) for datum in BATCH]
    logprobs = token_logprobs(model, BATCH).logprobs
    loss = sum((lp * w).sum() for lp, w in zip(logprobs, weights, strict=True))

    expected = torch.zeros(())
    for datum, w in zip(BATCH, weights, strict=True):
        full = model(input_ids=torch.from_numpy(datum.input_tokens)[None]).logits[0].log_softmax(-1)
        lp = full.gather(-1, torch.from_numpy(datum.target_tokens)[:, None])[:, 0]
        expected = expected + (lp * w)[torch.from_numpy(datum.mask)].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_logits_of_a_common_prompt_are_not_asked_for(model: Any) -> None:
    asked = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: asked.append(out.shape))
    group = [make_datum("-" * 20 + "xxx", seed) for seed in range(3)]
    token_logprobs(model, group)
    handle.remove()
    assert asked == [(3, 3, VOCABULARY)]


class WithoutTrimming(torch.nn.Module):
    """The same model as one that always returns all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.attended: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.attended = attention_mask.sum(dim=1).tolist()
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_cannot_trim_its_logits_gives_the_same(model: Any) -> None:
    with torch.no_grad():
        trimmed = token_logprobs(model, BATCH).logprobs
        untrimmed = WithoutTrimming(model)
        whole = token_logprobs(untrimmed, BATCH).logprobs
    assert untrimmed.attended == [len(datum) for datum in BATCH]
    for one, other in zip(trimmed, whole, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_half_precision_model_still_gets_single_precision_logprobs(model: Any) -> None:
    import copy

    half = copy.deepcopy(model).bfloat16()
    datum = BATCH[1]
    logprobs = token_logprobs(half, [datum]).logprobs[0]
    full = one_by_one(half, datum, 1.0)
    expected = full.gather(-1, torch.from_numpy(datum.target_tokens)[:, None])[:, 0]
    mask = torch.from_numpy(datum.mask)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double()[mask], expected[mask], rtol=0, atol=3e-6)


def test_large_logits_keep_their_digits() -> None:
    """A logit offset of 10,000 changes no probability, and must not eat the logprob's digits."""
    logits = torch.tensor([[0.5, -0.25, 0.125], [0.0, 3.0, -1.0]])
    targets = torch.tensor([2, 0])
    logprobs = forward._logprobs(logits + 8192.0, targets, 1.0)
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-6)


def test_datums_without_a_sampled_token_give_zeros_that_still_carry_a_graph(model: Any) -> None:
    logprobs = token_logprobs(model, [make_datum("----")], entropies=True).logprobs[0]
    assert torch.equal(logprobs, torch.zeros(4))
    logprobs.sum().backward()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_without_a_policy_is_refused(model: Any, temperature: float) -> None:
    with pytest.raises(LossError, match="temperature"):
        token_logprobs(model, BATCH, temperature=temperature)


def test_no_datums_are_refused(model: Any) -> None:
    with pytest.raises(LossError, match="no datums"):
        token_logprobs(model, [])
