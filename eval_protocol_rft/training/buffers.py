"""Token data from lists or arrays into flat numpy buffers, without a Python loop per token.

Invariant: what is stored is what was given. A value of the wrong type is an error, never a cast
that loses something, and nothing is repaired.

Trajectories are views into large blocks: many small arrays would each pay for fresh memory, which
costs more than filling it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.sampling.types import LOGPROB_NOISE, LOWEST_LOGPROB, logprob_problem
from eval_protocol_rft.training.arrays import FloatArray, IntArray

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
