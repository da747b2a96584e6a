"""Is this run still learning what it should? Says what is wrong, and why; and when nothing more can
come of it. Pure.

Invariant: a warning names its cause and what to do about it, and comes once per cause. A run is
hopeless where too many groups in a row teach nothing, or its data is used up before a step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._trainer import named_version
from eval_protocol_rft.training import FAIL_K3, WARN_K3, Mismatch, PromptGroup, Trajectory

WINDOW = 5
"""Steps over which rewards are averaged."""
COLLAPSED = 0.5
"""A mean reward below this share of the best one is a collapse."""

EXACT_K3 = 1e-5
"""Where sampler and trainer are one model in float32, mean k3 is that of float noise, below 1e-9: a
tenth of a millinat would pass unseen below `WARN_K3`, and is a fault all the same."""

UNSCORED_GROUPS = 64
"""So many groups in a row of which nothing could be sampled or scored end the run."""
STUCK_STEPS = 20
"""So many steps' worth of groups in a row without a gradient do."""

Cause = Literal[
    "stale_weights",
    "raw_logprobs",
    "shifted_logprobs",
    "missing_eos",
    "mismatch",
    "collapse",
    "unnamed_versions",
    "uncompared",
]

_ADVICE: dict[str, str] = {
    "stale_weights": (
        "the first steps agreed, so the sampler does not draw from the weights that it was given: "
        "look at how weights reach it (a server that ignores a reload, tied embeddings, a cache)"
    ),
    "raw_logprobs": (
        "they agree at temperature 1, so the sampler gives raw logprobs, not those it drew with: "
        "start vLLM with --logprobs-mode processed_logprobs, or sample at temperature 1"
    ),
    "shifted_logprobs": (
        "they agree when moved by one token: the sampler's logprobs belong to their neighbours"
    ),
    "missing_eos": (
        "completions end without an end-of-turn token, so the policy is never taught to stop: "
        "look for a server that cuts it off, or give its id to the tokenizer"
    ),
    "mismatch": (
        "look at the weights (same file?), the precision, the temperature and the prompt's tokens; "
        "`ep-rft doctor` checks them one by one"
    ),
    "unnamed_versions": (
        "that it samples from the newest weights shows in the logprobs alone, and how old a "
        "completion is is counted from when its row was started"
    ),
    "uncompared": (
        "a fault of the sampler would show later, on the first token that the weights in training "
        "sampled"
    ),
    "collapse": "lower the learning rate, or clip harder; go back to an earlier checkpoint",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong."""

    cause: Cause
    fatal: bool
    """Nothing that is learnt from here on would be right."""
    message: str


class TrainingStoppedError(EvalProtocolRftError, RuntimeError):
    """Training on would teach the wrong thing; the message says why and what to do."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


class NothingToTrainOnError(EvalProtocolRftError, RuntimeError):
    """Rows give no completions, no scores, or none with a gradient; the message says why."""


class Watch:
    """Told of every group and of every step, in order.

    Args:
        groups_per_step: None: what has no gradient is not this run's to judge.
        exact: sampler and trainer are one model in this process, in float32.
    """

    def __init__(self, groups_per_step: int | None = None, *, exact: bool = False) -> None:
        self._warn_above = EXACT_K3 if exact else WARN_K3
        self._stuck = math.inf if groups_per_step is None else STUCK_STEPS * groups_per_step
        self._barren = self._unscored = 0
        """Groups in a row that taught nothing; and that have no score either."""
        self._last: PromptGroup | None = None
        """The last of those that taught nothing."""
        self._last_reward: float | None = None
        """Of one that taught nothing."""
        self._agreed = False
        """Sampler and trainer agreed at some step."""
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._best = 0.0
        """Mean over a window."""
        self._highest = 0.0
        """Mean of one step."""
        self._warned: set[tuple[Cause, bool]] = set()

    def mismatch(
        self,
        step: int,
        difference: Mismatch | None,
        *,
        shifted: bool = False,
        raw: Mismatch | None = None,
    ) -> Trouble | None:
        """What sampler and trainer said of on-policy tokens.

        Args:
            step: from 1 on.
            difference: how far they are apart; None where there was no such token.
            shifted: they agree when moved by one token.
            raw: the same against the trainer's logprobs at temperature 1, where another was
                sampled with.
        """
        if difference is None:
            return None
        if not self.differs(difference):
            self._agreed = True
            return None
        fatal = difference.verdict == "fail"
        cause: Cause = "mismatch"
        if shifted:
            cause = "shifted_logprobs"
        elif raw is not None and raw.k3 < min(difference.k3 / 10, self._warn_above):
            cause = "raw_logprobs"
        elif self._agreed:
            cause = "stale_weights"
        # Those two are faults whatever their size, and so is all that would be learnt from them.
        fatal = fatal or cause in ("shifted_logprobs", "raw_logprobs")
        bar = f"fail above {FAIL_K3:g}" if fatal else f"warn above {self._warn_above:g}"
        return self._trouble(
            cause,
            fatal,
            f"step {step}: sampler and trainer disagree, mean k3 {difference.k3:.2g} over "
            f"{difference.tokens} tokens ({bar}), of which {difference.beyond:.0%} are more than "
            "1 % apart",
        )

    def differs(self, difference: Mismatch) -> bool:
        """Whether sampler and trainer are further apart than their precision explains."""
        return difference.k3 > self._warn_above

    def uncompared(self, step: int) -> Trouble | None:
        """No token of a step, and of its probe, was sampled by the weights in training."""
        return self._trouble(
            "uncompared", False, f"step {step}: sampler and trainer could not be compared"
        )

    def versions(self, step: int, completions: Sequence[Trajectory], oldest: int) -> Trouble | None:
        """Which weights completions say that they were sampled by.

        Args:
            step: from 1 on.
            completions: of one group.
            oldest: the version that the sampler had when the group was started.
        """
        for completion in completions:
            named = (completion.policy_version, completion.first_policy_version)
            known = [v for name in named if (v := named_version(name)) is not None]
            if not known:
                return self._trouble(
                    "unnamed_versions",
                    False,
                    f"step {step}: the sampler does not name the weights of completions",
                )
            if min(known) < oldest:
                return self._trouble(
                    "stale_weights",
                    True,
                    f"step {step}: completion {completion.completion} of row {completion.row_id} "
                    f"was sampled by version {min(known)}, and the sampler had version {oldest} "
                    "before it began",
                )
        return None

    def agreed(self, k3: float | None) -> None:
        """The mean k3 of an earlier step."""
        self._agreed = self._agreed or (k3 is not None and k3 <= WARN_K3)

    def endings(self, step: int, missing: int, completions: int) -> Trouble | None:
        """How many completions that ended by themselves lack an end token."""
        if not missing:
            return None
        return self._trouble(
            "missing_eos",
            True,
            f"step {step}: {missing} of {completions} completions ended without an end token",
        )

    def reward(self, step: int, mean: float | None, learning_rate: float) -> Trouble | None:
        """The mean reward of everything sampled for a step."""
        if mean is None:
            return None
        self._rewards.append(mean)
        self._highest = max(self._highest, mean)
        if len(self._rewards) < WINDOW:
            return None
        now = sum(self._rewards) / WINDOW
        self._best = max(self._best, now)
        if self._best > 0 and now < COLLAPSED * self._best:
            return self._trouble(
                "collapse",
                False,
                f"step {step}: the mean reward fell from {self._best:.3f} to {now:.3f} at a "
                f"learning rate of {learning_rate:g}",
            )
        return None

    def group(self, group: PromptGroup, *, trains: bool) -> None:
        """A group has come in. `trains`: there is something to learn from in it.

        Raises:
            NothingToTrainOnError: there was nothing in too many in a row, this the last of them.
        """
        if trains:
            self._barren = self._unscored = 0
            return
        rewards = [t.reward for t in group.trajectories if t.reward is not None]
        self._last = group
        self._barren += 1
        self._unscored = 0 if rewards else self._unscored + 1
        self._last_reward = rewards[-1] if rewards else self._last_reward
        if self._unscored >= min(UNSCORED_GROUPS, self._stuck):
            raise nothing_scored(self._unscored, group)
        if self._barren >= self._stuck:
            mean = sum(rewards) / len(rewards) if rewards else None
            raise NothingToTrainOnError(
                f"{self._barren} groups in a row have nothing to learn from: all "
                f"completions of a prompt got the same reward (the last {mean}), or filters "
                "dropped them. Use easier or harder prompts, or more completions per prompt."
                f"{self._after_better_times(mean)}"
            )

    def no_step(self) -> NothingToTrainOnError:
        """The data is used up, and not one group was left to train on."""
        if self._last_reward is not None:
            why = (
                "the completions of each prompt got the same reward (the last "
                f"{self._last_reward:g}), or filters dropped them: use easier or harder prompts, "
                "or more completions per prompt"
            )
        elif self._last is not None:
            why = f"none gave a scored completion; the last: {why_fruitless(self._last)}"
        else:
            why = "there were none"
        return NothingToTrainOnError(f"no step was taken on all {self._barren} groups: {why}")

    def _after_better_times(self, mean: float | None) -> str:
        """What may be behind prompts that all give the same reward: a policy that lost what it
        knew, or nothing that is known here."""
        if mean is None or mean >= COLLAPSED * self._highest:
            return ""
        return f" The mean reward of a step was {self._highest:.3f} before: {_ADVICE['collapse']}."

    def _trouble(self, cause: Cause, fatal: bool, what: str) -> Trouble | None:
        if (cause, fatal) in self._warned:
            return None
        self._warned.add((cause, fatal))
        return Trouble(cause, fatal, f"{what}: {_ADVICE[cause]}")


def why_fruitless(group: PromptGroup) -> str:
    """Why a completion of `group` could not be had, or has no score: the first reason there is."""
    if group.failed_rows:
        return group.failed_rows[0]
    for trajectory in group.trajectories:
        if trajectory.reward is None:
            reason = trajectory.score_error or "the evaluator gave no valid score"
            return f"row {trajectory.row_id}, completion {trajectory.completion}: {reason}"
    # The default key, or what is made of a row that raised.
    row_id = group.key[1] if isinstance(group.key, tuple) else group.key
    if group.failures:
        return f"row {row_id}: {group.failures[0].kind}: {group.failures[0].message}"
    return f"row {row_id}: nothing was sampled"


def nothing_scored(rows: int, last: PromptGroup) -> NothingToTrainOnError:
    """The end of a run in which so many rows in a row, `last` the last of them, gave nothing."""
    return NothingToTrainOnError(
        f"{rows} rows in a row gave no scored completion; the last: {why_fruitless(last)}"
    )
