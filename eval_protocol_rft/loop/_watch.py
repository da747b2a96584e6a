"""Is this run still learning what it should? Says what is wrong, and why. Pure.

Invariant: a warning names its cause and what to do about it, and comes once per cause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval_protocol_rft.loop._weights import named_version
from eval_protocol_rft.training import FAIL_K3, WARN_K3, Mismatch, Trajectory

WINDOW = 5
"""Steps over which rewards are averaged."""
COLLAPSED = 0.5
"""A mean reward below this share of the best one is a collapse."""

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


class Watch:
    """Told of every step, in order."""

    def __init__(self) -> None:
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
        if difference.verdict == "pass":
            self._agreed = True
            return None
        fatal = difference.verdict == "fail"
        cause: Cause = "mismatch"
        if shifted:
            cause = "shifted_logprobs"
        elif raw is not None and raw.k3 < min(difference.k3 / 10, WARN_K3):
            cause = "raw_logprobs"
        elif self._agreed:
            cause = "stale_weights"
        # Those two are faults whatever their size, and so is all that would be learnt from them.
        fatal = fatal or cause in ("shifted_logprobs", "raw_logprobs")
        bar = f"fail above {FAIL_K3:g}" if fatal else f"warn above {WARN_K3:g}"
        return self._trouble(
            cause,
            fatal,
            f"step {step}: sampler and trainer disagree, mean k3 {difference.k3:.2g} over "
            f"{difference.tokens} tokens ({bar})",
        )

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

    def stuck(self, mean: float | None) -> str:
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
