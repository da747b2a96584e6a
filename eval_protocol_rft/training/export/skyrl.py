"""`GeneratorOutput` of SkyRL (`skyrl.train.generators.base`): what a `GeneratorInterface` returns.

    class Rollouts(GeneratorInterface):
        async def generate(self, input_batch):
            groups = ...  # sampled and scored, in the order of input_batch["prompts"]
            return skyrl.to_samples(groups, trajectory_ids=input_batch["trajectory_ids"])

Invariant: all lists have one entry per sequence, in the order of the prompts, and `response_ids`,
`loss_masks` and `rollout_logprobs` of a sequence are of equal length; SkyRL shifts nothing.

SkyRL estimates advantages, masks and divides by itself. It aligns responses on the right, and puts
the reward on the last token of each, which is a sampled one. It appends no end-of-turn token here,
so the ids are those that were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory, require
from eval_protocol_rft.training.export._groups import check_groups, response_of


def to_samples(
    groups: Sequence[PromptGroup],
    *,
    trajectory_ids: Sequence[Any] | None = None,
    types: Any = None,
) -> dict[str, Any]:
    """One `GeneratorOutput` (a TypedDict) for B sequences.

    An episode of several segments is that many sequences in a row, and `is_last_step` is True at
    the last: SkyRL counts it once with `generator.step_wise_trajectories=true`, and refuses it
    otherwise, as there are more responses than prompts. Use a `loss_reduction` over tokens then.

    Args:
        groups: in the order of the prompts, each with as many completions as its prompt stands
            there.
        trajectory_ids: [completions] of the `GeneratorInput`, to give back and to check the order
            by. Default: (key of the group, place in it).
        types: what has `TrajectoryID`; default the module `skyrl.train.generators.base`.

    Returns:
        `prompt_token_ids` [B][P_i], `response_ids`, `loss_masks` and `rollout_logprobs` [B][R_i],
        `rewards` [B] float, `stop_reasons` [B] "stop" or "length", `trajectory_ids` [B],
        `is_last_step` [B]; `rollout_metrics` and `rollout_expert_indices` None.

    Raises:
        MissingPackageError: SkyRL is not installed, and neither ids nor types are given.
        ExportError: see `check_groups`; or the completions are not those of the ids.
    """
    check_groups(groups, "SkyRL")
    if trajectory_ids is None:
        module = types or require("skyrl.train.generators.base", install="skyrl")
        trajectory_ids = [
            module.TrajectoryID(instance_id=str(group.key), repetition_id=i)
            for group in groups
            for i in range(len(group))
        ]
    else:
        _check_places(groups, [each.instance_id for each in trajectory_ids])
    output: dict[str, Any] = {name: [] for name in _LISTS}
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    for trajectory, trajectory_id in zip(trajectories, trajectory_ids, strict=True):
        _append(output, trajectory, trajectory_id)
    return output | {"rollout_metrics": None, "rollout_expert_indices": None}


_LISTS = (
    "prompt_token_ids",
    "response_ids",
    "rewards",
    "loss_masks",
    "stop_reasons",
    "rollout_logprobs",
    "trajectory_ids",
    "is_last_step",
)


def _append(output: dict[str, Any], trajectory: Trajectory, trajectory_id: Any) -> None:
    assert trajectory.reward is not None  # noqa: S101 - check_groups refuses it
    segments = trajectory.segments
    for place, segment in enumerate(segments, start=1):
        response = response_of(segment)
        # A turn that is cut off is the last of its episode: earlier segments ended by themselves.
        last = place == len(segments)
        stop_reason = trajectory.finish_reason if last else "stop"
        values = (
            response.prompt_ids,
            response.ids,
            float(trajectory.reward),
            response.mask,
            stop_reason,
            response.logprobs,
            trajectory_id,
            last,
        )
        for name, value in zip(_LISTS, values, strict=True):
            output[name].append(value)


def _check_places(groups: Sequence[PromptGroup], instance_ids: Sequence[str]) -> None:
    """Each group stands at as many repetitions of one instance as it has completions."""
    stop = 0
    for group in groups:
        start, stop = stop, stop + len(group)
        if len(instance_ids[start:stop]) < len(group) or len({*instance_ids[start:stop]}) != 1:
            raise ExportError(
                f"group {group.key!r} has {len(group)} completions and would stand at "
                f"trajectories {start} to {stop - 1} of {len(instance_ids)}, which are not that "
                "many of one instance: sample n_samples_per_prompt completions of each prompt"
            )
    if stop != len(instance_ids):
        raise ExportError(
            f"SkyRL asked for {len(instance_ids)} trajectories, there are {stop} completions"
        )
