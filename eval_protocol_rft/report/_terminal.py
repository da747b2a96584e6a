"""Rollouts in a terminal: each prompt with its completions and their rewards, or the statistics of
a file with its hardest prompts.

Invariant: model output is text. It is never read as markup, and control characters are shown as
escapes, so no completion can draw on the terminal. An unscored completion counts as unscored, never
as 0; a failed one as failed; a number that is not known is shown as such. What a narrow terminal
has no room for stands in lines below each other; nothing is cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from annotated_types import Ge
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eval_protocol_rft import _statistics as statistics
from eval_protocol_rft._options import Flag
from eval_protocol_rft._text import visible
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.report._reading import ReportRow

if TYPE_CHECKING:
    from eval_protocol_rft.data import PromptStats, RolloutStats

T = TypeVar("T")

_SHOWN_COMPLETIONS = 5
_LONGEST_TEXT = 40
_BAR_WIDTH = 32
_UNSCORED = Text("?", style="yellow")


class WideTable:
    """A table; in a terminal narrower than `least` columns, its rows as lines: a name and a value
    each, without those that have none."""

    def __init__(self, table: Table, least: int) -> None:
        self._table, self._least = table, least

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= self._least:
            yield self._table
            return
        lines = Table(
            box=None, show_header=False, title=self._table.title, title_justify="left",
            title_style=self._table.title_style,
        )  # fmt: skip
        lines.add_column(style="bold", max_width=options.max_width // 3, overflow="fold")
        lines.add_column(overflow="fold")
        for row in zip(*(column.cells for column in self._table.columns), strict=True):
            for column, cell in zip(self._table.columns, row, strict=True):
                if str(cell):
                    lines.add_row(column.header, cell)
            lines.add_row()
        yield lines


class _Flow:
    """Items one after the other; lines end between them and not within."""

    def __init__(self, items: Iterable[Text | str], gap: str, style: str = "") -> None:
        self._items = [Text(item) if isinstance(item, str) else item for item in items]
        self._gap, self._style = gap, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(style=self._style)
        for item in self._items:
            if line and len(line) + len(self._gap) + len(item) > options.max_width:
                yield line.append(self._gap.rstrip())
                line = Text(style=self._style)
            line = Text.assemble(line, self._gap if line else "", item, style=self._style)
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lengths = [len(item) for item in self._items]
        whole = sum(lengths) + len(self._gap) * (len(lengths) - 1)
        return Measurement(max(lengths), max(whole, 1)).with_maximum(options.max_width)


def rollout_table(
    rows: Sequence[ReportRow],
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
    parts: list[RenderableType] = [WideTable(table, 60)]
    if len(rows) > limit:
        parts.append(Text(f"... and {len(rows) - limit} more rows", style="dim"))
    parts.append(_sums(rows, pass_threshold))
    return Group(*parts)


def _cells(row: ReportRow, threshold: float) -> list[RenderableType]:
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
        messages = episode.messages[episode.row_messages or 0 :]
        turns = [_turn(message) for message in messages if message.get("role") == "assistant"]
        if len(turns) == episode.turns:  # else some are the environment's
            texts[i] = " | ".join(turns)
    return texts


def _turn(message: Mapping[str, Any]) -> str:
    """What the assistant said and called."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [f"{function['name']}({function['arguments']})" for function in functions]
    return " ".join([*filter(None, [str(message.get("content") or "")]), *calls])


