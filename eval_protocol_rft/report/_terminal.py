"""Rollouts as a terminal table: each prompt, its completions with their rewards, and the sums.

Invariant: model output is text. It is never read as markup, and control characters are shown as
escapes, so no completion can draw on the terminal.

Numbers of a set of rollouts. Pure.

Invariant: an unscored completion counts as unscored, never as 0; a failed one as failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Ge
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eval_protocol_rft._options import Flag
from eval_protocol_rft._statistics import MetricMeans, count_passes, mean_pass_at_k
from eval_protocol_rft._text import visible
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.report._rows import StoredRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSummary:
    """Totals over rows. `None`: nothing to compute it from."""

    rows: int
    """Of the data set: those with the same `row_id` are one, as runs of it are, and what was
    sampled behind several prompts."""
    failed_rows: int
    completions: int
    failed_completions: int
    unscored: int
    truncated: int
    tokens: int
    """Sampled tokens."""
    mean_reward: float | None
    """Over scored completions."""
    metrics: dict[str, float]
    """Mean of each of the evaluator's own metrics."""
    pass_at_k: dict[int, float]
    """k -> mean over the rows of the data set that have k scored completions; a pass is a reward
    at or above the threshold."""
    tokens_per_second: float | None
    """From the first completion asked for to the last one back."""
    models: tuple[str, ...]
    temperatures: tuple[float, ...]


def summarize_rows(rows: Iterable[StoredRow], *, pass_threshold: float = 1.0) -> RolloutSummary:
    """Sum up rows; those without a record count as failed."""
    rows = list(rows)
    records = [row.record for row in rows if row.record is not None]
    groups: dict[str | int, list[float]] = {}
    for i, row in enumerate(rows):
        group = groups.setdefault(row.row_id or i, [])
        if row.record is not None:
            group += [reward for reward in row.record.rewards or [] if reward is not None]
    scored = list(groups.values())
    rewards = [reward for group in scored for reward in group]
    completions = sum(len(record) for record in records)
    tokens = sum(sum(record.sampled_counts) for record in records)
    metrics = MetricMeans()
    for record in records:
        for result in record.completion_results or []:
            metrics.add(result.metrics)
    return RolloutSummary(
        rows=len(groups),
        failed_rows=len(rows) - len(records),
        completions=completions,
        failed_completions=sum(len(record.failures) for record in records),
        unscored=completions - len(rewards),
        truncated=sum(sum(record.ends_truncated) for record in records),
        tokens=tokens,
        mean_reward=float(np.mean(rewards)) if rewards else None,
        metrics=metrics.means,
        pass_at_k=_pass_at_k(scored, pass_threshold),
        tokens_per_second=_rate(rows, tokens),
        models=tuple(sorted(_known(record.sampling.model for record in records))),
        temperatures=tuple(sorted(_known(record.sampling.temperature for record in records))),
    )


def _known(values: Iterable[T | None]) -> set[T]:
    return {value for value in values if value is not None}


def _pass_at_k(scored: list[list[float]], threshold: float) -> dict[int, float]:
    counts, passed = count_passes(scored, threshold)
    ks = sorted({1, int(counts.max(initial=0))})
    return {point.k: point.value for point in mean_pass_at_k(counts, passed, ks)}


def _rate(rows: list[StoredRow], tokens: int) -> float | None:
    spans = [
        (row.record.sampling.began_at, row.record.sampling.began_at + row.seconds)
        for row in rows
        if row.record is not None and row.seconds is not None and row.record.sampling.began_at
    ]
    if not spans:
        return None
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return tokens / seconds if seconds > 0 else None


_SHOWN_COMPLETIONS = 5
_LONGEST_TEXT = 40
_UNSCORED = Text("?", style="yellow")


