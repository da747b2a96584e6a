"""Token data as arrays: `Segment`, a row's completions laid out in few large blocks, and how an
episode of them went.

Invariant: what is stored is what was given. Lists and arrays are read alike, without a Python loop
per token; a value of the wrong type is an error, never a cast that loses something; nothing is
padded or repaired. A segment's arrays have equal length, `loss_mask` is 1 exactly on sampled
tokens, and a logprob stands only there. A turn's ids and logprobs are those that went over the
wire. What breaks this is told with completion and index.

Segments are views into large blocks: many small arrays would each pay for fresh memory, which costs
more than filling it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import force_setattr
from numpy.typing import NDArray

from eval_protocol_rft import sampling
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import LOGPROB_NOISE, LOWEST_LOGPROB, TOKEN_ID_LIMIT

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Room = tuple[IntArray, FloatArray, FloatArray]
"""Tokens, logprobs and loss mask of consecutive tokens."""

BLOCK_TOKENS = 1 << 22
"""Tokens per block: three arrays of 16 to 32 MiB, so that they lie in huge pages (with a
quarter as many tokens, building batches was a third slower). What is not filled is address space,
not memory; what is filled stays as long as one segment of the block does."""


class RecordError(EvalProtocolRftError, ValueError):
    """There is no rollout record, or one that contradicts itself; the message says where."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A contiguous token sequence, as one forward pass reads it. N tokens.

    Lists and other dtypes are converted; the arrays may be views, so do not write to them.

    Raises:
        RecordError: a field contradicts another; the message names the first such token.
    """

    tokens: IntArray
    """[N] int64: ids sent and sampled, in order."""
    logprobs: FloatArray
    """[N] float32 sampling logprobs (nats) of sampled tokens, 0.0 elsewhere."""
    loss_mask: FloatArray
    """[N] float32: 1.0 on sampled tokens, 0.0 elsewhere. The first token is never sampled."""
    prompt_length: int = 0
    """Tokens before the first sampled one. Leave it out, and `num_sampled`: they are counted. Who
    has checked a whole buffer of token data gives both, and this one is not checked again."""
    num_sampled: int = 0
    """Tokens of this segment that the policy sampled, over all its turns."""
    routing_matrices: Sequence[str] | None = None
    """[N] base64, how a mixture of experts routed the prediction of each token, as the sampler said
    it; "" where it said nothing. None: it said nothing of any."""

    def __post_init__(self) -> None:
        if self.num_sampled:
            return
        tokens = _array("tokens", self.tokens, "iu", np.dtype(np.int64))
        logprobs = _array("logprobs", self.logprobs, "iuf", np.dtype(np.float32))
        mask = _array("loss_mask", self.loss_mask, "iubf", np.dtype(np.float32))
        _check_segment(tokens, logprobs, mask)
        if self.routing_matrices is not None:
            check_routing(self.routing_matrices, len(tokens), "routing_matrices")
        for name, value in (
            ("tokens", tokens),
            ("logprobs", logprobs),
            ("loss_mask", mask),
            ("prompt_length", int(mask.argmax())),
            ("num_sampled", int(np.count_nonzero(mask))),
        ):
            force_setattr(self, name, value)

    def __len__(self) -> int:
        """N, the number of tokens."""
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same numbers."""
        return (
            isinstance(other, Segment)
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS)
            and list(self.routing_matrices or ()) == list(other.routing_matrices or ())
        )

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, list[Any]]:
        """As `trajectories` of a record has it: lists, the loss mask of integers."""
        values: dict[str, list[Any]] = {
            "tokens": self.tokens.tolist(),
            "logprobs": self.logprobs.tolist(),
            "loss_mask": self.loss_mask.astype(np.int8).tolist(),
        }
        if self.routing_matrices is not None:
            values["routing_matrices"] = list(self.routing_matrices)
        return values


_ARRAYS = ("tokens", "logprobs", "loss_mask")


