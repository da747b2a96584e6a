"""Numbers of completions, data row by data row, without their tokens. Pure.

Invariant: the completions of a data row are looked at together, wherever a table of the file ends.
A completion without a score has the reward NaN, never 0; a failed one has no reward at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data.rollouts._format import REWARD_PREFIX, FormatError, reward_column
from eval_protocol_rft.training import LARGEST

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class GroupNumbers:
    """N completions of P whole data rows."""

    starts: Ints
    """[P] where each data row begins among the completions."""
    data_idx: Ints
    """[P]"""
    failed: Flags
    """[N]"""
    rewards: Floats
    """[N] finite, NaN where there is none."""

    @property
    def group(self) -> Ints:
        """[N] which of the P data rows a completion belongs to."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)

    @property
    def sizes(self) -> Ints:
        """[P] completions asked for."""
        return np.diff(self.starts, append=len(self.failed))

    def count(self, flags: Flags) -> Ints:
        """[P] how many of [N] flags are set."""
        return np.add.reduceat(flags, self.starts, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class GroupRewards:
    """What the rewards of P data rows come to; NaN where none of its completions has one."""

    scored: Ints
    """[P]"""
    passed: Ints
    """[P]"""
    mean: Floats
    """[P]"""
    low: Floats
    """[P]"""
    high: Floats
    """[P]"""

    @property
    def pass_rate(self) -> Floats:
        """[P] passed of scored."""
        return _divide(self.passed, self.scored)


def chosen_reward(dataset: RolloutDataset, name: str | None) -> str:
    """The column of the reward called `name`; None is the main one.

    Raises:
        FormatError: the file has no such column.
    """
    column = reward_column(name)
    if column not in dataset.schema.names:
        others = [key.removeprefix(REWARD_PREFIX) for key in dataset.metadata.rewards]
        known = ", ".join(repr(key) for key in others if key != "reward")
        raise FormatError(
            f"{dataset.path}: no reward {name!r}; there are the main one, which needs no name"
            + (f", and {known}" if known else "")
        )
    return column


def whole_groups(tables: Iterable[pa.Table], *, where: str) -> Iterator[pa.Table]:
    """The same rows in tables that hold whole data rows.

    Raises:
        FormatError: after the last table, if completions of a data row did not stand together.
    """
    held: list[pa.Table] = []
    last = None
    seen: list[Ints] = []
    for table in tables:
        data_idx = np.asarray(table.column("data_idx"), np.int64)
        starts = _starts(data_idx)
        if held and data_idx[0] != last:
            yield pa.concat_tables(held)
            held = []
        seen.append(data_idx[starts] if data_idx[0] != last else data_idx[starts[1:]])
        tail, last = int(starts[-1]), data_idx[-1]
        if tail:
            yield pa.concat_tables([*held, table.slice(0, tail)])
            held = []
        held.append(table.slice(tail))
    if held:
        yield pa.concat_tables(held)
        _refuse_scattered(np.concatenate(seen), where)


def group_numbers(table: pa.Table, reward: str) -> GroupNumbers:
    """The numbers of a table of whole data rows.

    Args:
        table: with `data_idx`, `sample_idx`, `error` and `reward`, not empty.
        reward: column.

    Raises:
        FormatError: a reward is not finite, too large, or that of a failed completion.
    """
    data_idx = np.asarray(table.column("data_idx"), np.int64)
    starts = _starts(data_idx)
    failed, rewards = _rewards(table, reward, "")
    return GroupNumbers(starts=starts, data_idx=data_idx[starts], failed=failed, rewards=rewards)


def with_rewards(tables: Iterable[pa.Table], reward: str, *, where: str) -> Iterator[pa.Table]:
    """The same tables.

    Raises:
        FormatError: as from `group_numbers`, but with the name of the file, `where`.
    """
    for table in tables:
        _rewards(table, reward, f"{where}: ")
        yield table


def _rewards(table: pa.Table, reward: str, where: str) -> tuple[Flags, Floats]:
    """[N] which completions failed, and the rewards."""
    failed = _flags(table.column("error").is_valid())
    column = table.column(reward)
    there = _flags(column.is_valid())
    rewards = np.array(column.to_numpy(), np.float64)
    for wrong, problem in (
        (there & ~np.isfinite(rewards), "is no finite number"),
        (there & (np.abs(rewards) > LARGEST), f"is beyond {LARGEST:g}, too large to be summed up"),
        (there & failed, "is that of a completion which failed"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            place, sample = (table.column(n)[row].as_py() for n in ("data_idx", "sample_idx"))
            raise FormatError(
                f"{where}data row {place}, completion {sample}: {reward} {rewards[row]} {problem}"
                ". Score the file again with `ep-rft score`"
            )
    return failed, rewards


def group_rewards(numbers: GroupNumbers, *, pass_threshold: float) -> GroupRewards:
    """Sum up rewards; a completion passes where its reward is at least `pass_threshold`."""
    # Sorted within each data row, so that equal rewards sum up alike in whatever order they came;
    # NaN goes last.
    rewards = numbers.rewards[np.lexsort((numbers.rewards, numbers.group))]
    scored = numbers.count(~np.isnan(rewards))
    low = rewards[numbers.starts]
    high = rewards[numbers.starts + np.maximum(scored, 1) - 1]
    total = np.add.reduceat(np.where(np.isnan(rewards), 0.0, rewards), numbers.starts)
    return GroupRewards(
        scored=scored,
        passed=numbers.count(rewards >= pass_threshold),
        # The mean of equal floats can miss them by the last digit, and would break a tie.
        mean=np.clip(_divide(total, scored), low, high),
        low=low,
        high=high,
    )


def token_counts(table: pa.Table) -> Ints:
    """[N] sampled tokens, 0 where a completion failed."""
    lengths = pc.list_value_length(table.column("completion_ids"))
    return np.asarray(lengths.fill_null(0), np.int64)


def truncated_flags(table: pa.Table) -> Flags:
    """[N] whether completions were cut off at max_tokens; a failed one was not."""
    return _flags(table.column("truncated").fill_null(False))


def _starts(data_idx: Ints) -> Ints:
    return np.flatnonzero(np.append(True, data_idx[1:] != data_idx[:-1]))


def _flags(column: pa.ChunkedArray) -> Flags:
    return np.asarray(column.to_numpy(), np.bool_)


def _divide(values: NDArray[np.float64] | Ints, by: Ints) -> Floats:
    return np.where(by > 0, values / np.maximum(by, 1), np.nan)


def _refuse_scattered(data_idx: Ints, where: str) -> None:
    """Refuse data rows that came twice."""
    ids, counts = np.unique(data_idx, return_counts=True)
    if (counts > 1).any():
        raise FormatError(
            f"{where}: the completions of data row {ids[counts > 1][0]} do not stand together. "
            "Sort the file by data_idx and sample_idx"
        )