def rollout_table(
    rows: Sequence[StoredRow],
    *,
    limit: Annotated[int, Ge(0), Flag()] = 10,
    pass_threshold: Annotated[float, Flag()] = 1.0,
) -> RenderableType:
    """Some rows, and the sums of all of them.

    Args:
        rows: what to show.
        limit: Rows to show of each file.
        pass_threshold: Reward from which on a completion counts as passed.
    """
    table = Table(expand=False, header_style="bold", row_styles=["", "dim"])
    table.add_column("prompt", max_width=_LONGEST_TEXT)
    table.add_column("completions (times × text → reward)")
    table.add_column("mean", justify="right")
    table.add_column("pass", justify="center")
    table.add_column("tokens", justify="right")
    for row in rows[:limit]:
        table.add_row(Text(_short(row.prompt)), *_cells(row, pass_threshold))
    parts: list[RenderableType] = [table]
    if len(rows) > limit:
        parts.append(Text(f"... and {len(rows) - limit} more rows", style="dim"))
    parts.append(_summary_panel(summarize_rows(rows, pass_threshold=pass_threshold)))
    return Group(*parts)


def _cells(row: StoredRow, threshold: float) -> list[RenderableType]:
    record = row.record
    if record is None:
        return [Text(visible(row.error or ""), style="red"), "", "", ""]
    scored = [reward for reward in record.rewards or [] if reward is not None]
    passed = any(reward >= threshold for reward in scored)
    return [
        _completions(record, threshold),
        f"{sum(scored) / len(scored):.2f}" if scored else _UNSCORED,
        (Text("yes", style="green") if passed else Text("no", style="red"))
        if scored
        else _UNSCORED,
        str(sum(record.sampled_counts)),
    ]


def _completions(record: RolloutRecord, threshold: float) -> Text:
    """Equal texts of equal reward once, with their number; best rewards first."""
    rewards = record.rewards or [None] * len(record)
    texts = [
        _short(text) + ("..." if cut else "")
        for text, cut in zip(_texts(record), record.ends_truncated, strict=True)
    ]
    counted = Counter(zip(texts, rewards, strict=True)).most_common()
    counted.sort(key=lambda item: float("-inf") if item[0][1] is None else -item[0][1])
    line = Text()
    for (text, reward), times in counted[:_SHOWN_COMPLETIONS]:
        style = "yellow" if reward is None else "green" if reward >= threshold else "red"
        line.append(f"{times}×", style="dim")
        line.append(text or "(empty)", style=style)
        line.append(f"→{'?' if reward is None else format(reward, 'g')}  ", style="dim")
    if len(counted) > _SHOWN_COMPLETIONS:
        line.append(f"and {len(counted) - _SHOWN_COMPLETIONS} more", style="dim")
    if record.failures:
        line.append(f" {len(record.failures)} failed", style="red")
    line.rstrip()
    return line


def _texts(record: RolloutRecord) -> list[str]:
    """Of each completion; of an episode, what the policy said turn by turn."""
    texts = list(record.completions_text)
    for i, episode in enumerate(record.episodes or ()):
        told = episode.messages[episode.row_messages or 0 :]
        said = [_said(message) for message in told if message.get("role") == "assistant"]
        if len(said) == episode.turns:  # else some are the environment's
            texts[i] = " | ".join(said)
    return texts


def _said(message: Mapping[str, Any]) -> str:
    """What the assistant said and called."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    called = [f"{function['name']}({function['arguments']})" for function in functions]
    return " ".join([*filter(None, [str(message.get("content") or "")]), *called])


def _summary_panel(summary: RolloutSummary) -> Panel:
    parts = [
        f"{summary.rows} prompts, {summary.completions} completions, {summary.tokens} tokens",
        f"mean reward {_number(summary.mean_reward)}",
        *(f"{visible(name)} {value:.3f}" for name, value in summary.metrics.items()),
        *(f"pass@{k} {value:.3f}" for k, value in summary.pass_at_k.items()),
    ]
    if summary.tokens_per_second is not None:
        parts.append(f"{summary.tokens_per_second:.0f} tokens/s")
    problems = [
        f"{count} {what}"
        for count, what in (
            (summary.truncated, "truncated"),
            (summary.unscored, "unscored"),
            (summary.failed_completions, "completions failed"),
            (summary.failed_rows, "rows failed"),
        )
        if count
    ]
    text = Text("   ".join(parts), style="bold")
    if problems:
        text.append("\n" + ", ".join(problems), style="yellow")
    models = ", ".join(summary.models) or "no model"
    temperatures = ", ".join(format(t, "g") for t in summary.temperatures)
    title = Text(visible(f"{models}, temperature {temperatures}"))
    return Panel(text, title=title, expand=False)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 3] + "..."
