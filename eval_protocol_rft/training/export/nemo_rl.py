"""The `BatchedDataDict` that a rollout of NeMo-RL returns: message logs with tokens, and rewards.

    batch = nemo_rl.to_samples(groups)  # in place of run_multi_turn_rollout(...)[0]

Invariant: the `token_ids` of a message log, laid end to end, are the sequence. A message has
`generation_logprobs` exactly where the policy sampled it: NeMo-RL makes the loss mask of that.

NeMo-RL estimates advantages by itself, and takes completions with equal prompt ids for one group,
wherever they stand: so two groups may not have one prompt, nor one group several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory, require
from eval_protocol_rft.training.export._groups import (
    check_groups,
    check_segments,
    end_of_sampled,
)


def to_samples(
    groups: Sequence[PromptGroup], *, task_name: str = "eval-protocol", types: Any = None
) -> Any:
    """One `BatchedDataDict[DatumSpec]` for B completions.

    Args:
        groups: what was sampled for the prompts of a step.
        task_name: the same for all of them.
        types: what has `BatchedDataDict`; default the module
            `nemo_rl.distributed.batched_data_dict`.

    Returns:
        `message_log` [B] lists of messages: "user" (the prompt), then "assistant" (a turn, with
        `generation_logprobs` float32) and "environment" (what came between) by turns, each with
        `token_ids` int64 and an empty `content`; `length` [B] int64 tokens of the prompt;
        `total_reward` [B] float32; `truncated` [B] bool; `loss_multiplier` [B] float32, 1; `idx`,
        `task_name` and `extra_env_info` [B] (row id and completion).

    Raises:
        MissingPackageError: torch is not installed; NeMo-RL is not, and no types are given.
        ExportError: see `check_groups`; an episode of several segments; two groups of one prompt,
            or one of several.
    """
    torch = require("torch", install="eval-protocol-rft[local]")
    check_groups(groups, "NeMo-RL")
    for group in groups:
        check_segments(group, "NeMo-RL")
    _check_prompts(groups)
    module = types or require(
        "nemo_rl.distributed.batched_data_dict", install="git+https://github.com/NVIDIA-NeMo/RL"
    )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return module.BatchedDataDict(
        {
            "message_log": [list(_messages(t, torch)) for t in trajectories],
            "length": torch.tensor([t.prompt_length for t in trajectories]),
            "total_reward": torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
            "truncated": torch.tensor([t.truncated for t in trajectories], dtype=torch.bool),
            "loss_multiplier": torch.ones(len(trajectories), dtype=torch.float32),
            "idx": list(range(len(trajectories))),
            "task_name": [task_name] * len(trajectories),
            "extra_env_info": [
                {"row_id": t.row_id, "completion": t.completion} for t in trajectories
            ],
        }
    )


def _messages(trajectory: Trajectory, torch: Any) -> Iterator[dict[str, Any]]:
    """One message for each run of tokens that were sampled, or were not."""
    stop = end_of_sampled(trajectory)
    edges = np.flatnonzero(np.diff(trajectory.loss_mask[:stop])) + 1
    for place, (start, end) in enumerate(zip([0, *edges], [*edges, stop], strict=True)):
        sampled = bool(trajectory.loss_mask[start])
        message = {
            "role": "assistant" if sampled else "environment" if place else "user",
            "content": "",
            "token_ids": torch.tensor(trajectory.tokens[start:end].tolist()),
        }
        if sampled:
            logprobs = trajectory.logprobs[start:end].tolist()
            message["generation_logprobs"] = torch.tensor(logprobs, dtype=torch.float32)
        yield message


def _check_prompts(groups: Sequence[PromptGroup]) -> None:
    seen: dict[bytes, PromptGroup] = {}
    for group in groups:
        prompts = [t.tokens[: t.prompt_length].tobytes() for t in group.trajectories]
        for trajectory, prompt in zip(group.trajectories, prompts, strict=True):
            if prompt != prompts[0]:
                raise ExportError(
                    f"{trajectory.name}: its prompt ids are not those of the first completion of "
                    f"group {group.key!r}, and NeMo-RL takes each prompt for a group of its own"
                )
        other = seen.setdefault(prompts[0], group)
        if other is not group:
            raise ExportError(
                f"groups {other.key!r} and {group.key!r} have the same prompt ids, and NeMo-RL "
                "would take them for one group: keep one of them"
            )
