"""What was sampled for one prompt, flat: `Segment`, `Trajectory`, and `PromptGroup` around it.

Invariant: a segment's arrays have equal length, its loss mask is 1 exactly on sampled tokens, and a
logprob stands only there. A trajectory counts once, however many segments it has. A reward is a
finite number or None; None (not scored) is never confused with 0.0.

Names for the two array types that training data is made of.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import force_setattr
from numpy.typing import NDArray

from eval_protocol_rft.sampling import (
    LOGPROB_NOISE,
    LOWEST_LOGPROB,
    Failure,
    FinishReason,
    logprob_problem,
)
from eval_protocol_rft.training._errors import TrainingDataError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


NO_COMPONENTS: Mapping[str, float | None] = MappingProxyType({})


class Segment(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A contiguous token sequence, as one forward pass reads it. N tokens.

    Lists and other dtypes are converted; the arrays may be views, so do not write to them.

    Raises:
        TrainingDataError: a field contradicts another; the message names the first such token.
    """

    tokens: IntArray
    """[N] int64: prompt and sampled tokens in order."""
    logprobs: FloatArray
    """[N] float32 sampling logprobs (nats) of sampled tokens, 0.0 elsewhere."""
    loss_mask: FloatArray
    """[N] float32: 1.0 on sampled tokens, 0.0 elsewhere. The first token is never sampled."""
    prompt_length: int = 0
    """Tokens before the first sampled one. Leave it out, and `num_sampled`: they are counted. Who
    has checked a whole buffer of token data gives both, and this one is not checked again."""
    num_sampled: int = 0
    """Tokens of this segment that the policy sampled, over all its turns."""

    def __post_init__(self) -> None:
        if not self.num_sampled:
            self._check("")

    def _check(self, where: str) -> None:
        """Check and convert the arrays. What is wrong is said with `where` before it."""
        tokens = _array("tokens", self.tokens, "iu", np.dtype(np.int64), where)
        logprobs = _array("logprobs", self.logprobs, "iuf", np.dtype(np.float32), where)
        mask = _array("loss_mask", self.loss_mask, "iubf", np.dtype(np.float32), where)
        problem = (
            _length_problem(tokens, logprobs, mask)
            or _mask_problem(mask)
            or _value_problem(tokens, logprobs, mask)
        )
        if problem:
            raise TrainingDataError(where + problem)
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


class Trajectory(Segment, frozen=True, kw_only=True, eq=False, gc=False):
    """One completion after its prompt, or an episode of several turns: one reward.

    An episode whose history was rewritten between turns is several segments. Its own arrays are
    the first, `more` holds the others; reward and advantage are those of all of them.

    Raises:
        TrainingDataError: a field contradicts another; the message names the first such token.
    """

    reward: float | None
    """None: not scored, which is not 0.0."""
    more: tuple[Segment, ...] = ()
    """Further segments of the episode, in order."""
    score_error: str | None = None
    """Why it has none, where the evaluator, or its exception, said so."""
    components: Mapping[str, float | None] = NO_COMPONENTS
    """Further scores by name, as `metrics` of the evaluator gave them."""
    finish_reason: FinishReason = "stop"
    """Of the last turn. Turns before it ended by themselves, as one that is cut off is the last."""
    policy_version: str | None = None
    """The weights that sampled it, where known; the last of them where it spans several."""
    first_policy_version: str | None = None
    """The first of the weights, other than `policy_version`, that sampled a part of it."""
    row_id: str | None = None
    completion: int = 0
    """Place among the completions asked for in its row's rollout."""
    bias: str | None = None
    """Why `logprobs` are not full-vocabulary sampling logprobs (truncated support, greedy, raw);
    None where they are."""

    def __post_init__(self) -> None:
        if self.num_sampled:
            return
        where = f"row {self.row_id!r}, completion {self.completion}: "
        self._check(where)
        problem = reward_problem(self.reward)
        if problem:
            raise TrainingDataError(where + problem)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of the episode, in order; one where nothing was rewritten."""
        return (self, *self.more)

    @property
    def total_sampled(self) -> int:
        """Tokens that the policy sampled, over all segments."""
        return self.num_sampled + sum(segment.num_sampled for segment in self.more)

    @property
    def truncated(self) -> bool:
        """The last turn was cut off at max_tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptGroup:
    """One prompt and everything sampled for it, failures and unscored completions included."""

    key: Hashable
    """What its rows have in common: (experiment id, row id), or the caller's own key."""
    trajectories: tuple[Trajectory, ...]
    """[G] completions that were sampled, scored or not."""
    failures: tuple[Failure, ...] = ()
    """Completions that could not be had."""
    cancelled: int = 0
    """The surplus that over-sampling cancelled when there were enough."""
    failed_rows: tuple[str, ...] = ()
    """What ended the rollouts that left nothing at all, one message per row."""
    tokenizer: str | None = None
    """Name of the tokenizer of all its tokens, where known."""

    def __len__(self) -> int:
        """G, the number of completions that were sampled."""
        return len(self.trajectories)

    @property
    def cut_off(self) -> int:
        """Completions cancelled for being slow: surplus, and stragglers at a deadline."""
        return self.cancelled + sum(failure.kind == "cancelled" for failure in self.failures)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """[G] float64, NaN where a completion is not scored."""
        return np.array([t.reward for t in self.trajectories], dtype=np.float64)

    def components(self, names: tuple[str, ...]) -> NDArray[np.float64]:
        """[G, K] the named further scores, NaN where a completion lacks one."""
        values = [[t.components.get(name) for name in names] for t in self.trajectories]
        return np.array(values, dtype=np.float64).reshape(len(self), len(names))


