"""Prompts that run once give the logprobs and gradients of prompts that run with every datum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training.losses._forward import (
    SHARED_WIDTH,
    bundled,
    can_share_prompts,
    token_logprobs,
)

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
torch.manual_seed(0)
MODELS = {
    kind: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=kind)).eval()
    for kind in ("sdpa", "eager")
}


def datum(tokens: list[int], prompt: int, holes: set[int] = frozenset()) -> TrainingDatum:
    """`holes`: targets behind the first sampled one that were not sampled (a tool's output)."""
    ids = np.array(tokens)
    weights = (np.arange(len(ids) - 1) >= prompt - 1).astype(np.float32)
    weights[[hole for hole in holes if prompt <= hole < len(weights)]] = 0
    return TrainingDatum(
        input_tokens=ids[:-1],
        target_tokens=ids[1:],
        logprobs=np.zeros(len(ids) - 1, np.float32),
        advantages=weights,
        weights=weights,
        prompt_length=prompt,
        reward=0.0,
        truncated=False,
        group=0,
        row_id=None,
        completion=0,
    )


@st.composite
def batches(draw: st.DrawFn) -> list[TrainingDatum]:
    made = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, 29), min_size=1, max_size=12))
        for _ in range(draw(st.integers(1, 4))):
            tail = draw(st.lists(st.integers(0, 29), min_size=1, max_size=8))
            holes = draw(st.sets(st.integers(0, 20), max_size=3))
            made.append(datum([*prompt, *tail], len(prompt), holes))
    return made


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=40)
@given(batch=batches(), temperature=st.sampled_from([1.0, 0.6]))
def test_logprobs_entropies_and_gradients_are_the_same(
    kind: str, batch: list[TrainingDatum], temperature: float
) -> None:
    model = MODELS[kind]
    found = []
    for share in (False, True):
        model.zero_grad()
        told = token_logprobs(
            model, batch, temperature=temperature, entropies=True, share_prompts=share
        )
        weights = [torch.linspace(-1, 1, len(values)) for values in told.logprobs]
        loss = sum((w * v).sum() for w, v in zip(weights, told.logprobs, strict=True))
        torch.autograd.backward(loss)
        gradients = [p.grad.clone() for p in model.parameters()]
        assert told.entropies is not None
        found.append((told.logprobs, told.entropies, gradients))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_neighbours_with_one_prompt_share_it() -> None:
    batch = [
        datum([1, 2, 3, 4], 2),
        datum([1, 2, 5], 2),
        datum([1, 2, 3, 4], 3),  # the same tokens, another prompt
        datum([7, 2, 3], 2),
        datum([1, 2, 9], 2),
    ]
    assert bundled(batch) == [[0, 1], [2], [3], [4]]


def test_a_row_stays_within_its_width() -> None:
    long = [datum([5] * 400, 100) for _ in range(5)]
    bundles = bundled(long)
    assert [len(bundle) for bundle in bundles] == [3, 2]
    assert all(100 + 299 * len(bundle) <= SHARED_WIDTH for bundle in bundles)


def test_models_that_see_less_than_their_mask_are_known() -> None:
    assert can_share_prompts(MODELS["sdpa"])
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    assert not can_share_prompts(sliding)
    assert not can_share_prompts(torch.nn.Linear(2, 2))
    by_column = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=30,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
        )
    )
    assert not can_share_prompts(by_column)
