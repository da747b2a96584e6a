"""Which completions of a table stay, and why the others do not. Pure.

Invariant: a completion has at most one reason, the first in the order of `REASONS`. The table holds
whole data rows, so no decision depends on where the file's row groups end.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.batch.filtering.rules import REASONS, FilterRules
from eval_protocol_rft.batch.filtering.survey import Survey
from eval_protocol_rft.batch.numbers import (
    Flags,
    GroupNumbers,
    group_numbers,
    group_rewards,
    token_counts,
    truncated_flags,
)
from eval_protocol_rft.training.reward_stats import equal

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
