"""Tensors as a `RolloutWorkflow` of AReaL returns them.

    class Rollouts(RolloutWorkflow):
        async def arun_episode(self, engine, data):
            group = ...  # sampled and scored for this line of the data set
            return areal.to_samples([group], version=engine.get_version())[0]

Invariant: all of a sequence's arrays have its length, each value at the very token that it is
about; AReaL rolls them by one itself. Padding is on the right, and 0 as `concat_padded_tensors` has
it.

AReaL estimates advantages by itself. It puts the reward where the last token is predicted, and
drops it where that token is masked: so a sequence ends with its last sampled token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.training._types import ExportError, PromptGroup, Trajectory, require
from eval_protocol_rft.training.export._groups import (
    check_groups,
    check_same_size,
    check_segments,
    end_of_sampled,
)


def to_samples(
    groups: Sequence[PromptGroup], *, version: int | None = None, versions: bool = True
) -> list[dict[str, Any]]:
    """[groups] dicts of tensors, for G completions of at most T tokens.

    Args:
        groups: all of one size: AReaL normalises rewards by `group_size` in a row.
        version: of the weights that sampled, as `engine.get_version()` counts it. Default: the
            policy versions of the completions, where all of them are integers; where none is
            known, there are no `versions`, and AReaL does not measure staleness.
        versions: False: without any, for completions that several versions sampled.

    Returns:
        `input_ids`, `loss_mask` [G, T] int32; `logprobs` [G, T] float32 (sampling, 0.0 elsewhere);
        `attention_mask` [G, T] bool; `rewards` [G] float32; `versions` [G, T] int32, -1 where
        nothing was sampled.

    Raises:
        MissingPackageError: torch is not installed.
        ExportError: see `check_groups`; groups of several sizes; an episode of several segments; a
            completion that several versions sampled, or one whose version is no integer.
    """
    torch = require("torch", install="eval-protocol-rft[local]")
    check_groups(groups, "AReaL")
    check_same_size(groups, "AReaL", "group_size")
    for group in groups:
        check_segments(group, "AReaL")
    trajectories = [t for group in groups for t in group.trajectories]
    known = _versions(trajectories, version) if versions else None
    size = len(groups[0])
    return [
        {
            name: torch.from_numpy(array)
            for name, array in _arrays(
                group.trajectories, known[g * size : (g + 1) * size] if known else None
            ).items()
        }
        for g, group in enumerate(groups)
    ]


def _arrays(
    trajectories: Sequence[Trajectory], versions: Sequence[int] | None
) -> dict[str, NDArray[Any]]:
    stops = [end_of_sampled(trajectory) for trajectory in trajectories]
    shape = (len(stops), max(stops))
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.int32),
        "logprobs": np.zeros(shape, np.float32),
        "attention_mask": np.zeros(shape, np.bool_),
        "rewards": np.array([trajectory.reward for trajectory in trajectories], np.float32),
    }
    if versions is not None:
        arrays["versions"] = np.zeros(shape, np.int32)
    for i, (trajectory, stop) in enumerate(zip(trajectories, stops, strict=True)):
        mask = trajectory.loss_mask[:stop]
        arrays["input_ids"][i, :stop] = trajectory.tokens[:stop]
        arrays["loss_mask"][i, :stop] = mask
        arrays["logprobs"][i, :stop] = trajectory.logprobs[:stop]
        arrays["attention_mask"][i, :stop] = True
        if versions is not None:
            arrays["versions"][i, :stop] = np.where(mask != 0, versions[i], -1)
    return arrays


def _versions(trajectories: Sequence[Trajectory], version: int | None) -> list[int] | None:
    """[completions] the version of each, None where none is known."""
    for trajectory in trajectories:
        first, last = trajectory.first_policy_version, trajectory.policy_version
        if first is not None:
            raise ExportError(
                f"{trajectory.name}: policy versions {first} to {last} sampled it, and AReaL wants "
                "the version of each token, which is not known. Publish weights between rollouts, "
                "or pass versions=False"
            )
    if version is not None:
        return [version] * len(trajectories)
    known = [trajectory.policy_version for trajectory in trajectories]
    if not any(name is not None for name in known):
        return None
    for trajectory, name in zip(trajectories, known, strict=True):
        if name is None or not name.isdecimal():
            raise ExportError(
                f"{trajectory.name}: its policy version is {name!r}, and AReaL counts them as "
                "integers: pass version="
            )
    return [int(name or 0) for name in known]