class TokenBuffer:
    """Hands out room from large blocks, in order. A block lives as long as a view into it, so
    blocks begin small, and each is twice as large as the one before, up to `block_tokens`."""

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self._most = block_tokens
        self._block = _new_block(0)
        self._used = 0

    def take(self, size: int) -> Room:
        """Room for `size` tokens. Logprobs and loss mask come zeroed, tokens do not."""
        if self._used + size > len(self._block[0]):
            self._block = _new_block(max(size, min(2 * len(self._block[0]), self._most)))
            self._used = 0
        start, self._used = self._used, self._used + size
        tokens, logprobs, mask = self._block
        stop = self._used
        return tokens[start:stop], logprobs[start:stop], mask[start:stop]


def _new_block(size: int) -> Room:
    return np.empty(size, np.int64), np.zeros(size, np.float32), np.zeros(size, np.float32)


def lay_out(
    prompt_ids: Any,
    completion_ids: Sequence[Any],
    logprobs: Sequence[Any],
    buffer: TokenBuffer,
    names: Sequence[str],
) -> list[Segment]:
    """Each completion behind its prompt, as a segment.

    Args:
        prompt_ids: [P] ids.
        completion_ids: [G][T_i] ids. Lists, numpy arrays, or anything numpy reads without a copy.
        logprobs: [G][T_i] sampling logprobs.
        buffer: where to.
        names: [G] how messages call the completions.

    Returns:
        [G] segments of P + T_i tokens.

    Raises:
        RecordError: lengths differ, a value has the wrong type, is no token id or no logprob.
    """
    prompt = np.empty(_size(prompt_ids, "prompt_ids"), np.int64)
    _store(prompt_ids, prompt, "prompt_ids")
    if prompt.size == 0:
        raise RecordError("prompt_ids must hold at least one id")
    sizes: list[int] = []
    for ids, values, name in zip(completion_ids, logprobs, names, strict=True):
        sizes.append(_size(ids, f"{name}: completion_ids"))
        if (count := _size(values, f"{name}: inference_logprobs")) != sizes[-1] or not count:
            raise RecordError(
                f"{name}: {sizes[-1]} token ids and {count} logprobs; they must be as many, not 0"
            )
    room = buffer.take(len(sizes) * len(prompt) + sum(sizes))
    tokens, sampled, mask = room
    segments: list[Segment] = []
    first, stop = len(prompt), 0
    for ids, values, size, name in zip(completion_ids, logprobs, sizes, names, strict=True):
        start, stop = stop, stop + first + size
        segment = Segment(
            tokens=tokens[start:stop],
            logprobs=sampled[start:stop],
            loss_mask=mask[start:stop],
            prompt_length=first,
            num_sampled=size,
        )
        segment.tokens[:first] = prompt
        _store(ids, segment.tokens[first:], f"{name}: completion_ids")
        _store(values, segment.logprobs[first:], f"{name}: inference_logprobs")
        segment.loss_mask[first:] = 1.0
        segments.append(segment)
    if not _fine(tokens, sampled):
        _check_ids(prompt, "prompt_ids")
        for segment, name in zip(segments, names, strict=True):
            _check_ids(segment.tokens[first:], f"{name}: completion_ids")
            _check_logprobs(segment.logprobs[first:], f"{name}: inference_logprobs")
    return segments


def read_segment(value: Any, buffer: TokenBuffer) -> Segment:
    """A segment of an episode: one already, or an object with `tokens`, `logprobs`, `loss_mask`.

    Raises:
        RecordError: it is none, or its values contradict each other.
    """
    if isinstance(value, Segment):
        return value
    if not isinstance(value, Mapping) or not all(name in value for name in _ARRAYS):
        held = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise RecordError(f"needs tokens, logprobs and loss_mask, got {held}")
    sizes = [_size(value[name], name) for name in _ARRAYS]
    if len(set(sizes)) > 1:
        raise RecordError("{} tokens, {} logprobs, loss_mask of {}".format(*sizes))
    tokens, logprobs, mask = buffer.take(sizes[0])
    _store(value["tokens"], tokens, "tokens")
    _store(value["logprobs"], logprobs, "logprobs")
    _store(value["loss_mask"], mask, "loss_mask", kinds="iubf")
    return Segment(
        tokens=tokens,
        logprobs=logprobs,
        loss_mask=mask,
        routing_matrices=value.get("routing_matrices"),
    )


