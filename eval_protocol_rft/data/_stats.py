"""What a rollout file holds, in numbers: rewards, pass@k, lengths, failures, data rows.

Invariant: every completion asked for is counted once, as failed, scored or unscored. None stands
where there is nothing to compute a number from, never 0. What is held is a few numbers a completion
and a bounded number of reasons, whatever the file's size in tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eval_protocol_rft import _statistics as statistics
from eval_protocol_rft._options import Flag, check_arguments
from eval_protocol_rft._statistics import Distribution, PassAtK
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._episodes import sampled_in_all_turns
from eval_protocol_rft.data._format import TOKEN_COLUMNS, FormatError, reward_columns
from eval_protocol_rft.data._job_store import KEY_COLUMNS
from eval_protocol_rft.data._progress import Reading

MOST_REASONS = 1000
"""Different reasons that are counted one by one. Evaluators may put a number or an address into
each, and then there are as many as completions."""
OTHER_REASONS = f"(reasons beyond the first {MOST_REASONS} different ones)"
REASON_CHARACTERS = 200
PROMPT_CHARACTERS = 80
TOP_REASONS = 10


@dataclass(frozen=True, slots=True)
class Reason:
    """Why completions have no reward."""

    text: str | None
    """The first line of what the evaluator left, at most `REASON_CHARACTERS` of it. None: no word
    of it, as before scoring."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStats:
    """The completions of one data row."""

    data_idx: int
    row_id: str
    prompt_start: str
    """The first `PROMPT_CHARACTERS` of the prompt, or of its last message."""
    completions: int
    """Asked for."""
    failed: int
    scored: int
    passed: int
    pass_rate: float | None
    """Of the scored ones."""
    mean_reward: float | None
    truncated: int
    mean_tokens: float | None
    """Sampled tokens of a completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """A rollout file in numbers."""

    path: str
    finished: bool
    """False where these are the parts of a job that is not done."""
    model: str | None
    reward: str
    """Column of the rewards."""
    pass_threshold: float
    """A completion passes where its reward is at least this."""
    completions: int
    """Asked for: failed + scored + unscored."""
    failed: int
    scored: int
    unscored: int
    """Sampled, without a reward."""
    truncated: int
    truncation_rate: float | None
    """Of the completions that were sampled."""
    tokens: int
    """Sampled tokens."""
    rewards: Distribution | None
    """Over scored completions."""
    lengths: Distribution | None
    """Sampled tokens, over completions that were sampled."""
    metrics: dict[str, float]
    """Mean of each of the evaluator's own metrics, over the completions for which it is valid."""
    pass_at_k: list[PassAtK]
    """For every k up to the most scored completions of a data row."""
    failures: dict[str, int]
    """Kind -> failed completions, the most frequent first."""
    unscored_reasons: list[Reason]
    """The most frequent first, at most `TOP_REASONS`."""
    groups: int
    """Data rows."""
    groups_all_passed: int
    """All scored completions passed, and there are some."""
    groups_none_passed: int
    groups_mixed: int
    groups_unscored: int
    """No completion has a reward."""
    per_group: list[PromptStats]
    """Hardest first: by pass rate, then mean reward, then place in the file. Data rows without a
    reward come last."""


