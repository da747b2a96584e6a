"""Prompt groups with rollouts of several turns, for tests of what becomes of a batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval_protocol_rft.training._batch import TrainingBatch, build_batch
from eval_protocol_rft.training._types import PromptGroup, Trajectory

Logprob = Callable[[int, int], float]


def trajectory(
    rng: np.random.Generator, *, logprob: Logprob, completion: int, reward: float | None
) -> Trajectory:
    """A prompt of 1 to 4 tokens, then one to three turns with tool output between them. Sampled
    logprobs lie around `logprob(previous token, token)`, so ratios clip on both sides."""
    mask = [0] * int(rng.integers(1, 5))
    for turn in range(int(rng.integers(1, 4))):
        mask += [0] * (int(rng.integers(1, 3)) if turn else 0)
        mask += [1] * int(rng.integers(1, 5))
    tokens = rng.integers(0, 500, len(mask)).tolist()
    drift = rng.choice([-0.7, -0.05, 0.0, 0.05, 0.7], len(mask)).tolist()
    logprobs = [
        min(logprob(tokens[i - 1], tokens[i]) + drift[i], -0.01) if m else 0.0
        for i, m in enumerate(mask)
    ]
    return Trajectory(
        tokens=tokens,
        logprobs=logprobs,
        loss_mask=mask,
        reward=reward,
        row_id="row",
        completion=completion,
    )


def prompt_groups(
    *, seed: int = 0, groups: int = 3, size: int = 4, logprob: Logprob = lambda p, t: -1.0
) -> list[PromptGroup]:
    rng = np.random.default_rng(seed)
    return [
        PromptGroup(
            key=("exp", f"row-{g}"),
            trajectories=tuple(
                trajectory(rng, logprob=logprob, completion=i, reward=float(i % 3) / 2)
                for i in range(size)
            ),
            tokenizer="tok",
        )
        for g in range(groups)
    ]


def batch_of(groups: list[PromptGroup], **options: object) -> TrainingBatch:
    return build_batch(groups, **options)  # type: ignore[arg-type]