def reward_problem(reward: Any) -> str | None:
    """Say why this is no reward, or None."""
    number = isinstance(reward, (float, int, Real))  # Real lets numpy's scalars in, slowly
    if reward is None or (number and math.isfinite(reward)):
        return None
    return f"reward is {reward!r}: it must be a finite number, or None where there is no score"


def _array(name: str, values: Any, kinds: str, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """`values` as a one-dimensional array of `dtype`, refusing what a cast would distort."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise TrainingDataError(f"{where}{name} has shape {array.shape}, it must be flat")
    if array.size and array.dtype.kind not in kinds:
        raise TrainingDataError(f"{where}{name} holds {array.dtype}, not {dtype}")
    return array.astype(dtype, copy=False)


def _length_problem(tokens: IntArray, logprobs: FloatArray, mask: FloatArray) -> str | None:
    if not len(tokens) == len(logprobs) == len(mask):
        return f"{len(tokens)} tokens, {len(logprobs)} logprobs, loss_mask of {len(mask)}"
    if len(tokens) < 2:
        return "needs at least a prompt token and a sampled token"
    return None


def _mask_problem(mask: FloatArray) -> str | None:
    odd = (mask != 0) & (mask != 1)
    if odd.any():
        index = int(odd.argmax())
        return f"loss_mask[{index}] is {mask[index]}: it must be 0 or 1"
    if mask[0]:
        return "loss_mask[0] is 1: the first token follows nothing, so nothing predicts it"
    if not mask.any():
        return "loss_mask is 0 everywhere: no token was sampled"
    return None


def _value_problem(tokens: IntArray, logprobs: FloatArray, mask: FloatArray) -> str | None:
    if tokens.min() < 0:
        index = int((tokens < 0).argmax())
        return f"tokens[{index}] is {tokens[index]}: not a token id"
    wrong = ~((logprobs <= LOGPROB_NOISE) & (logprobs >= LOWEST_LOGPROB))
    if wrong.any():
        index = int(wrong.argmax())
        return f"logprobs[{index}] is {logprobs[index]}: {logprob_problem(logprobs[index])}"
    stray = (logprobs != 0) & (mask == 0)
    if stray.any():
        index = int(stray.argmax())
        return (
            f"logprobs[{index}] is {logprobs[index]} where loss_mask is 0: put 0.0 where the "
            "policy sampled nothing"
        )
    return None
