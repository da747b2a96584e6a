"""Token data from lists or arrays into flat numpy buffers, without a Python loop per token.

Invariant: what is stored is what was given. A value of the wrong type is an error, never a cast
that loses something, and nothing is repaired.

Trajectories are views into large blocks: many small arrays would each pay for fresh memory, which
costs more than filling it.

The token data of a rollout record as segments: one per completion, or those of its episode.

Invariant: a segment is read exactly or refused with completion, segment and index; and an episode
begins with the record's prompt and its first turn, so that what is trained on is what was sampled.
The token data may be lists or arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.sampling import LOGPROB_NOISE, LOWEST_LOGPROB, logprob_problem
from eval_protocol_rft.training._errors import TrainingDataError
from eval_protocol_rft.training._trajectory import FloatArray, IntArray, Segment

BLOCK_TOKENS = 1 << 22
"""Tokens per block: three arrays of 16 to 32 MiB, so that they lie in huge pages (with a
quarter as many tokens, building batches was a third slower). What is not filled is address space,
not memory; what is filled stays as long as one trajectory of the block does."""


class TokenDataError(ValueError):
    """Token data of the wrong type or shape. `completion` is its place in the list that was given,
    None for the prompt."""

    def __init__(self, completion: int | None, message: str) -> None:
        super().__init__(message)
        self.completion = completion


class Slab(NamedTuple):
    """Room for consecutive tokens. `logprobs` and `loss_mask` come zeroed, `tokens` does not."""

    tokens: IntArray
    logprobs: FloatArray
    loss_mask: FloatArray

    def part(self, start: int, stop: int) -> Slab:
        return Slab(self.tokens[start:stop], self.logprobs[start:stop], self.loss_mask[start:stop])


class TokenBuffer:
    """Hands out slabs from large blocks, in order. A block lives as long as a view into it, so
    blocks begin small, and each is twice as large as the one before, up to `block_tokens`."""

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self._most = block_tokens
        self._block = _new_block(0)
        self._used = 0

    def take(self, size: int) -> Slab:
        """Room for `size` tokens."""
        if self._used + size > len(self._block.tokens):
            self._block = _new_block(max(size, min(2 * len(self._block.tokens), self._most)))
            self._used = 0
        start, self._used = self._used, self._used + size
        return self._block.part(start, self._used)


def _new_block(size: int) -> Slab:
    return Slab(np.empty(size, np.int64), np.zeros(size, np.float32), np.zeros(size, np.float32))


def store_completions(
    buffer: TokenBuffer,
    prompt_ids: Any,
    completion_ids: Sequence[Any],
    logprobs: Sequence[Any],
) -> list[Slab]:
    """Lay out prompt and completion G times, one slab per completion.

    Args:
        buffer: where to.
        prompt_ids: [P] ids.
        completion_ids: [G][T_i] ids. Lists, numpy arrays, or anything numpy reads without a copy.
        logprobs: [G][T_i] sampling logprobs.

    Returns:
        [G] slabs of P + T_i tokens: logprobs and loss mask 0.0 on the prompt.

    Raises:
        TokenDataError: lengths differ, a value has the wrong type, is no token id or no logprob.
    """
    prompt = np.empty(_size(prompt_ids, None, "prompt_ids"), np.int64)
    _store(prompt_ids, prompt, None, "prompt_ids")
    if prompt.size == 0 or prompt.min() < 0:
        raise TokenDataError(None, "prompt_ids must hold at least one id, none below 0")
    sizes = [_size(ids, i, "completion_ids") for i, ids in enumerate(completion_ids)]
    room = buffer.take(len(sizes) * len(prompt) + sum(sizes))
    slabs: list[Slab] = []
    first, stop = len(prompt), 0
    for i, (ids, values, size) in enumerate(zip(completion_ids, logprobs, sizes, strict=True)):
        if _size(values, i, "inference_logprobs") != size or not size:
            raise TokenDataError(
                i, f"{size} token ids and {len(values)} logprobs; they must be as many, not 0"
            )
        start, stop = stop, stop + first + size
        slab = room.part(start, stop)
        slab.tokens[:first] = prompt
        _store(ids, slab.tokens[first:], i, "completion_ids")
        _store(values, slab.logprobs[first:], i, "inference_logprobs")
        slab.loss_mask[first:] = 1.0
        slabs.append(slab)
    _check_values(room, slabs, first)
    return slabs


def store_segment(buffer: TokenBuffer, tokens: Any, logprobs: Any, loss_mask: Any) -> Slab:
    """Lay out one segment of N tokens as it is. Its values are for `Segment` to check.

    Raises:
        TokenDataError: lengths differ, or a value has the wrong type; `completion` is None.
    """
    given = {"tokens": tokens, "logprobs": logprobs, "loss_mask": loss_mask}
    sizes = {name: _size(values, None, name) for name, values in given.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise TokenDataError(None, f"{told}: they must be as many")
    slab = buffer.take(sizes["tokens"])
    _store(tokens, slab.tokens, None, "tokens")
    _store(logprobs, slab.logprobs, None, "logprobs")
    _store(loss_mask, slab.loss_mask, None, "loss_mask", kinds="iubf")
    return slab


def _size(values: Any, completion: int | None, name: str) -> int:
    if isinstance(values, (list, np.ndarray)):
        return len(values)
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sized):
        kind = type(values).__name__
        raise TokenDataError(completion, f"{name} is {kind}, not a list or an array of numbers")
    return len(values)


def _store(
    values: Any,
    target: NDArray[Any],
    completion: int | None,
    name: str,
    *,
    kinds: str | None = None,
) -> None:
    """Copy `values` into `target`, which has their length. Arrays are of one of `kinds`; default
    the kind of the target."""
    if isinstance(values, (list, tuple)):
        # struct writes into place at twice the speed of numpy's conversion, and refuses None,
        # text, and a float among the ids where numpy would cast.
        try:
            struct.pack_into(f"{len(values)}{target.dtype.char}", target.data, 0, *values)
        except (struct.error, OverflowError) as error:
            raise TokenDataError(completion, f"{name}: {error}") from error
        return
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    allowed = kinds or ("iu" if target.dtype.kind == "i" else "f")
    if array.ndim != 1 or array.dtype.kind not in allowed:
        raise TokenDataError(
            completion,
            f"{name} is an array of {array.dtype} with shape {array.shape}, expected "
            f"{target.dtype} with shape {target.shape}",
        )
    target[:] = array


def _check_values(room: Slab, slabs: Sequence[Slab], prompt_length: int) -> None:
    """Check all completions of a row in a few passes over its buffer."""
    if not slabs or (
        room.tokens.min() >= 0
        and room.logprobs.max() <= LOGPROB_NOISE
        and room.logprobs.min() >= LOWEST_LOGPROB  # False for NaN as well
    ):
        return
    for i, slab in enumerate(slabs):
        ids, values = slab.tokens[prompt_length:], slab.logprobs[prompt_length:]
        outside = ~((values <= LOGPROB_NOISE) & (values >= LOWEST_LOGPROB))
        if (ids < 0).any():
            index = int((ids < 0).argmax())
            raise TokenDataError(i, f"completion_ids[{index}] is {ids[index]}: not a token id")
        if outside.any():
            index = int(outside.argmax())
            problem = logprob_problem(float(values[index]))
            raise TokenDataError(i, f"inference_logprobs[{index}] is {values[index]}: {problem}")


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
