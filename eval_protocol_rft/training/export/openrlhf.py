"""`Experience`s of OpenRLHF, as its `SamplesGenerator` returns them; and what an agent returns.

    class AgentExecutor(AgentExecutorBase):
        async def execute(self, prompt, label, **options):
            group = ...  # one completion of this prompt, sampled and scored
            return openrlhf.to_result(group, prompt=prompt, label=label)

Invariant: for a sequence of T tokens, `action_mask` and `rollout_log_probs` have length T-1, and
position t is about token t+1; in an agent's result they have length T, and OpenRLHF shifts them.

OpenRLHF estimates advantages by itself, from `n_samples_per_prompt` samples in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory, require
from eval_protocol_rft.training.export._groups import (
    check_groups,
    check_same_size,
    check_segments,
    end_of_sampled,
)


def to_samples(groups: Sequence[PromptGroup], *, types: Any = None) -> list[Any]:
    """[completions] `Experience`s of batch size 1, those of a group in a row.

    Args:
        groups: all of one size.
        types: what has `Experience`; default the module
            `openrlhf.trainer.ppo_utils.experience`.

    Returns:
        Each with `sequences` and `attention_mask` [1, T] int64, `action_mask` [1, T-1] int64,
        `rollout_log_probs` [1, T-1] float32, `rewards` and `scores` [1] float32, `truncated` [1]
        bool, `response_length` (first to last sampled token) and `total_length` [1], and `info` of
        what OpenRLHF logs. `prompts` and `labels` (texts, for logs) are empty.

    Raises:
        MissingPackageError: torch is not installed; OpenRLHF is not, and no types are given.
        ExportError: see `check_groups`; groups of several sizes; an episode of several segments.
    """
    torch = require("torch", install="eval-protocol-rft[local]")
    check_groups(groups, "OpenRLHF")
    check_same_size(groups, "OpenRLHF", "n_samples_per_prompt")
    for group in groups:
        check_segments(group, "OpenRLHF")
    module = types or require("openrlhf.trainer.ppo_utils.experience", install="openrlhf")
    return [
        _experience(trajectory, module.Experience, torch)
        for group in groups
        for trajectory in group.trajectories
    ]


def to_result(group: PromptGroup, *, prompt: Any, label: Any) -> dict[str, Any]:
    """What `AgentExecutorBase.execute` returns, for one completion.

    OpenRLHF cuts what is longer than its `max_len` without a word: keep prompt and `max_tokens`
    below it.

    Args:
        group: of one completion.
        prompt, label: what `execute` got, to give back.

    Raises:
        ExportError: see `check_groups`; the group has other than one completion; the episode has
            several segments.
    """
    check_groups([group], "OpenRLHF")
    check_segments(group, "OpenRLHF")
    if len(group) != 1:
        raise ExportError(
            f"group {group.key!r} has {len(group)} completions, and an agent of OpenRLHF returns "
            "one: sample with n=1"
        )
    (trajectory,) = group.trajectories
    stop = end_of_sampled(trajectory)
    edges = np.flatnonzero(np.diff(trajectory.loss_mask[:stop])) + 1
    bounds = [*edges.tolist(), stop]
    return {
        "prompt": prompt,
        "label": label,
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": trajectory.tokens[:stop].tolist(),
        "action_ranges": list(zip(bounds[::2], bounds[1::2], strict=True)),
        "rollout_log_probs": trajectory.logprobs[:stop].tolist(),
        "truncated": trajectory.truncated,
        "reward": trajectory.reward,
        "scores": trajectory.reward,
        "extra_logs": {},
    }


def _experience(trajectory: Trajectory, kind: Any, torch: Any) -> Any:
    stop = end_of_sampled(trajectory)
    tokens = torch.tensor([trajectory.tokens[:stop].tolist()])
    reward = torch.tensor([trajectory.reward], dtype=torch.float32)
    truncated = torch.tensor([trajectory.truncated])
    return kind(
        sequences=tokens,
        attention_mask=torch.ones_like(tokens),
        action_mask=torch.tensor([trajectory.loss_mask[1:stop].astype(int).tolist()]),
        rollout_log_probs=torch.tensor([trajectory.logprobs[1:stop].tolist()], dtype=torch.float32),
        prompts=[""],
        labels=[""],
        images=[None],
        mm_train_inputs=[None],
        rewards=reward,
        scores=reward.clone(),
        response_length=torch.tensor([stop - trajectory.prompt_length]),
        truncated=truncated,
        total_length=torch.tensor([float(stop)]),
        info={
            "reward": reward.clone(),
            "score": reward.clone(),
            "response_clip_ratio": truncated.clone(),
        },
    )
