"""Small real models and datums for tests of the loop."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.loop.trl import TrlRollouts
from eval_protocol_rft.training._datums import TrainingDatum


def tiny_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of 32, 40 words."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=39,
            pad_token_id=None,
        )
    ).eval()


def arithmetic_sampler(**options: Any) -> LocalSampler:
    """A sampler of its own: tests change its weights."""
    path = bundled_model_path("arithmetic")
    assert path is not None
    return LocalSampler.from_pretrained(path, **options)


def datums(count: int, *, seed: int = 0, words: int = 40, longest: int = 20) -> list[TrainingDatum]:
    """Random tokens, sampling logprobs and advantages, with weights that add up to 1."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(4, longest))
        prompt = int(rng.integers(1, length - 1))
        tokens = rng.integers(0, words, length + 1)
        sampled = np.arange(length) >= prompt - 1
        made.append(
            TrainingDatum(
                input_tokens=tokens[:-1],
                target_tokens=tokens[1:],
                logprobs=np.where(sampled, -rng.exponential(1.0, length), 0).astype(np.float32),
                advantages=np.where(sampled, rng.normal(), 0).astype(np.float32),
                weights=np.where(sampled, 1 / count, 0).astype(np.float32),
                prompt_length=prompt,
                reward=float(rng.normal()),
                truncated=False,
                group=i // 2,
                row_id=str(i // 2),
                completion=i % 2,
            )
        )
    return made


def plain_logprobs(model: Any, datum: TrainingDatum) -> torch.Tensor:
    """[T] by one unpadded forward and nothing of ours."""
    logits = model(torch.as_tensor(np.array(datum.input_tokens))[None]).logits[0]
    targets = torch.as_tensor(np.array(datum.target_tokens))[:, None]
    return logits.log_softmax(-1).gather(-1, targets)[:, 0]


class KeptWeights:
    """A sink that keeps what was published."""

    def __init__(self) -> None:
        self.published: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.unchanged: list[frozenset[str]] = []

    async def publish(
        self, model: Any, weights: Any, version: int, *, unchanged: frozenset[str] = frozenset()
    ) -> None:
        self.unchanged.append(unchanged)
        kept = {name: value.detach().clone() for name, value in weights.items()}
        self.published.append((version, copy.deepcopy(kept)))


def grpo_trainer(rollouts: TrlRollouts, **changes: Any) -> Any:
    """What `trl_rollouts` looks at of a `GRPOTrainer`, around a real model."""
    model = AutoModelForCausalLM.from_pretrained(
        str(bundled_model_path("arithmetic")), dtype=torch.float32
    ).train()
    given = {
        "model": model,
        "num_generations": 4,
        "reward_funcs": [rollouts.reward],
        "state": SimpleNamespace(global_step=0),
        "accelerator": SimpleNamespace(num_processes=1, unwrap_model=lambda wrapped: wrapped),
        "args": SimpleNamespace(temperature=rollouts.temperature, max_completion_length=8),
        "compute_loss_context_manager": contextlib.nullcontext,
    }
    return SimpleNamespace(**(given | changes))


def change(model: Any, seed: int = 0) -> None:
    """As a step of an optimiser does: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def forward_logprobs(model: Any, prompt_ids: list[int], ids: list[int]) -> np.ndarray:
    """By one forward of nothing but transformers."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()
