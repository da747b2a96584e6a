"""Tables of a rollout file go in one by one; their numbers stay.

Invariant: what is held is 8 bytes a scored completion, one line a data row, and a bounded number
of reasons, whatever the file's size in tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft.batch.numbers import (
    Floats,
    Ints,
    group_numbers,
    group_rewards,
    token_counts,
    truncated_flags,
)
from eval_protocol_rft.batch.rollouts.format import reward_columns
from eval_protocol_rft.batch.stats.metrics import MetricMeans
from eval_protocol_rft.batch.stats.types import (
    PROMPT_CHARACTERS,
    REASON_CHARACTERS,
    TOP_REASONS,
    PromptStats,
    Reason,
)

MOST_REASONS = 1000
"""Different reasons that are counted one by one. Evaluators may put a number or an address into
each, and then there are as many as completions."""
OTHER_REASONS = f"(reasons beyond the first {MOST_REASONS} different ones)"


class GroupColumns(NamedTuple):
    """Numbers of P data rows, [P] each."""

    data_idx: Ints
    row_id: NDArray[Any]
    prompt_start: NDArray[Any]
    completions: Ints
    failed: Ints
    scored: Ints
    passed: Ints
    mean_reward: Floats
    """NaN where nothing is scored."""
    truncated: Ints
    tokens: Ints

    def hardest_first(self) -> list[PromptStats]:
        """The data rows by pass rate, mean reward and place in the file."""
        rate = np.where(self.scored > 0, self.passed / np.maximum(self.scored, 1), np.nan)
        order = np.lexsort((self.mean_reward, rate))  # stable, and NaN goes last
        lines = zip(*(column[order].tolist() for column in (*self, rate)), strict=True)
        names = (*self._fields, "pass_rate")
        return [_prompt_stats(**dict(zip(names, line, strict=True))) for line in lines]


class StatsCollector:
    """The numbers of a file in the making."""

    def __init__(self, reward: str, pass_threshold: float) -> None:
        self._reward = reward
        self._pass_threshold = pass_threshold
        self._groups: list[GroupColumns] = []
        self._rewards: list[Floats] = []
        self._failures: Counter[str] = Counter()
        self._reasons: Counter[str | None] = Counter()
        self._metrics = MetricMeans()
        self.lengths: Ints = np.zeros(0, np.int64)
        """[longest + 1] completions with that many sampled tokens; failed ones are left out."""

    def add(self, table: pa.Table) -> None:
        """Count a table of whole data rows."""
        numbers = group_numbers(table, self._reward)
        rewards = group_rewards(numbers, pass_threshold=self._pass_threshold)
        tokens = token_counts(table)
        self._groups.append(
            GroupColumns(
                data_idx=numbers.data_idx,
                row_id=_objects(table.column("row_id").take(numbers.starts).to_pylist()),
                prompt_start=_objects(_prompt_starts(table.column("prompt").take(numbers.starts))),
                completions=numbers.sizes,
                failed=numbers.count(numbers.failed),
                scored=rewards.scored,
                passed=rewards.passed,
                mean_reward=rewards.mean,
                truncated=numbers.count(truncated_flags(table)),
                tokens=np.add.reduceat(tokens, numbers.starts),
            )
        )
        self._rewards.append(numbers.rewards[~np.isnan(numbers.rewards)])
        lengths = np.bincount(tokens[~numbers.failed], minlength=len(self.lengths))
        lengths[: len(self.lengths)] += self.lengths
        self.lengths = lengths
        self._count_reasons(table)
        metrics = reward_columns(self._reward)[2]
        if metrics in table.schema.names:
            self._metrics.add_json(table.column(metrics).drop_null().to_pylist())

    @property
    def groups(self) -> GroupColumns | None:
        """All data rows; None where there were no tables."""
        if not self._groups:
            return None
        return GroupColumns(*(np.concatenate(parts) for parts in zip(*self._groups, strict=True)))

    @property
    def rewards(self) -> Floats:
        """Of all scored completions."""
        return np.concatenate(self._rewards)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric beside the reward."""
        return self._metrics.means

    @property
    def failures(self) -> dict[str, int]:
        return dict(self._failures.most_common())

    @property
    def unscored_reasons(self) -> list[Reason]:
        return [Reason(text, count) for text, count in self._reasons.most_common(TOP_REASONS)]

    def _count_reasons(self, table: pa.Table) -> None:
        failed = table.column("error").is_valid()
        for kind, count in _value_counts(table.column("error_kind").filter(failed)):
            self._failures["unknown" if kind is None else kind] += count
        unscored = pc.and_(pc.invert(failed), table.column(self._reward).is_null())
        why = table.column(reward_columns(self._reward)[3]).filter(unscored)
        for text, count in _value_counts(why):
            reason = None if text is None else text.strip().partition("\n")[0][:REASON_CHARACTERS]
            if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
                reason = OTHER_REASONS
            self._reasons[reason] += count


def _value_counts(column: pa.ChunkedArray) -> list[tuple[str | None, int]]:
    return [(pair["values"], pair["counts"]) for pair in column.value_counts().to_pylist()]


def _prompt_starts(column: pa.ChunkedArray) -> list[str]:
    """How prompts begin; of messages, the last one with text."""
    starts: list[str] = []
    for prompt in column.to_pylist():
        texts = [prompt] if not isinstance(prompt, list) else [m["content"] for m in prompt]
        starts.append(next((text for text in reversed(texts) if text), "")[:PROMPT_CHARACTERS])
    return starts


def _objects(values: list[str]) -> NDArray[Any]:
    """[N] Python strings as they are: numpy's own would all take the room of the longest."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _prompt_stats(*, tokens: int, pass_rate: float, mean_reward: float, **line: Any) -> PromptStats:
    sampled = line["completions"] - line["failed"]
    return PromptStats(
        **line,
        pass_rate=pass_rate if line["scored"] else None,
        mean_reward=mean_reward if line["scored"] else None,
        mean_tokens=tokens / sampled if sampled else None,
    )
