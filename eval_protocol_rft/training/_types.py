"""What was sampled for one prompt, scored and flat: `Trajectory`, and `PromptGroup` around it; and
what can be wrong on the way from scored rows to datums, and on to a trainer.

Invariant: a trajectory counts once, however many segments it has. A reward is a finite number or
None; None (not scored) is never confused with 0.0. Every message says what is wrong, in which row,
completion and token, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._errors import MissingPackageError as MissingPackageError
from eval_protocol_rft._errors import require as require
from eval_protocol_rft._segments import FloatArray as FloatArray
from eval_protocol_rft._segments import RecordError
from eval_protocol_rft._segments import Segment as Segment
from eval_protocol_rft.sampling import Failure, FinishReason

NO_COMPONENTS: Mapping[str, float | None] = MappingProxyType({})


class Trajectory(Segment, frozen=True, kw_only=True, eq=False, gc=False):
    """One completion after its prompt, or an episode of several turns: one reward.

    An episode whose history was rewritten between turns is several segments. Its own arrays are
    the first, `more` holds the others; reward and advantage are those of all of them.

    Raises:
        TrainingDataError: a field contradicts another; the message names the first such token.
    """

    reward: float | None
    """None: not scored, which is not 0.0."""
    trains: bool = True
    """False where it counts in the statistics of its group and gives no datum."""
    more: tuple[Segment, ...] = ()
    """Further segments of the episode, in order."""
    score_error: str | None = None
    """Why it has none, where the evaluator, or its exception, said so."""
    components: Mapping[str, float | None] = NO_COMPONENTS
    """Further scores by name, as `metrics` of the evaluator gave them."""
    finish_reason: FinishReason = "stop"
    """Of the last turn. Turns before it ended by themselves, as one that is cut off is the last."""
    model: str | None = None
    """Name of the model that sampled it, where known."""
    policy_version: str | None = None
    """The weights that sampled it, where known; the last of them where it spans several."""
    first_policy_version: str | None = None
    """The first of the weights, other than `policy_version`, that sampled a part of it."""
    row_id: str | None = None
    completion: int = 0
    """Place among the completions asked for in its row's rollout."""
    greedy: bool = False
    """Drawn at temperature 0: no sample of the policy, but what `remax` compares with."""
    bias: str | None = None
    """Why `logprobs` are not full-vocabulary sampling logprobs (truncated support, greedy, raw);
    None where they are."""

    def __post_init__(self) -> None:
        if self.num_sampled:
            return
        try:
            Segment.__post_init__(self)
        except RecordError as error:
            raise TrainingDataError(f"{self.name}: {error}") from error
        problem = reward_problem(self.reward)
        if problem:
            raise TrainingDataError(f"{self.name}: {problem}")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"row {self.row_id!r}, completion {self.completion}"

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
    """What its rows have in common: (experiment id, row id, model), or the caller's own key."""
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
    asked: int = 0
    """Completions asked for, without the surplus of over-sampling."""
    name: str = ""
    """How messages call it."""
    question: tuple[Any, ...] | None = None
    """What was rendered into its prompt, for groups of several rows; see `_rows.question_of`."""
    baseline: float | None = None
    """Mean reward of its greedy completions, where `filter_group` took them out."""

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


class TrainingDataError(EvalProtocolRftError, ValueError):
    """Rows, trajectories or options from which no correct training batch can be built."""


class EmptyBatchError(TrainingDataError):
    """Nothing was left to train on. `dropped` says what became of every completion."""

    def __init__(self, dropped: Mapping[str, int]) -> None:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        super().__init__(
            f"no completion is left to train on ({counts or 'there were no rows'}). Sample more "
            "prompts or more completions each, or relax `filters`"
        )
        self.dropped: Mapping[str, int] = dict(dropped)


class BiasedSamplingWarning(UserWarning):
    """Completions that are no fair draws from the policy: their logprobs are no full-vocabulary
    sampling logprobs, so that importance ratios over them are biased; slower ones of their group
    were cancelled, so that short ones are too many; or several models sampled them."""


def several_models(counts: Mapping[str, int]) -> str | None:
    """Why completions of these models (name -> how many) are no samples of one policy, or None."""
    if len(counts) < 2:
        return None
    listed = ", ".join(f"{count} of {model!r}" for model, count in counts.items())
    return (
        f"the completions are of {len(counts)} models, {listed}: one is trained, and what another "
        "one sampled is no sample of its policy. Keep the rows of one model"
    )


class ExportError(TrainingDataError):
    """Data that this consumer cannot be given exactly, or a file that does not hold it."""
