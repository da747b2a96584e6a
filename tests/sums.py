"""A small batch of sums for the bundled model: some right, some wrong, with plausible logprobs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from eval_protocol_rft.training._types import PromptGroup, Trajectory
from eval_protocol_rft.training.losses._forward import token_logprobs


@functools.cache
def arithmetic() -> tuple[Any, Any]:
    """The bundled model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = bundled_model_path("arithmetic")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@functools.cache
def sums_batch(**options: object) -> TrainingBatch:
    """Two prompts of three answers. Sampling logprobs lie around the model's own, so that ratios
    clip on both sides."""
    rng = np.random.default_rng(3)
    groups = [_group(a, b, rng) for a, b in ((17, 25), (80, 41))]
    return build_batch(groups, **options)  # type: ignore[arg-type]


def _group(a: int, b: int, rng: np.random.Generator) -> PromptGroup:
    model, tokenizer = arithmetic()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{a}+{b}="}], add_generation_prompt=True, return_dict=False
    )
    trajectories = []
    for i, answer in enumerate((a + b, a + b + 10, a + b + 1)):
        completion = tokenizer.encode(f"{answer}{tokenizer.eos_token}")
        mask = [0] * len(prompt) + [1] * len(completion)
        made = Trajectory(
            tokens=[*prompt, *completion],
            logprobs=[-1.0 * m for m in mask],
            loss_mask=mask,
            reward=float(i == 0),
            row_id=f"{a}+{b}",
            completion=i,
        )
        group = PromptGroup(key=f"{a}+{b}", trajectories=(made,), tokenizer="arithmetic")
        (datum,) = build_batch([group], algorithm="reinforce").datums
        (own,) = token_logprobs(model, [datum]).logprobs
        drift = rng.choice([-0.5, -0.05, 0.05, 0.5], len(completion))
        sampled = np.minimum(own.detach().numpy()[-len(completion) :] + drift, -1e-3)
        trajectories.append(
            Trajectory(
                tokens=[*prompt, *completion],
                logprobs=[0.0] * len(prompt) + sampled.tolist(),
                loss_mask=mask,
                reward=float(i == 0),
                row_id=f"{a}+{b}",
                completion=i,
            )
        )
    return PromptGroup(key=f"{a}+{b}", trajectories=tuple(trajectories), tokenizer="arithmetic")