def beginning_problem(segment: Segment, first_turn: Segment) -> str | None:
    """Say where an episode's first segment is not what its first turn was, or None."""
    size = len(first_turn)
    for name in _ARRAYS:
        values, wanted = getattr(segment, name)[:size], getattr(first_turn, name)
        if np.array_equal(values, wanted):
            continue
        different = np.flatnonzero(values != wanted[: len(values)])
        index = int(different[0]) if len(different) else len(values)
        value = values[index] if index < len(values) else "missing"
        return (
            f"{name}[{index}] is {value}, and {wanted[index]} in the record's prompt and first "
            "turn, which an episode begins with"
        )
    return None


def read_ids(values: Any, where: str) -> IntArray:
    """[N] token ids, as an array of their own.

    Raises:
        RecordError: they are none, or none at all; the message begins with `where`.
    """
    ids = np.empty(_size(values, where), np.int64)
    _store(values, ids, where)
    _check_ids(ids, where)
    if not len(ids):
        raise RecordError(f"{where} is empty: a turn has one at least")
    return ids


def check_logprobs(values: Any, size: int, where: str) -> None:
    """Refuse what are not `size` logprobs of sampled tokens.

    Raises:
        RecordError: their number, type or values are wrong; the message begins with `where`.
    """
    if (count := _size(values, where)) != size:
        raise RecordError(f"{where}: {count} for {size} token ids")
    numbers = np.empty(count, np.float64)
    _store(values, numbers, where)
    _check_logprobs(numbers, where)


def check_routing(values: Any, size: int, where: str) -> None:
    """Refuse what are not `size` texts, one for each token.

    Raises:
        RecordError: their number or type is wrong; the message begins with `where`.
    """
    if not isinstance(values, (list, tuple)) or len(values) != size:
        count = len(values) if isinstance(values, Sized) else type(values).__name__
        raise RecordError(f"{where}: {count} for {size} tokens, it must be a list of as many")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise RecordError(f"{where}[{index}] is {type(value).__name__}, not base64 text")


def _size(values: Any, where: str) -> int:
    if isinstance(values, (list, np.ndarray)):
        return len(values)
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sized):
        kind = type(values).__name__
        raise RecordError(f"{where} is {kind}, not a list or an array of numbers")
    return len(values)


def _store(values: Any, target: NDArray[Any], where: str, *, kinds: str | None = None) -> None:
    """Copy `values` into `target`, which has their length. Arrays are of one of `kinds`; default
    the kind of the target."""
    if isinstance(values, (list, tuple)):
        # struct writes into place at twice the speed of numpy's conversion, and refuses None,
        # text, and a float among the ids where numpy would cast.
        try:
            struct.pack_into(f"{len(values)}{target.dtype.char}", target.data, 0, *values)
        except (struct.error, OverflowError) as error:
            raise RecordError(f"{where}: {error}") from error
        return
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    allowed = kinds or ("iu" if target.dtype.kind == "i" else "f")
    if array.ndim != 1 or array.dtype.kind not in allowed:
        raise RecordError(
            f"{where} is an array of {array.dtype} with shape {array.shape}, expected "
            f"{target.dtype} with shape {target.shape}"
        )
    target[:] = array


def _fine(tokens: IntArray, logprobs: FloatArray) -> bool:
    """Whether no number of a row is wrong, in few passes over all of its completions."""
    return not len(tokens) or bool(
        tokens.view(np.uint64).max() < TOKEN_ID_LIMIT  # those below 0 are large there
        and logprobs.max() <= LOGPROB_NOISE
        and logprobs.min() >= LOWEST_LOGPROB  # False for NaN as well
    )


def _check_ids(ids: IntArray, where: str) -> None:
    wrong = (ids < 0) | (ids >= TOKEN_ID_LIMIT)
    if wrong.any():
        index = int(wrong.argmax())
        raise RecordError(f"{where}[{index}] is {ids[index]}: not a token id")


def _check_logprobs(values: NDArray[Any], where: str) -> None:
    wrong = ~((values <= LOGPROB_NOISE) & (values >= LOWEST_LOGPROB))
    if wrong.any():
        index = int(wrong.argmax())
        raise RecordError(
            f"{where}[{index}] is {values[index]}: {sampling.logprob_problem(float(values[index]))}"
        )


