"""What `filter_rollouts` keeps, and by what name it counts what it drops.

Invariant: rules that contradict themselves are an error before any row is read.

The first look at a file that is to be filtered: what no part of it says alone. Pure.

Invariant: what is held is a few numbers a data row.

Which completions of a table stay, and why the others do not. Pure.

Invariant: a completion has at most one reason, the first in the order of `REASONS`. The table holds
whole data rows, so no decision depends on where the file's row groups end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from annotated_types import Ge
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.data._group_values import (
    Flags,
    Floats,
    GroupNumbers,
    group_numbers,
    group_rewards,
    token_counts,
    truncated_flags,
)
from eval_protocol_rft.training import equal

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


_BAND = Flag(metavar="LOW:HIGH", parse=parse_band)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterRules:
    """What is kept.

    Rules on data rows come first and see all scored completions of the data row, also those that a
    rule on completions drops. A completion that lacks what a rule asks for does not pass it: a
    failed one has no length and no reward.
    """

    reward: Annotated[str | None, Flag(unset="the main one")] = None
    """Name of a further reward."""
    pass_threshold: Annotated[float, Flag()] = 1.0
    """Reward from which on a completion counts as passed."""
    dedupe_prompts: Annotated[bool, Flag()] = False
    """Of equal prompts keep the first.

    Of data rows with the same prompt and tools."""
    pass_rate: Annotated[Band | None, _BAND] = None
    """Prompts of whose scored completions such a share passes, ends included.

    In [0, 1]."""
    reward_percentile: Annotated[Band | None, _BAND] = None
    """Prompts whose mean reward lies between these percentiles, ends included.

    In [0, 100], of the mean rewards of data rows: those that have one, without duplicate
    prompts. The q-th percentile of R means in order stands at place q / 100 * (R - 1), between two
    of them in proportion. Means equal to an end of the band are in it, so ties stay together and
    0:100 keeps all."""
    drop_zero_variance: Annotated[bool, Flag()] = False
    """Drop prompts whose rewards are all equal.

    Also those with a single scored completion."""
    drop_failed: Annotated[bool, Flag()] = False
    """Drop completions that could not be sampled."""
    drop_unscored: Annotated[bool, Flag()] = False
    """Drop completions without a reward.

    Failed completions have no reward either, and are counted as failed."""
    drop_truncated: Annotated[bool, Flag()] = False
    """Drop completions cut off at max_tokens."""
    min_tokens: Annotated[int | None, Ge(1), Flag()] = None
    """Fewest sampled tokens of a completion."""
    max_tokens: Annotated[int | None, Ge(1), Flag()] = None
    """Most sampled tokens of a completion."""
    reward_min: Annotated[float | None, Flag()] = None
    """Least reward of a completion."""
    reward_max: Annotated[float | None, Flag()] = None
    """Most reward of a completion."""
    dedupe_completions: Annotated[bool, Flag()] = False
    """Of a prompt's completions with equal tokens keep one.

    The first that passes all rules above."""
    min_completions: Annotated[int | None, Ge(1), Flag()] = None
    """Fewest completions of a prompt, after everything above.

    Failed ones are not counted."""

    def __post_init__(self) -> None:
        _check_band("pass_rate", self.pass_rate, 1.0)
        _check_band("reward_percentile", self.reward_percentile, 100.0)
        for low, high in (("min_tokens", "max_tokens"), ("reward_min", "reward_max")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise FilterRulesError(f"{low} {least:g} is above {high} {most:g}")
        check_options(self, FilterRulesError)

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


def _check_band(name: str, band: Band | None, most: float) -> None:
    if band is None:
        return
    for end in band:
        if not (math.isinf(end) or 0 <= end <= most):
            raise FilterRulesError(f"{name} {band}: both ends must lie between 0 and {most:g}")
    if not band.low <= band.high:
        raise FilterRulesError(f"{name} {band}: the first end is above the second")


@dataclass(frozen=True, slots=True)
class Survey:
    """What rules on data rows need to know of the whole file."""

    scored: int
    """Completions with a reward."""
    mean_band: Band | None
    """Mean rewards between the percentiles; None where no rule asks or no data row has one."""
    duplicates: frozenset[int]
    """`data_idx` of data rows whose prompt an earlier one has."""


def survey_columns(rules: FilterRules, reward: str) -> list[str]:
    """The columns that `survey` reads."""
    prompts = ["prompt", "tools"] if rules.dedupe_prompts else []
    return ["data_idx", "sample_idx", "error", reward, *prompts]


def survey(tables: Iterable[pa.Table], rules: FilterRules, reward: str) -> Survey:
    """Look at tables of whole data rows."""
    scored = 0
    seen: set[bytes] = set()
    duplicates: set[int] = set()
    means: list[Floats] = []
    for table in tables:
        numbers = group_numbers(table, reward)
        rewards = group_rewards(numbers, pass_threshold=rules.pass_threshold)
        scored += int(rewards.scored.sum())
        counts = rewards.scored > 0
        if rules.dedupe_prompts:
            again = _seen_before(table.take(numbers.starts), seen)
            duplicates.update(numbers.data_idx[again].tolist())
            counts &= ~again
        if rules.reward_percentile is not None:
            means.append(rewards.mean[counts])
    band = None
    if rules.reward_percentile is not None and means:
        band = _between_percentiles(np.sort(np.concatenate(means)), rules.reward_percentile)
    return Survey(scored, band, frozenset(duplicates))


def percentile(ordered: Floats, q: float) -> float:
    """The q-th percentile, in [0, 100], of rising numbers, at least one; between two of them in
    proportion.

    The place is computed exactly: in floating point 0.07 * 100 is more than 7, and the percentile
    would miss the number that it is.
    """
    place = Fraction(str(q)) / 100 * (len(ordered) - 1)
    first = math.floor(place)
    value, rest = float(ordered[first]), float(place - first)
    return value + (float(ordered[first + 1]) - value) * rest if rest else value


def _between_percentiles(ordered: Floats, band: Band) -> Band | None:
    if not len(ordered):
        return None
    return Band(*(end if math.isinf(end) else percentile(ordered, end) for end in band))


def _seen_before(firsts: pa.Table, seen: set[bytes]) -> Flags:
    """[P] whether prompt and tools of a row are in `seen`, to which they are added."""
    flags = np.zeros(len(firsts), np.bool_)
    pairs = zip(firsts["prompt"].to_pylist(), firsts["tools"].to_pylist(), strict=True)
    for i, prompt_and_tools in enumerate(pairs):
        digest = hashlib.sha256(msgspec.json.encode(prompt_and_tools)).digest()[:16]
        flags[i] = digest in seen
        seen.add(digest)
    return flags


Codes = NDArray[np.int8]
_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
KEPT = 0


def decide(table: pa.Table, rules: FilterRules, found: Survey, reward: str) -> Codes:
    """[N] `KEPT`, or the place of a reason in `REASONS`, counted from 1.

    Args:
        table: all columns of whole data rows.
        rules: what to keep.
        found: about the whole file.
        reward: column.
    """
    numbers = group_numbers(table, reward)
    codes = np.zeros(len(table), np.int8)

    def drop(reason: str, flags: Flags) -> None:
        codes[(codes == KEPT) & flags] = _CODES[reason]

    for reason, flags in _rows_to_drop(numbers, rules, found).items():
        drop(reason, flags[numbers.group])
    for reason, flags in _completions_to_drop(table, numbers, rules).items():
        drop(reason, flags)
    if rules.dedupe_completions:
        drop("duplicate_completion", _same_tokens(table, numbers, codes == KEPT))
    if rules.min_completions is not None:
        left = numbers.count((codes == KEPT) & ~numbers.failed)
        drop("small_group", (left < rules.min_completions)[numbers.group])
    return codes


def _rows_to_drop(numbers: GroupNumbers, rules: FilterRules, found: Survey) -> dict[str, Flags]:
    """Reason -> [P] the data rows that it applies to."""
    drop: dict[str, Flags] = {}
    if rules.dedupe_prompts:
        drop["duplicate_prompt"] = np.isin(numbers.data_idx, list(found.duplicates))
    if not rules.on_group_rewards:
        return drop
    rewards = group_rewards(numbers, pass_threshold=rules.pass_threshold)
    drop["group_unscored"] = rewards.scored == 0
    for reason, band, values in (
        ("pass_rate", rules.pass_rate, rewards.pass_rate),
        ("reward_percentile", found.mean_band, rewards.mean),
    ):
        if band is not None:
            drop[reason] = ~((values >= band.low) & (values <= band.high))
    if rules.drop_zero_variance:
        drop["zero_variance"] = equal(rewards.low, rewards.high)
    return drop


def _completions_to_drop(
    table: pa.Table, numbers: GroupNumbers, rules: FilterRules
) -> dict[str, Flags]:
    """Reason -> [N] the completions that it applies to."""
    drop: dict[str, Flags] = {}
    by_reward = rules.drop_unscored or rules.reward_min is not None or rules.reward_max is not None
    if rules.drop_failed or rules.on_lengths or by_reward:
        drop["failed"] = numbers.failed
    if by_reward:
        drop["unscored"] = np.isnan(numbers.rewards)
    if rules.drop_truncated:
        drop["truncated"] = truncated_flags(table)
    if rules.on_lengths:
        tokens = token_counts(table)
        drop["too_short"] = tokens < (rules.min_tokens or 0)
        if rules.max_tokens is not None:
            drop["too_long"] = tokens > rules.max_tokens
    outside = np.zeros(len(table), np.bool_)
    if rules.reward_min is not None:
        outside |= numbers.rewards < rules.reward_min
    if rules.reward_max is not None:
        outside |= numbers.rewards > rules.reward_max
    drop["reward"] = outside
    return drop


def _same_tokens(table: pa.Table, numbers: GroupNumbers, looked_at: Flags) -> Flags:
    """[N] whether an earlier completion of the data row has the same tokens; only among those that
    are looked at and did not fail."""
    flags = np.zeros(len(table), np.bool_)
    seen: set[tuple[int, bytes]] = set()
    column = table.column("completion_ids").combine_chunks()
    ids, offsets = column.values.to_numpy(), column.offsets.to_numpy().tolist()
    group = numbers.group.tolist()
    for row in np.flatnonzero(looked_at & ~numbers.failed).tolist():
        key = (group[row], ids[offsets[row] : offsets[row + 1]].tobytes())
        flags[row] = key in seen
        seen.add(key)
    return flags
