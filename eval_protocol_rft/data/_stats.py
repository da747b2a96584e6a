"""What a rollout file holds, in numbers: rewards, pass@k, lengths, failures, data rows.

Invariant: every completion asked for is counted once, as failed, scored or unscored. Of token data
only its length is read.

Tables of a rollout file go in one by one; their numbers stay.

Invariant: what is held is 8 bytes a scored completion, one line a data row, and a bounded number
of reasons, whatever the file's size in tokens.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._group_values import (
    Floats,
    Ints,
    chosen_reward,
    group_numbers,
    group_rewards,
    token_counts,
    truncated_flags,
    whole_groups,
    with_rewards,
)
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._stats_types import (
    PROMPT_CHARACTERS,
    REASON_CHARACTERS,
    TOP_REASONS,
    MetricMeans,
    PassAtK,
    PromptStats,
    Reason,
    RolloutStats,
    distribution,
)
from eval_protocol_rft.data.rollouts._format import FormatError, reward_columns
from eval_protocol_rft.scoring import pass_at_k

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


_COLUMNS = (
    "row_id", "data_idx", "sample_idx", "prompt", "completion_ids", "truncated", "error",
    "error_kind",
)  # fmt: skip
_REWARD_PERCENTS = (5, 25, 50, 75, 95)
_LENGTH_PERCENTS = (50, 90, 99)


def rollout_stats(
    path: str | os.PathLike[str],
    *,
    reward: Annotated[str | None, Flag(unset="the main one")] = None,
    pass_threshold: Annotated[float, Flag()] = 1.0,
    progress: bool | None = None,
) -> RolloutStats:
    """Sum up a rollout file, scored or not, or what an unfinished job has put aside.

    Args:
        path: the file.
        reward: name of a further reward.
        pass_threshold: reward from which on a completion counts as passed.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, an empty or a broken one; no such reward.
        ValueError: the threshold is not finite.
    """
    if not math.isfinite(pass_threshold):
        raise ValueError(f"pass_threshold must be finite, got {pass_threshold}")
    dataset = RolloutDataset(path)
    column = chosen_reward(dataset, reward)
    further = [name for name in reward_columns(column)[2:] if name in dataset.schema.names]
    tables = dataset.tables([*_COLUMNS, column, *further])
    sampling = dataset.metadata.sampling
    with Reading("stats", dataset.rows_about, show=progress) as reading:
        return summarize_tables(
            reading(tables),
            path=str(path),
            finished=dataset.finished,
            model=None if sampling is None else sampling.model,
            reward=column,
            pass_threshold=pass_threshold,
        )


def summarize_tables(
    tables: Iterable[pa.Table],
    *,
    path: str,
    finished: bool,
    model: str | None,
    reward: str,
    pass_threshold: float,
) -> RolloutStats:
    """`rollout_stats` of tables in file order, none of them empty; `reward` is a column here."""
    seen = StatsCollector(reward, pass_threshold)
    for table in whole_groups(with_rewards(tables, reward, where=path), where=path):
        seen.add(table)
    groups = seen.groups
    if groups is None:
        nothing = "it holds no completions" if finished else "no completion is stored yet"
        raise FormatError(f"{path}: {nothing}")
    failed, scored = int(groups.failed.sum()), int(groups.scored.sum())
    completions, truncated = int(groups.completions.sum()), int(groups.truncated.sum())
    sampled = completions - failed
    rewards, times = np.unique(seen.rewards, return_counts=True)
    lengths = np.flatnonzero(seen.lengths)
    return RolloutStats(
        path=path,
        finished=finished,
        model=model,
        reward=reward,
        pass_threshold=pass_threshold,
        completions=completions,
        failed=failed,
        scored=scored,
        unscored=sampled - scored,
        truncated=truncated,
        truncation_rate=truncated / sampled if sampled else None,
        tokens=int(groups.tokens.sum()),
        rewards=distribution(rewards, times, percents=_REWARD_PERCENTS),
        lengths=distribution(lengths, seen.lengths[lengths], percents=_LENGTH_PERCENTS),
        metrics=seen.metrics,
        pass_at_k=pass_at_every_k(groups.scored, groups.passed),
        failures=seen.failures,
        unscored_reasons=seen.unscored_reasons,
        groups=len(groups.scored),
        groups_all_passed=int(np.sum((groups.passed == groups.scored) & (groups.scored > 0))),
        groups_none_passed=int(np.sum((groups.passed == 0) & (groups.scored > 0))),
        groups_mixed=int(np.sum((groups.passed > 0) & (groups.passed < groups.scored))),
        groups_unscored=int(np.sum(groups.scored == 0)),
        per_group=groups.hardest_first(),
    )


def pass_at_every_k(scored: Ints, passed: Ints) -> list[PassAtK]:
    """pass@k for k = 1, 2, ... up to the most scored completions of a data row.

    Args:
        scored: [P] scored completions.
        passed: [P] those that passed.
    """
    pairs, times = np.unique(np.stack([scored, passed], axis=1), axis=0, return_counts=True)
    most = int(scored.max(initial=0))
    total, groups = np.zeros(most), np.zeros(most, np.int64)
    for (n, c), count in zip(pairs.tolist(), times.tolist(), strict=True):
        total[:n] += count * pass_at_k(n, c, np.arange(1, n + 1))
        groups[:n] += count
    return [
        PassAtK(k, value, size)
        for k, (value, size) in enumerate(
            zip((total / groups).tolist(), groups.tolist(), strict=True), start=1
        )
    ]
