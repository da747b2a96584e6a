"""`Sample`s of slime (`slime.utils.types`): what a `--rollout-function-path` function returns.

    def generate_rollout(args, rollout_id, data_source, evaluation=False):
        groups = ...  # args.rollout_batch_size groups of args.n_samples_per_prompt, scored
        return slime.to_samples(groups)

Invariant: `tokens` are prompt and response, `response_length` counts the response, and `loss_mask`
and `rollout_log_probs` are of that length, at the very token they are about; slime shifts itself.

slime estimates advantages from rewards. It does so by cutting the batch into groups of
`n_samples_per_prompt`, and where their number is another than it expects it compares all samples of
the batch with each other, without a word: so groups are of one size, and `generate_rollout` must
return `rollout_batch_size` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval_protocol_rft.training._types import PromptGroup, Trajectory, require
from eval_protocol_rft.training.export._groups import (
    check_groups,
    check_same_size,
    check_segments,
    response_of,
)


def to_samples(groups: Sequence[PromptGroup], *, types: Any = None) -> list[list[Any]]:
    """[groups][completions] `Sample`s.

    `reward` is the score, `status` COMPLETED or TRUNCATED, `group_index` and `index` count from 0,
    `rollout_id` is the index, `weight_versions` are the policy versions, where known, and
    `metadata` has `row_id` and `completion`. `prompt`, `response` and `label` (texts, for logs)
    stay empty.

    Args:
        groups: all of one size.
        types: what has `Sample`; default the module `slime.utils.types`.

    Raises:
        MissingPackageError: slime is not installed, and no types are given.
        ExportError: see `check_groups`; groups of several sizes; an episode of several segments.
    """
    check_groups(groups, "slime")
    check_same_size(groups, "slime", "n_samples_per_prompt")
    for group in groups:
        check_segments(group, "slime")
    kind = (
        types or require("slime.utils.types", install="git+https://github.com/THUDM/slime")
    ).Sample
    size = len(groups[0])
    return [
        [
            _sample(trajectory, g, g * size + i, kind)
            for i, trajectory in enumerate(group.trajectories)
        ]
        for g, group in enumerate(groups)
    ]


def _sample(trajectory: Trajectory, group: int, index: int, kind: Any) -> Any:
    assert trajectory.reward is not None  # noqa: S101 - check_groups refuses it
    response = response_of(trajectory)
    versions = (trajectory.first_policy_version, trajectory.policy_version)
    return kind(
        group_index=group,
        index=index,
        rollout_id=index,
        tokens=response.prompt_ids + response.ids,
        response_length=len(response.ids),
        reward=float(trajectory.reward),
        loss_mask=response.mask,
        weight_versions=[version for version in versions if version is not None],
        rollout_log_probs=response.logprobs,
        status=kind.Status.TRUNCATED if trajectory.truncated else kind.Status.COMPLETED,
        metadata={"row_id": trajectory.row_id, "completion": trajectory.completion},
    )
