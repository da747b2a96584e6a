"""What TRL's `GRPOTrainer(rollout_func=...)` (1.0 or newer) wants back. What makes a whole
`rollout_func` of an evaluation test, weights included, is `loop.trl.trl_rollouts`.

Invariant: one completion for each prompt that TRL gave, in its order, as it matches them by
position; a completion that is not scored keeps its place and has the reward None, which TRL leaves
out of the baseline.

TRL repeats each prompt `num_generations` times and computes advantages, masks and division by
itself. It uses the sampling logprobs where it corrects for them
(`vllm_importance_sampling_correction`).

`DPOTrainer` and `KTOTrainer` tokenize the messages of their data set whatever stands beside them;
`use_sampled_tokens` puts the tokens that were sampled in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval_protocol_rft.training._types import ExportError, PromptGroup
from eval_protocol_rft.training.export._groups import (
    check_complete,
    check_one_policy,
    check_segments,
)


def rollout_result(
    groups: Sequence[PromptGroup], *, prompts: Sequence[Any] | None = None
) -> dict[str, list[Any]]:
    """The dict that a `rollout_func` returns, for B completions.

    Args:
        groups: in the order of the prompts, each with as many completions as its prompt stands
            there.
        prompts: [B] what TRL passed to `rollout_func`, to check that against; None: no check.

    Returns:
        `prompt_ids` [B][P_i], `completion_ids` [B][T_i], `logprobs` [B][T_i] (sampling), and for
        reward functions `reward` [B] (None: not scored), `truncated` [B] and `row_id` [B]. After
        rollouts of several turns also `env_mask` [B][T_i], 1 where the policy sampled.

    Raises:
        ExportError: a completion is missing, so that others would stand beside the wrong prompt;
            an episode has several segments, for which there is one place; the groups are of
            several tokenizers or models.
    """
    check_one_policy(groups)
    for group in groups:
        check_complete(group, "TRL")
        check_segments(group, "TRL")
    if prompts is not None:
        _check_places(groups, prompts)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    result: dict[str, list[Any]] = {
        "prompt_ids": [t.tokens[: t.prompt_length].tolist() for t in trajectories],
        "completion_ids": [t.tokens[t.prompt_length :].tolist() for t in trajectories],
        "logprobs": [t.logprobs[t.prompt_length :].tolist() for t in trajectories],
        "reward": [t.reward for t in trajectories],
        "truncated": [t.truncated for t in trajectories],
        "row_id": [t.row_id for t in trajectories],
    }
    if any(t.prompt_length + t.num_sampled < len(t) for t in trajectories):
        result["env_mask"] = [
            t.loss_mask[t.prompt_length :].astype(int).tolist() for t in trajectories
        ]
    return result


def recorded_reward(*, reward: Sequence[float | None], **_columns: Any) -> list[float | None]:
    """A TRL reward function: the reward that came with each completion of `rollout_result`."""
    return list(reward)


def use_sampled_tokens(trainer: Any, dataset: Any) -> None:
    """Let a `DPOTrainer` or `KTOTrainer` train on the tokens that were sampled.

        data = load_dataset("parquet", data_files="dpo.parquet", split="train")
        trainer = DPOTrainer(..., train_dataset=data)
        use_sampled_tokens(trainer, data)

    Examples whose prompt alone fills `max_length` are left out, as the trainer does.

    Args:
        trainer: made, and not trained yet.
        dataset: what `ep-rft convert --to dpo` or `--to kto` wrote, which the trainer was given.

    Raises:
        ExportError: the data set has no sampled tokens for this trainer, the trainer takes none
            (TRL's older KTOTrainer), or it computed reference logprobs of its own tokens already.
    """
    prepared = set(trainer.train_dataset.column_names)
    own = set(dataset.column_names)
    names = {"prompt_ids", "chosen_ids", "rejected_ids"}
    if "label" in own:
        names = {"prompt_ids", "completion_ids"}
    if missing := names - own:
        raise ExportError(
            f"the data set has no column {', '.join(sorted(missing))}: it is of no `ep-rft convert "
            "--to dpo` or `--to kto`"
        )
    if missing := names - prepared:
        raise ExportError(
            f"{type(trainer).__name__} made no {', '.join(sorted(missing))} of its data set, so it "
            "would not read them: this is for DPOTrainer of TRL 1.0 and KTOTrainer of 1.16, or "
            "newer"
        )
    if known := sorted(name for name in prepared if name.startswith("ref_")):
        raise ExportError(
            f"the trainer has {', '.join(known)} of the tokens that it made itself: leave "
            "precompute_ref_log_probs out"
        )
    longest = trainer.args.max_length
    if longest is not None:
        dataset = dataset.filter(lambda example: len(example["prompt_ids"]) < longest)
    if _KL in prepared:
        size = trainer.args.per_device_train_batch_size
        dataset = dataset.map(_with_mismatched, batched=True, batch_size=size)
    trainer.train_dataset = dataset


_KL = "KL_completion_ids"


def _with_mismatched(examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Of each batch, the completions one place further: KTO's estimate of the KL is over them."""
    ids = list(examples["completion_ids"])
    return {_KL: ids[-1:] + ids[:-1]}


def _check_places(groups: Sequence[PromptGroup], prompts: Sequence[Any]) -> None:
    """Each group stands at as many repetitions of one prompt as it has completions."""
    stop = 0
    for group in groups:
        start, stop = stop, stop + len(group)
        repeated = prompts[start:stop]
        if len(repeated) < len(group) or any(prompt != repeated[0] for prompt in repeated):
            raise ExportError(
                f"group {group.key!r} has {len(group)} completions and would stand at the prompts "
                f"{start} to {stop - 1} of {len(prompts)}, which are not that many of one: sample "
                "as many completions as TRL repeats the prompt (num_generations)"
            )
    if stop != len(prompts):
        raise ExportError(f"TRL gave {len(prompts)} prompts, there are {stop} completions")
