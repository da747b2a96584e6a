"""What `filter_rollouts` keeps, and by what name it counts what it drops.

Invariant: rules that contradict themselves are an error before any row is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

REASONS = {
    "duplicate_prompt": "an earlier data row has the same prompt and tools",
    "group_unscored": "a rule on rewards, and no completion of the data row has one",
    "pass_rate": "the data row's pass rate is outside the band",
    "reward_percentile": "the data row's mean reward is outside the band of percentiles",
    "zero_variance": "all rewards of the data row are equal",
    "failed": "the sampler got no completion",
    "unscored": "no reward",
    "truncated": "cut off at max_tokens",
    "too_short": "fewer sampled tokens than min_tokens",
    "too_long": "more sampled tokens than max_tokens",
    "reward": "reward below reward_min or above reward_max",
    "duplicate_completion": "an earlier completion of the data row has the same tokens",
    "small_group": "fewer than min_completions are left of the data row",
}
"""In the order in which they are looked at: what is dropped counts under the first that applies."""


class FilterRulesError(ValueError):
    """Rules that contradict themselves, or that cannot be asked of this file."""


class Band(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        ends = ("" if math.isinf(end) else format(end, "g") for end in self)
        return ":".join(ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterRules:
    """What is kept.

    Rules on data rows come first and see all scored completions of the data row, also those that a
    rule on completions drops. A completion that lacks what a rule asks for does not pass it: a
    failed one has no length and no reward.
    """

    reward: str | None = None
    """Name of a further reward; None is the main one."""
    pass_threshold: float = 1.0
    """A completion passes where its reward is at least this."""
    dedupe_prompts: bool = False
    """Of data rows with the same prompt and tools, the first in the file stays."""
    pass_rate: Band | None = None
    """Share of a data row's scored completions that pass, in [0, 1]."""
    reward_percentile: Band | None = None
    """In [0, 100], of the mean rewards of data rows: those that have one, without duplicate
    prompts. The q-th percentile of R means in order stands at place q / 100 * (R - 1), between two
    of them in proportion. Means equal to an end of the band are in it, so ties stay together and
    0:100 keeps all."""
    drop_zero_variance: bool = False
    """Data rows whose scored completions have one and the same reward: also those with a single
    one."""
    drop_failed: bool = False
    drop_unscored: bool = False
    """Failed completions have no reward either, and are counted as failed."""
    drop_truncated: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    dedupe_completions: bool = False
    """Of completions of a data row with the same tokens, the first that passes all rules above
    stays."""
    min_completions: int | None = None
    """Fewest completions of a data row that are left, failed ones not counted."""

    def __post_init__(self) -> None:
        _check_band("pass_rate", self.pass_rate, 1.0)
        _check_band("reward_percentile", self.reward_percentile, 100.0)
        for low, high in (("min_tokens", "max_tokens"), ("reward_min", "reward_max")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise FilterRulesError(f"{low} {least:g} is above {high} {most:g}")
        for name in ("pass_threshold", "reward_min", "reward_max"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise FilterRulesError(f"{name} must be finite, got {value}")
        for name in ("min_tokens", "max_tokens", "min_completions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FilterRulesError(f"{name} must be at least 1, got {value}")

    @property
    def on_group_rewards(self) -> bool:
        """Whether a rule asks for the rewards of data rows."""
        bands = (self.pass_rate, self.reward_percentile)
        return self.drop_zero_variance or any(band is not None for band in bands)

    @property
    def on_rewards(self) -> bool:
        """Whether a rule drops what has no reward."""
        ends = (self.reward_min, self.reward_max)
        some = any(end is not None for end in ends)
        return self.on_group_rewards or some or self.drop_unscored

    @property
    def on_lengths(self) -> bool:
        """Whether a rule asks for the number of tokens."""
        return self.min_tokens is not None or self.max_tokens is not None


def parse_band(text: str) -> Band:
    """`low:high`, one of which may be left out: `0.1:0.9`, `:0.5`, `25:`.

    Raises:
        FilterRulesError: it is not that.
    """
    low, colon, high = text.partition(":")
    try:
        band = Band(float(low or "-inf"), float(high or "inf"))
    except ValueError:
        band = None
    if band is None or not colon or not (low or high) or any(map(math.isnan, band)):
        raise FilterRulesError(
            f"{text!r} is no band: write low:high, and leave one of them out where it is open"
        )
    return band


def _check_band(name: str, band: Band | None, most: float) -> None:
    if band is None:
        return
    for end in band:
        if not (math.isinf(end) or 0 <= end <= most):
            raise FilterRulesError(f"{name} {band}: both ends must lie between 0 and {most:g}")
    if not band.low <= band.high:
        raise FilterRulesError(f"{name} {band}: the first end is above the second")
