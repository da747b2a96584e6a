"""The token data of a rollout record as segments: one per completion, or those of its episode.

Invariant: a segment is read exactly or refused with completion, segment and index; and an episode
begins with the record's prompt and its first turn, so that what is trained on is what was sampled.
The token data may be lists or arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval_protocol_rft.training.buffers import (
    Slab,
    TokenBuffer,
    TokenDataError,
    store_completions,
    store_segment,
)
from eval_protocol_rft.training.errors import TrainingDataError
from eval_protocol_rft.training.trajectory import Segment

_ARRAYS = ("tokens", "logprobs", "loss_mask")


def stand_ins(trajectories: Any) -> list[list[dict[str, Any]]] | None:
    """As many segments as in `trajectories`, with next to no tokens: for who checks the rest of a
    record. None where `trajectories` has another shape than that of episodes of segments."""
    if not _is_list(trajectories) or not all(map(_is_list, trajectories)):
        return None
    return [[_STAND_IN] * len(segments) for segments in trajectories]


_STAND_IN = {"tokens": [0, 0], "logprobs": [0.0, 0.0], "loss_mask": [0, 1]}


def read_segments(
    extra: Mapping[str, Any], buffer: TokenBuffer, *, row: str, names: Sequence[str]
) -> list[tuple[Segment, ...]]:
    """Lay out the token data of a row.

    Args:
        extra: with `prompt_ids`, [G] `completion_ids` and `inference_logprobs`, and perhaps
            `trajectories`, [G][S_i] objects with `tokens`, `logprobs` and `loss_mask`.
        buffer: where to.
        row: how messages call the row.
        names: [G] how they call its completions.

    Raises:
        TrainingDataError: the data contradicts itself; the message says where.
    """
    trajectories = extra.get("trajectories")
    # Of an episode, the first turn is only compared with what the first segment begins with.
    target = buffer if trajectories is None else TokenBuffer(0)
    try:
        slabs = store_completions(
            target, extra["prompt_ids"], extra["completion_ids"], extra["inference_logprobs"]
        )
    except TokenDataError as error:
        where = row if error.completion is None else names[error.completion]
        raise TrainingDataError(f"{where}: {error}") from error
    if trajectories is None:
        return [(_first_turn(slab, len(extra["prompt_ids"])),) for slab in slabs]
    found: list[tuple[Segment, ...]] = []
    for segments, first_turn, name in zip(trajectories, slabs, names, strict=True):
        read = [_segment(s, buffer, f"{name}, segment {k}") for k, s in enumerate(segments)]
        _check_beginning(read[0], first_turn, f"{name}, segment 0")
        found.append(tuple(read))
    return found


def _first_turn(slab: Slab, prompt_length: int) -> Segment:
    """`store_completions` has checked it."""
    return Segment(
        tokens=slab.tokens,
        logprobs=slab.logprobs,
        loss_mask=slab.loss_mask,
        prompt_length=prompt_length,
        num_sampled=len(slab.tokens) - prompt_length,
    )


def _segment(given: Any, buffer: TokenBuffer, name: str) -> Segment:
    if not isinstance(given, Mapping) or not all(key in given for key in _ARRAYS):
        held = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise TrainingDataError(f"{name}: needs tokens, logprobs and loss_mask, got {held}")
    try:
        slab = store_segment(buffer, *(given[key] for key in _ARRAYS))
        return Segment(tokens=slab.tokens, logprobs=slab.logprobs, loss_mask=slab.loss_mask)
    except (TokenDataError, TrainingDataError) as error:
        raise TrainingDataError(f"{name}: {error}") from error


def _check_beginning(segment: Segment, first_turn: Slab, name: str) -> None:
    size = len(first_turn.tokens)
    for key in _ARRAYS:
        found, wanted = getattr(segment, key)[:size], getattr(first_turn, key)
        if np.array_equal(found, wanted):
            continue
        different = np.flatnonzero(found != wanted[: len(found)])
        index = int(different[0]) if len(different) else len(found)
        value = found[index] if index < len(found) else "missing"
        raise TrainingDataError(
            f"{name}: {key}[{index}] is {value}, and {wanted[index]} in the record's prompt and "
            "first turn, which an episode begins with"
        )


def _is_list(values: Any) -> bool:
    return isinstance(values, list | tuple | np.ndarray)