def _array(name: str, values: Any, kinds: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`values` as a one-dimensional array of `dtype`, refusing what a cast would distort."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise RecordError(f"{name} has shape {array.shape}, it must be flat")
    if array.size and array.dtype.kind not in kinds:
        raise RecordError(f"{name} holds {array.dtype}, not {dtype}")
    return array.astype(dtype, copy=False)


def _check_segment(tokens: IntArray, logprobs: FloatArray, mask: FloatArray) -> None:
    if not len(tokens) == len(logprobs) == len(mask):
        raise RecordError(
            f"{len(tokens)} tokens, {len(logprobs)} logprobs, loss_mask of {len(mask)}"
        )
    if len(tokens) < 2:
        raise RecordError("needs at least a prompt token and a sampled token")
    odd = (mask != 0) & (mask != 1)
    if odd.any():
        index = int(odd.argmax())
        raise RecordError(f"loss_mask[{index}] is {mask[index]}: it must be 0 or 1")
    if mask[0]:
        raise RecordError(
            "loss_mask[0] is 1: the first token follows nothing, so nothing predicts it"
        )
    if not mask.any():
        raise RecordError(
            "loss_mask is 0 everywhere: no token was sampled. A segment in which nothing was "
            "sampled is none; leave it out"
        )
    _check_ids(tokens, "tokens")
    _check_logprobs(logprobs, "logprobs")
    stray = (logprobs != 0) & (mask == 0)
    if stray.any():
        index = int(stray.argmax())
        raise RecordError(
            f"logprobs[{index}] is {logprobs[index]} where loss_mask is 0: put 0.0 where the "
            "policy sampled nothing"
        )


class EpisodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How one episode went."""

    turns: int
    """Turns that the policy sampled."""
    stop_reason: str
    """What ended it; "length": its last turn was cut off at max_tokens."""
    finish_reason: sampling.FinishReason | None = None
    """Of the last turn. None says that it is "length" exactly where `stop_reason` is; needed where
    another limit than that of the turn cut it off."""
    step_rewards: list[float | None] = []
    """One per turn, in order, as far as the environment was asked; None where it gave none."""
    metrics: dict[str, Any] = {}
    messages: list[dict[str, Any]] = []
    """The whole conversation, the row's own messages included."""
    row_messages: int | None = None
    """How many of them are the row's own; the environment's first ones come behind."""
    prompt_ids: list[int] | None = None
    """What its first turn was sampled behind, where that is not the `prompt_ids` of the record: an
    agent may say something else each time."""

    @property
    def last_finish_reason(self) -> sampling.FinishReason:
        """Of the last turn."""
        return self.finish_reason or ("length" if self.stop_reason == "length" else "stop")


def episode_problem(
    episode: EpisodeRecord, segments: int, first: sampling.FinishReason
) -> str | None:
    """Say what keeps `episode` from being one of so many segments, whose first turn ended for the
    reason `first`; or None."""
    if episode.turns < 1:
        return f"turns is {episode.turns}: an episode has at least one"
    if not 1 <= segments <= episode.turns:
        return f"{segments} segments for {episode.turns} turns: a segment holds at least one turn"
    if len(episode.step_rewards) > episode.turns:
        return f"step_rewards has {len(episode.step_rewards)} entries for {episode.turns} turns"
    for turn, reward in enumerate(episode.step_rewards):
        if reward is not None and not math.isfinite(reward):
            return (
                f"step_rewards[{turn}] is {reward!r}: a finite number, or None where there is none"
            )
    last = episode.last_finish_reason
    if episode.stop_reason == "length" and last != "length":
        return 'stop_reason is "length" and the finish_reason of its last turn is "stop"'
    if episode.turns == 1 and last != first:
        return (
            f'its only turn has the finish reason "{first}" in finish_reasons and "{last}" here '
            f'(stop_reason "{episode.stop_reason}"): give the episode its finish_reason'
        )
    return None


def turn_trace(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
) -> dict[str, Any]:
    """One turn as the public fw-ai/cookbook adapter reads it: an entry of `token_turn_traces`."""
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "completion_logprobs": logprobs,
        "finish_reason": finish_reason,
    }