def _sums(rows: Sequence[ReportRow], threshold: float) -> Panel:
    """Of all rows. Those of one group are one prompt: runs of it, and what was sampled behind
    several prompts."""
    records = [row.record for row in rows if row.record is not None]
    groups: dict[Any, list[float]] = {}
    metrics = statistics.MetricMeans()
    for i, row in enumerate(rows):
        group = groups.setdefault(i if row.group is None else row.group, [])
        if row.record is not None:
            group += [reward for reward in row.record.rewards or [] if reward is not None]
            for result in row.record.completion_results or []:
                metrics.add(result.metrics)
    rewards = [reward for group in groups.values() for reward in group]
    completions = sum(len(record) for record in records)
    tokens = sum(sum(record.sampled_counts) for record in records)
    rate = _tokens_per_second(rows, tokens)
    sums = [
        f"{len(groups)} prompts, {completions} completions, {tokens} tokens",
        f"mean reward {_number(float(np.mean(rewards)) if rewards else None)}",
        *(f"{visible(name)} {mean:.3f}" for name, mean in metrics.means.items()),
        *(f"pass@{p.k} {p.value:.3f}" for p in _pass_at_k(list(groups.values()), threshold)),
        *([] if rate is None else [f"{rate:.0f} tokens/s"]),
    ]
    problems = {
        "truncated": sum(sum(record.ends_truncated) for record in records),
        "unscored": completions - len(rewards),
        "completions failed": sum(len(record.failures) for record in records),
        "rows failed": len(rows) - len(records),
    }
    parts: list[RenderableType] = [_Flow(sums, "   ", "bold")]
    if any(problems.values()):
        shown = (f"{count} {what}" for what, count in problems.items() if count)
        parts.append(_Flow(shown, ", ", "bold yellow"))
    models = sorted(_known(record.sampling.model for record in records))
    temperatures = sorted(_known(record.sampling.temperature for record in records))
    title = (
        f"{', '.join(models) or 'no model'}, temperature "
        f"{', '.join(format(t, 'g') for t in temperatures)}"
    )
    return Panel(Group(*parts), title=Text(visible(title)), expand=False)


def _known(values: Iterable[T | None]) -> set[T]:
    return {value for value in values if value is not None}


def _pass_at_k(groups: list[list[float]], threshold: float) -> list[statistics.PassAtK]:
    """For k = 1 and for the most scored completions of a prompt."""
    counts, passed = statistics.count_passes(groups, threshold)
    return statistics.mean_pass_at_k(counts, passed, sorted({1, int(counts.max(initial=0))}))


def _tokens_per_second(rows: Sequence[ReportRow], tokens: int) -> float | None:
    """From the first completion asked for to the last one back; None where that is not known."""
    spans = [
        (row.record.sampling.began_at, row.record.sampling.began_at + row.seconds)
        for row in rows
        if row.record is not None and row.seconds is not None and row.record.sampling.began_at
    ]
    if not spans:
        return None
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return tokens / seconds if seconds > 0 else None


def stats_table(stats: RolloutStats, *, limit_groups: int = 20) -> RenderableType:
    """Everything, with the `limit_groups` hardest data rows."""
    parts: list[RenderableType] = [_file_sums(stats)]
    if stats.rewards is not None:
        parts.append(_spread(stats.rewards, stats.reward))
        parts.append(_pass_line(stats))
    if stats.metrics:
        means = (f"{visible(name)} {mean:.4g}" for name, mean in stats.metrics.items())
        parts += [Text(), _Flow(["mean of", *means], "  ")]
    if stats.lengths is not None:
        parts.append(_spread(stats.lengths, "sampled tokens"))
    problems = [
        ("failed", stats.failures.items()),
        ("unscored", [(r.text or "never scored", r.count) for r in stats.unscored_reasons]),
    ]
    parts += [_counts(title, list(counts)) for title, counts in problems if counts]
    if limit_groups:
        parts.append(_groups(stats.per_group[:limit_groups]))
        if stats.groups > limit_groups:
            parts.append(Text(f"... and {stats.groups - limit_groups} easier ones", style="dim"))
    return Group(*parts)