_COLUMNS = (
    "row_id", "data_idx", "sample_idx", "prompt", "truncated", "error", "error_kind",
)  # fmt: skip
SAMPLED_COLUMNS = ("completion_ids", "segment_loss_mask")
"""Columns that say how many tokens were sampled; the second only in files with episodes."""
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
    check_arguments(rollout_stats, locals())
    dataset = RolloutDataset(path)
    column = dataset.reward_column(reward)
    may_be = (*reward_columns(column)[2:], *SAMPLED_COLUMNS)
    further = [name for name in may_be if name in dataset.schema.names]
    tables = dataset.tables([*_COLUMNS, column, *further])
    sampling = dataset.metadata.sampling
    with Reading("stats", dataset.rows_about, show=progress) as reading:
        return summarize_tables(
            reading(tables),
            path=dataset.where,
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
    texts = _Texts(reward)
    rows, heads = read_numbers(
        texts.counted(tables),
        reward,
        where=path,
        of_heads={"row_id": lambda table: table["row_id"].to_pylist(), "start": _prompt_starts},
    )
    groups = numbers_of_groups(rows, pass_threshold)
    rewards, failed = rows["reward"], rows["failed"]
    completions = len(failed)
    if not completions:
        nothing = "it holds no completions" if finished else "no completion is stored yet"
        raise FormatError(f"{path}: {nothing}")
    sampled, truncated = completions - int(failed.sum()), int(rows["truncated"].sum())
    scored, passed = groups["num_scored"], groups["num_passed"]
    outcomes = statistics.count_outcomes(scored, passed)
    return RolloutStats(
        path=path,
        finished=finished,
        model=model,
        reward=reward,
        pass_threshold=pass_threshold,
        completions=completions,
        failed=completions - sampled,
        scored=int(scored.sum()),
        unscored=sampled - int(scored.sum()),
        truncated=truncated,
        truncation_rate=truncated / sampled if sampled else None,
        tokens=int(groups["num_tokens"].sum()),
        rewards=_spread(rewards[~np.isnan(rewards)], _REWARD_PERCENTS),
        lengths=_spread(rows["tokens"][~failed], _LENGTH_PERCENTS),
        metrics=texts.metrics.means,
        pass_at_k=statistics.mean_pass_at_k(scored, passed),
        failures=dict(texts.failures.most_common()),
        unscored_reasons=[Reason(*pair) for pair in texts.reasons.most_common(TOP_REASONS)],
        groups=len(scored),
        groups_all_passed=outcomes["all"],
        groups_none_passed=outcomes["none"],
        groups_mixed=outcomes["mixed"],
        groups_unscored=outcomes["unscored"],
        per_group=_hardest_first(groups, heads),
    )


def _spread(values: NDArray[Any], percents: Sequence[int]) -> Distribution | None:
    return statistics.distribution(*np.unique(values, return_counts=True), percents=percents)


def _hardest_first(
    groups: Mapping[str, NDArray[Any]], heads: Mapping[str, list[Any]]
) -> list[PromptStats]:
    """The data rows by pass rate, mean reward and place in the file."""
    order = np.lexsort((groups["mean_reward"], groups["pass_rate"]))  # stable, and NaN goes last
    columns = [groups[name][order].tolist() for name in statistics.GROUP_NUMBERS[:8]]
    return [
        PromptStats(
            data_idx=heads["data_idx"][place],
            row_id=heads["row_id"][place],
            prompt_start=heads["start"][place],
            completions=size,
            failed=failed,
            scored=scored,
            passed=passed,
            pass_rate=rate if scored else None,
            mean_reward=mean if scored else None,
            truncated=truncated,
            mean_tokens=tokens / (size - failed) if size > failed else None,
        )
        for place, size, failed, scored, passed, truncated, tokens, rate, mean in zip(
            order.tolist(), *columns, strict=True
        )
    ]


def read_numbers(
    tables: Iterable[pa.Table],
    reward: str,
    *,
    where: str,
    of_rows: Mapping[str, Callable[[pa.Table], NDArray[Any]]] | None = None,
    of_heads: Mapping[str, Callable[[pa.Table], list[Any]]] | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
    """The numbers of all completions, and what the first one of each data row says.

    Args:
        tables: of a rollout file in its order; with `data_idx`, `sample_idx`, `error` and the
            reward, and with `SAMPLED_COLUMNS` and `truncated` where numbers of them are asked for.
        reward: column.
        where: how messages call the file.
        of_rows: further values: name -> what a table of N rows has [N] of.
        of_heads: name -> what a table of the first rows of P data rows has [P] of.

    Returns:
        Name -> [N]: `data_idx`, `failed`, `reward` (NaN where there is none), `tokens` (sampled
        ones, 0 where a completion failed) and `truncated`, some 30 bytes a completion; and name ->
        [P], `data_idx` among them.

    Raises:
        FormatError: a reward is not finite, too large, or that of a failed completion.
    """
    parts: list[dict[str, NDArray[Any]]] = []
    heads: dict[str, list[Any]] = {name: [] for name in ("data_idx", *(of_heads or {}))}
    last = -1
    for table in tables:
        numbers = _numbers(table, reward, where)
        for name, read in (of_rows or {}).items():
            numbers[name] = read(table)
        parts.append(numbers)
        data_idx = numbers["data_idx"]
        first = np.flatnonzero(np.diff(data_idx, prepend=last))
        last = data_idx[-1]
        heads["data_idx"] += data_idx[first].tolist()
        if of_heads and len(first):
            without_tokens = [n for n in table.schema.names if n not in TOKEN_COLUMNS]
            head = table.select(without_tokens).take(first)
            for name, read_head in of_heads.items():
                heads[name] += read_head(head)
    if not parts:
        return _NONE, heads
    rows = {name: np.concatenate([part.pop(name) for part in parts]) for name in [*parts[0]]}
    return rows, heads


def numbers_of_groups(
    rows: Mapping[str, NDArray[Any]], pass_threshold: float
) -> dict[str, NDArray[Any]]:
    """`group_numbers` of the data rows of `read_numbers`."""
    return statistics.group_numbers(
        rows["data_idx"],
        rewards=rows["reward"],
        tokens=rows["tokens"],
        failed=rows["failed"],
        truncated=rows["truncated"],
        pass_threshold=pass_threshold,
    )


_NONE: dict[str, NDArray[Any]] = {
    "data_idx": np.zeros(0, np.int64),
    "failed": np.zeros(0, np.bool_),
    "reward": np.zeros(0, np.float64),
    "tokens": np.zeros(0, np.int64),
    "truncated": np.zeros(0, np.bool_),
}


def _numbers(table: pa.Table, reward: str, where: str) -> dict[str, NDArray[Any]]:
    names = table.schema.names
    failed = table["error"].is_valid()
    _check_rewards(table, reward, failed, where)
    nothing = np.zeros(len(table), np.int32)
    tokens, truncated = nothing, nothing.astype(bool)
    if "completion_ids" in names:
        tokens = pc.list_value_length(table["completion_ids"]).fill_null(0).to_numpy()
    if "segment_loss_mask" in names:
        sampled, is_episode = sampled_in_all_turns(table["segment_loss_mask"])
        tokens = np.where(is_episode, sampled, tokens)
    if "truncated" in names:
        truncated = table["truncated"].fill_null(False).to_numpy().astype(bool)
    return {
        "data_idx": table["data_idx"].to_numpy(),
        "failed": failed.to_numpy().astype(bool),
        "reward": table[reward].to_numpy(),
        "tokens": tokens,
        "truncated": truncated,
    }


def _check_rewards(table: pa.Table, reward: str, failed: pa.ChunkedArray, where: str) -> None:
    column = table[reward]
    for wrong, problem in (
        (pc.invert(pc.is_finite(column)), "is no finite number"),
        (
            pc.greater(pc.abs(column), statistics.LARGEST),
            f"is beyond {statistics.LARGEST:g}, too large to be summed up",
        ),
        (pc.and_(failed, column.is_valid()), "is that of a completion which failed"),
    ):
        if (row := int(pc.index(wrong, True).as_py())) >= 0:
            data_idx, sample_idx = (table[name][row] for name in KEY_COLUMNS)
            raise FormatError(
                f"{where}: data row {data_idx}, completion {sample_idx}: {reward} "
                f"{column[row].as_py()} {problem}. Score the file again with `ep-rft score`"
            )


class _Texts:
    """What the texts of tables that go by say: kinds of failures, reasons, metrics."""

    def __init__(self, reward: str) -> None:
        self._reward = reward
        self.failures: Counter[str] = Counter()
        self.reasons: Counter[str | None] = Counter()
        self.metrics = statistics.MetricMeans()

    def counted(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        _, _, metrics, why = reward_columns(self._reward)
        for table in tables:
            failed = table.column("error").is_valid()
            for kind, count in _value_counts(table.column("error_kind").filter(failed)):
                self.failures["unknown" if kind is None else kind] += count
            unscored = pc.and_(pc.invert(failed), table.column(self._reward).is_null())
            for text, count in _value_counts(table.column(why).filter(unscored)):
                self._add_reason(text, count)
            if metrics in table.schema.names:
                for text, count in _value_counts(table.column(metrics)):
                    self.metrics.add_json(text, count)
            yield table

    def _add_reason(self, text: str | None, count: int) -> None:
        reason = None if text is None else text.strip().partition("\n")[0][:REASON_CHARACTERS]
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            reason = OTHER_REASONS
        self.reasons[reason] += count


def _value_counts(column: pa.ChunkedArray) -> list[tuple[str | None, int]]:
    return [(pair["values"], pair["counts"]) for pair in column.value_counts().to_pylist()]


def _prompt_starts(table: pa.Table) -> list[str]:
    """How prompts begin; of messages, the last one with text."""
    starts: list[str] = []
    for prompt in table.column("prompt").to_pylist():
        texts = [prompt] if not isinstance(prompt, list) else [m["content"] for m in prompt]
        starts.append(next((text for text in reversed(texts) if text), "")[:PROMPT_CHARACTERS])
    return starts
