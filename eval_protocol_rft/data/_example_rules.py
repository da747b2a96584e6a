"""Which completions of a prompt become examples: best of n, pairs by margin, thresholds.

Invariant: what is chosen depends on the rewards, their order and the options alone. Completions
with equal rewards, up to rounding, are no pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft._statistics import equal
from eval_protocol_rft.data._files import JobError

ExampleKind = Literal["sft", "dpo", "kto", "reward"]
Rewards = NDArray[np.float64]
_PANEL = "Examples"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRules:
    """Which completions become examples for sft, dpo, kto or reward."""

    reward: Annotated[str | None, Flag(panel=_PANEL, unset="the main one")] = None
    """Name of a further reward."""
    best: Annotated[int, Ge(1), Flag(panel=_PANEL)] = 1
    """sft: so many completions of a prompt, those with the highest rewards.

    Of equal ones the first."""
    reward_min: Annotated[float | None, Flag(panel=_PANEL)] = None
    """Least reward of an example (sft), or of a chosen completion (dpo, reward)."""
    pairs: Annotated[Literal["best-worst", "all", "random"], Flag(panel=_PANEL)] = "best-worst"
    """dpo, reward: which two completions of a prompt are a pair.

    best-worst: the best with the worst, then the second best with the second worst. all: any two,
    the widest apart first. random: any two, drawn without repetition."""
    max_pairs: Annotated[int | None, Ge(1), Flag(panel=_PANEL, unset="1; of all: any number")] = (
        None
    )
    """dpo, reward: most pairs of a prompt."""
    margin: Annotated[float, Ge(0), Flag(panel=_PANEL)] = 0.0
    """dpo, reward: least difference between the rewards of a pair; equal ones never are one."""
    seed: Annotated[int, Ge(0), Flag(panel=_PANEL)] = 0
    """Of random pairs."""
    pass_threshold: Annotated[float, Flag(panel=_PANEL)] = 1.0
    """kto: reward from which on a completion is desirable."""
    fail_threshold: Annotated[
        float | None, Flag(panel=_PANEL, unset="what is not desirable is undesirable")
    ] = None
    """kto: reward up to which a completion is undesirable; what lies between is left out."""
    keep_truncated: Annotated[bool, Flag(panel=_PANEL)] = False
    """Take completions that were cut off at max_tokens too."""
    dedupe: Annotated[Literal["text", "tokens", "none"], Flag(panel=_PANEL)] = "text"
    """Of completions of a prompt that are equal in this keep the first."""

    def __post_init__(self) -> None:
        check_options(self, JobError)
        if self.fail_threshold is not None and self.fail_threshold >= self.pass_threshold:
            raise JobError(
                f"fail_threshold {self.fail_threshold:g} is not below pass_threshold "
                f"{self.pass_threshold:g}"
            )

    def check_for(self, kind: str) -> None:
        """See that no option is set that `kind` does not have.

        Raises:
            JobError: one is.
        """
        for field in fields(self):
            kinds = _ONLY_FOR.get(field.name, ("sft", "dpo", "kto", "reward"))
            if getattr(self, field.name) != field.default and kind not in kinds:
                raise JobError(
                    f"{field.name} is for {' and '.join(kinds)}: leave it out, or convert to that"
                )


_PAIRED = ("dpo", "reward")
_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "best": ("sft",),
    "reward_min": ("sft", *_PAIRED),
    **dict.fromkeys(("pairs", "max_pairs", "margin", "seed"), _PAIRED),
    **dict.fromkeys(("pass_threshold", "fail_threshold"), ("kto",)),
}


def best_of(rewards: Rewards, rules: ExampleRules) -> list[int]:
    """Which of [C] completions are examples, the best first."""
    order = np.argsort(-rewards, kind="stable")[: rules.best].tolist()
    least = -math.inf if rules.reward_min is None else rules.reward_min
    return [i for i in order if rewards[i] >= least]


def pairs_of(rewards: Rewards, rules: ExampleRules, data_idx: int) -> list[tuple[int, int]]:
    """(chosen, rejected) among [C] completions; random ones depend on the seed and the data row."""
    order = np.argsort(-rewards, kind="stable")
    least = -math.inf if rules.reward_min is None else rules.reward_min
    most = rules.max_pairs
    if rules.pairs == "best-worst":
        half = len(order) // 2
        better, worse = order[:half], order[::-1][:half]
        most = most or 1
    else:
        better, worse = (order[side] for side in np.triu_indices(len(order), 1))
    high, low = rewards[better], rewards[worse]
    good = ~equal(low, high) & (high >= least)
    good &= (high - low >= rules.margin) | equal(high - low, np.full(len(high), rules.margin))
    better, worse, gap = better[good], worse[good], (high - low)[good]
    if rules.pairs == "all":
        widest = np.argsort(-gap, kind="stable")
        better, worse = better[widest], worse[widest]
    elif rules.pairs == "random":
        drawn = np.random.default_rng([rules.seed, data_idx]).permutation(len(better))[: most or 1]
        better, worse = better[drawn], worse[drawn]
    return list(zip(better[:most].tolist(), worse[:most].tolist(), strict=True))


def labels_of(rewards: Rewards, rules: ExampleRules) -> list[tuple[int, bool]]:
    """Which of [C] completions are examples, and whether they are desirable."""
    good = rewards >= rules.pass_threshold
    bad = ~good if rules.fail_threshold is None else rewards <= rules.fail_threshold
    return [(i, bool(good[i])) for i in np.flatnonzero(good | bad).tolist()]
