"""Tensors as verl's `DataProto` holds them after rollout, reward and advantage.

Invariant: every sampled token of the batch stands in `responses` once, with its logprob and mask;
padding is on the left of prompts and on the right of responses, and has mask 0.

verl divides by `loss_agg_mode`, so the batch must not be normalised already. It takes each row for
a rollout, so an episode of several segments would count several times; it is refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.training._batch import TrainingBatch
from eval_protocol_rft.training._datums import TrainingDatum
from eval_protocol_rft.training._types import ExportError, require


class VerlData(NamedTuple):
    """The arguments of `DataProto.from_dict`, for D datums, P prompt and R response columns."""

    tensors: dict[str, Any]
    """`prompts` [D, P] and `responses` [D, R] int64; `input_ids`, `attention_mask`,
    `position_ids` [D, P + R] int64; `response_mask` [D, R] int64, 1 on sampled tokens;
    `rollout_log_probs` [D, R] float32, sampling logprobs; `rm_scores`, `token_level_scores`,
    `token_level_rewards` [D, R] float32, the reward at the last sampled token of the response;
    `advantages`, `returns` [D, R] float32."""
    non_tensors: dict[str, NDArray[Any]]
    """`uid` [D], the same for datums of a prompt group and unique beyond this batch; `row_id` and
    `completion` [D]; and the components [D] that the advantages came from, by name
    (`algorithm.gdpo_reward_keys`)."""
    meta_info: dict[str, Any]


def to_tensors(
    batch: TrainingBatch,
    *,
    pad_token_id: int,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> VerlData:
    """Pad a batch. What follows the first sampled token is response, tool output included.

    Args:
        batch: built with `normalization="none"`.
        pad_token_id: what stands at padding; masked, so any id will do.
        prompt_length: P, default the longest prompt.
        response_length: R, default the longest response.

    Raises:
        MissingPackageError: torch is not installed.
        ExportError: the batch is normalised, an episode has several segments, completions count
            in baselines alone (`truncated="mask"`), a component is missing, or a prompt or response
            is longer than asked for.
    """
    torch = require("torch", install="eval-protocol-rft[local]")
    if batch.normalization != "none":
        raise ExportError(
            f'the batch has normalization="{batch.normalization}" in its weights, and verl divides '
            'by loss_agg_mode: build it with normalization="none"'
        )
    _check_segments(batch.datums)
    if batch.dropped.get("masked"):
        raise ExportError(
            f"{batch.dropped['masked']} completions count in the baseline of their group and have "
            'no datum (truncated="mask"): verl would compute its baseline without them. Build the '
            'batch with truncated="keep" or "drop"'
        )
    arrays = _arrays(batch.datums, pad_token_id, prompt_length, response_length)
    call = uuid.uuid4().hex[:12]
    non_tensors = {
        "uid": np.array([f"{call}-{datum.group}" for datum in batch.datums], object),
        "row_id": np.array([datum.row_id for datum in batch.datums], object),
        "completion": np.array([datum.completion for datum in batch.datums], object),
    }
    non_tensors |= _components(batch.datums, non_tensors)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return VerlData(tensors, non_tensors, {})


def to_data_proto(
    batch: TrainingBatch,
    *,
    pad_token_id: int,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> Any:
    """`to_tensors` as a `verl.DataProto`.

    Raises:
        MissingPackageError: `verl` is not installed.
    """
    verl = require("verl", install="verl")
    data = to_tensors(
        batch,
        pad_token_id=pad_token_id,
        prompt_length=prompt_length,
        response_length=response_length,
    )
    return verl.DataProto.from_dict(**data._asdict())


def _arrays(
    datums: list[TrainingDatum], pad: int, prompt_length: int | None, response_length: int | None
) -> dict[str, NDArray[Any]]:
    columns_P = _width("prompt", [datum.prompt_length for datum in datums], prompt_length, datums)
    sizes = [len(datum) + 1 - datum.prompt_length for datum in datums]
    columns_R = _width("response", sizes, response_length, datums)
    shape = (len(datums), columns_R)
    input_ids = np.full((len(datums), columns_P + columns_R), pad, np.int64)
    attention = np.zeros_like(input_ids)
    mask = np.zeros(shape, np.int64)
    logprobs, rewards, advantages = (np.zeros(shape, np.float32) for _ in range(3))
    for i, (datum, size) in enumerate(zip(datums, sizes, strict=True)):
        start, first = columns_P - datum.prompt_length, datum.prompt_length - 1
        whole = slice(start, start + len(datum) + 1)
        input_ids[i, start] = datum.input_tokens[0]
        input_ids[i, start + 1 : whole.stop] = datum.target_tokens
        attention[i, whole] = 1
        mask[i, :size] = datum.mask[first:]
        logprobs[i, :size] = datum.logprobs[first:]
        advantages[i, :size] = datum.advantages[first:]
        # What the environment said behind the last turn is masked: no reward may stand there.
        rewards[i, int(np.flatnonzero(mask[i])[-1])] = datum.reward
    return {
        "prompts": input_ids[:, :columns_P].copy(),
        "responses": input_ids[:, columns_P:].copy(),
        "input_ids": input_ids,
        "attention_mask": attention,
        "position_ids": np.clip(attention.cumsum(axis=1) - 1, 0, None),
        "response_mask": mask,
        "rollout_log_probs": logprobs,
        "rm_scores": rewards,
        "token_level_scores": rewards.copy(),
        "token_level_rewards": rewards.copy(),
        "advantages": advantages,
        "returns": advantages.copy(),
    }


def _components(datums: list[TrainingDatum], taken: Collection[str]) -> dict[str, NDArray[Any]]:
    """[D] scores by name, where the advantages came from several, as for GDPO."""
    columns: dict[str, NDArray[Any]] = {}
    for name in datums[0].components if datums else ():
        if name in taken:
            raise ExportError(f"a component is called {name!r}, which has another meaning for verl")
        scores = [datum.components.get(name) for datum in datums]
        if None in scores:
            datum = datums[scores.index(None)]
            raise ExportError(
                f"{datum.name}: it has no component {name!r}"
                ", and verl has no place for a missing one: let the evaluator give it, or leave "
                "the completion out"
            )
        columns[name] = np.array(scores, object)
    return columns


def _check_segments(datums: list[TrainingDatum]) -> None:
    for datum in datums:
        if datum.segment:
            raise ExportError(
                f"{datum.name}: its episode has several "
                "segments, and verl counts a row of its tensors as a rollout: its group's baseline "
                "and the means of loss_agg_mode would count this one more than once. Sample with a "
                "chat template that does not rewrite history, or train where episodes count once "
                "(fireworks, tinker, cookbook)"
            )


def _width(name: str, lengths: list[int], asked: int | None, datums: list[TrainingDatum]) -> int:
    """Columns for the longest of `lengths`, or as many as asked for."""
    longest = int(np.argmax(lengths))
    if asked is not None and lengths[longest] > asked:
        datum = datums[longest]
        raise ExportError(
            f"{datum.name}: its {name} has "
            f"{lengths[longest]} tokens, {name}_length is {asked}. Filters(max_sequence_tokens=, "
            "max_completion_tokens=) leave such completions out"
        )
    return lengths[longest] if asked is None else asked
