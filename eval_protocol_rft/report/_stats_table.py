"""`RolloutStats` for the terminal: sums, rewards, pass@k, lengths, problems, the hardest prompts.

Invariant: what came out of a file is text: never read as markup, and control characters are shown
as escapes. A number that is not known is shown as such.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eval_protocol_rft._statistics import Distribution
from eval_protocol_rft._text import visible
from eval_protocol_rft.data import PromptStats, RolloutStats

_BAR_WIDTH = 32
_LONGEST_PROMPT = 40


def stats_table(stats: RolloutStats, *, limit_groups: int = 20) -> RenderableType:
    """Everything, with the `limit_groups` hardest data rows."""
    parts: list[RenderableType] = [_sums(stats)]
    if stats.rewards is not None:
        parts.append(_spread(stats.rewards, stats.reward))
        parts.append(_pass_at_k(stats))
    if stats.metrics:
        means = "  ".join(f"{visible(name)} {mean:.4g}" for name, mean in stats.metrics.items())
        parts.append(Text(f"\nmean of  {means}"))
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


def _sums(stats: RolloutStats) -> Panel:
    mean = None if stats.rewards is None else stats.rewards.mean
    lines = [
        f"{stats.groups} prompts, {stats.completions} completions, {stats.tokens} tokens",
        f"mean {stats.reward} {_number(mean)} over {stats.scored} scored completions",
        f"prompts: {stats.groups_all_passed} all passed, {stats.groups_mixed} mixed, "
        f"{stats.groups_none_passed} none passed, {stats.groups_unscored} unscored "
        f"(a pass is {stats.pass_threshold:g} or more)",
    ]
    text = Text("\n".join(lines), style="bold")
    rate = "" if stats.truncation_rate is None else f" ({stats.truncation_rate:.1%})"
    problems = [
        f"{count} {what}"
        for count, what in (
            (stats.truncated, f"truncated{rate}"),
            (stats.unscored, "unscored"),
            (stats.failed, "failed"),
        )
        if count
    ]
    if problems:
        text.append("\n" + ", ".join(problems), style="yellow")
    if not stats.finished:
        text.append("\nthe job is not finished: these are its parts so far", style="yellow")
    return Panel(text, title=Text(visible(stats.model or "several models")), expand=False)


def _spread(spread: Distribution, title: str) -> RenderableType:
    """Moments and quantiles above a bar chart."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    table.add_column()
    most = max(bar.count for bar in spread.histogram)
    for i, bar in enumerate(spread.histogram):
        close = "]" if i == len(spread.histogram) - 1 else ")"
        ends = f"{bar.low:g}" if bar.low == bar.high else f"[{bar.low:.4g}, {bar.high:.4g}{close}"
        # A bar that stands for something is never empty.
        width = max(round(_BAR_WIDTH * bar.count / most), 1) if bar.count else 0
        table.add_row(Text(ends), str(bar.count), Text("█" * width, style="cyan"))
    numbers = [("mean", spread.mean), ("std", spread.std), ("min", spread.min)]
    numbers += [*spread.quantiles.items(), ("max", spread.max)]
    line = Text(title, style="bold")
    line.append(
        "  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers), style="not bold"
    )
    return Group(Text(), line, table)


def _pass_at_k(stats: RolloutStats) -> RenderableType:
    line = Text("pass@k", style="bold")
    for estimate in stats.pass_at_k:
        line.append(f"  @{estimate.k} {estimate.value:.3f}", style="not bold")
        if estimate.groups != stats.groups:
            line.append(f" ({estimate.groups} prompts)", style="dim")
    return Group(Text(), line)


def _counts(title: str, counts: list[tuple[str, int]]) -> RenderableType:
    lines = [Text(f"{count:>8}  {visible(text)}") for text, count in counts]
    return Group(Text(), Text(title, style="bold yellow"), *lines)


def _groups(lines: list[PromptStats]) -> RenderableType:
    table = Table(
        title="Hardest prompts first", title_justify="left", title_style="bold", expand=False
    )
    table.add_column("row", max_width=20)
    table.add_column("prompt", max_width=_LONGEST_PROMPT)
    for name in ("passed", "mean", "failed", "truncated", "tokens"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            Text(visible(line.row_id)),
            Text(_start(line.prompt_start)),
            f"{line.passed}/{line.scored}",
            _number(line.mean_reward),
            str(line.failed or ""),
            str(line.truncated or ""),
            _number(line.mean_tokens, ".1f"),
        )
    return Group(Text(), table)


def _start(prompt: str) -> str:
    text = visible(" ".join(prompt.split()))
    return text if len(text) <= _LONGEST_PROMPT else text[: _LONGEST_PROMPT - 3] + "..."


def _number(value: float | None, form: str = ".3f") -> str:
    return "?" if value is None else format(value, form)