def _file_sums(stats: RolloutStats) -> Panel:
    mean = None if stats.rewards is None else stats.rewards.mean
    outcomes = (
        f"prompts: {stats.groups_all_passed} all passed",
        f"{stats.groups_mixed} mixed",
        f"{stats.groups_none_passed} none passed",
        f"{stats.groups_unscored} unscored (a pass is {stats.pass_threshold:g} or more)",
    )
    parts: list[RenderableType] = [
        Text(
            f"{stats.groups} prompts, {stats.completions} completions, {stats.tokens} tokens",
            style="bold",
        ),
        Text(
            f"mean {stats.reward} {_number(mean, unknown='?')} over {stats.scored} scored "
            "completions",
            style="bold",
        ),
        _Flow(outcomes, ", ", "bold"),
    ]
    rate = "" if stats.truncation_rate is None else f" ({stats.truncation_rate:.1%})"
    problems = {
        f"truncated{rate}": stats.truncated,
        "unscored": stats.unscored,
        "failed": stats.failed,
    }
    if any(problems.values()):
        shown = (f"{count} {what}" for what, count in problems.items() if count)
        parts.append(_Flow(shown, ", ", "bold yellow"))
    if not stats.finished:
        words = "the job is not finished: these are its parts so far"
        parts.append(Text(words, style="bold yellow"))
    title = Text(visible(stats.model or "several models"))
    return Panel(Group(*parts), title=title, expand=False)


def _spread(spread: statistics.Distribution, title: str) -> RenderableType:
    """Moments and quantiles above a bar chart."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    table.add_column()
    most = max(bar.count for bar in spread.histogram)
    for i, bar in enumerate(spread.histogram):
        close = "]" if i == len(spread.histogram) - 1 else ")"
        ends = f"{bar.low:g}" if bar.low == bar.high else f"[{bar.low:.4g}, {bar.high:.4g}{close}"
        table.add_row(Text(ends), str(bar.count), _Bar(bar.count / most))
    figures = [("mean", spread.mean), ("std", spread.std), ("min", spread.min)]
    figures += [*spread.quantiles.items(), ("max", spread.max)]
    line = _Flow(
        [Text(title, style="bold"), *(f"{name} {value:.4g}" for name, value in figures)], "  "
    )
    return Group(Text(), line, table)


class _Bar:
    """A bar of the share that it stands for, as wide as there is room."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = self._share * min(options.max_width, _BAR_WIDTH)
        # One that stands for something is never empty.
        yield Text("█" * (max(round(width), 1) if width else 0), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(options.max_width, _BAR_WIDTH))


def _pass_line(stats: RolloutStats) -> RenderableType:
    items = [Text("pass@k", style="bold")]
    for estimate in stats.pass_at_k:
        item = Text(f"@{estimate.k} {estimate.value:.3f}")
        if estimate.groups != stats.groups:
            item.append(f" ({estimate.groups} prompts)", style="dim")
        items.append(item)
    return Group(Text(), _Flow(items, "  "))


def _counts(title: str, counts: list[tuple[str, int]]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", min_width=8)
    table.add_column()
    for text, count in counts:
        table.add_row(str(count), Text(visible(text)))
    return Group(Text(), Text(title, style="bold yellow"), table)


def _groups(lines: list[PromptStats]) -> RenderableType:
    table = Table(
        title="Hardest prompts first", title_justify="left", title_style="bold", expand=False
    )
    table.add_column("row", max_width=20)
    table.add_column("prompt", max_width=_LONGEST_TEXT)
    for name in ("passed", "mean", "failed", "truncated", "tokens"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            Text(visible(line.row_id)),
            Text(_short(line.prompt_start)),
            f"{line.passed}/{line.scored}",
            _number(line.mean_reward, unknown="?"),
            str(line.failed or ""),
            str(line.truncated or ""),
            _number(line.mean_tokens, ".1f", unknown="?"),
        )
    return Group(Text(), WideTable(table, 72))


def _number(value: float | None, form: str = ".3f", *, unknown: str = "unknown") -> str:
    return unknown if value is None else format(value, form)


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 3] + "..."
