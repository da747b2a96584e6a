"""Rollouts as one static HTML file that needs no server and asks no network for anything.

Invariant: statistics are of all prompts; where texts are of fewer, the page says so. An unscored
completion counts as unscored, never as 0; a failed one as failed, and in no mean. Every value is
counted in exactly one bin. A tokenizer is named by the user or by the file, never guessed from the
model's name: one that cannot be loaded costs the texts of its groups, and the page says so.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from annotated_types import Ge

from eval_protocol_rft._durable import check_replaceable, replacing
from eval_protocol_rft._options import Flag, check_arguments
from eval_protocol_rft._statistics import LARGEST, Array, Bar, MetricMeans, PassAtK, mean_pass_at_k
from eval_protocol_rft.data import CompletionRow, FileMetadata, Reading, RolloutDataset, same_file
from eval_protocol_rft.local import TokenizerError
from eval_protocol_rft.record import UNSCORED
from eval_protocol_rft.report import _html as html
from eval_protocol_rft.report import _page_detail as detail
from eval_protocol_rft.report._charts import histogram, pass_curve
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.report._page_detail import TokenTexts, broken
from eval_protocol_rft.report._svg import nice_step

DEFAULT_PROMPTS = 2_000
DEFAULT_TOKENS = 4_000_000
"""Without a limit of the user's the page has texts of so many prompts, and stops sooner where these
have so many sampled tokens: a browser still opens it within seconds."""
_UNLIMITED = f"{DEFAULT_PROMPTS}, fewer where they hold {DEFAULT_TOKENS:,} tokens"

_MOST_SINGLE_VALUES = 12
"""Up to so many different rewards each get a bin of their own."""
_BINS = 20
_SCRIPTS = ("text.js", "tokens.js", "episode.js", "group.js", "table.js", "start.js")
_STYLES = ("page.css", "details.css")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """What a report holds."""

    path: Path
    prompts: int
    shown_prompts: int
    """Those with texts: the first of the file."""
    completions: int
    size: int
    """Bytes."""
    problems: tuple[str, ...]
    """Why tokens are shown as ids; empty where they are shown as texts."""


def write_report(
    dataset: RolloutDataset,
    output: Path,
    *,
    pass_threshold: Annotated[float, Flag()] = 1.0,
    limit: Annotated[int | None, Ge(1), Flag(unset=_UNLIMITED)] = None,
    tokenizer: Annotated[str | None, Flag(unset="the one the file names")] = None,
    progress: bool | None = None,
) -> WrittenReport:
    """Write the page of a rollout file.

    Args:
        dataset: read once, group by group.
        output: the HTML file; replaced where it is there.
        pass_threshold: reward from which on a completion counts as passed.
        limit: prompts to show with their texts, the first of the file. Statistics are always of
            all. Memory grows with these, and with a few numbers per completion.
        tokenizer: folder or hub id of the tokenizer to show tokens with.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        ReportError: the file cannot be read, has no rows or inexact token data, `output` is the
            file itself, the threshold is no finite number, or matplotlib is not installed.
        FormatError: it is no rollout file, or a damaged one.
        OSError: `output` cannot be written.
    """
    if same_file(output, dataset.path):
        raise ReportError(f"{output} is the rollout file itself: name another file for the page")
    check_replaceable(output)
    html.check_installed()
    check_arguments(write_report, locals(), ReportError)
    columns = list(dict.fromkeys(["reward", *dataset.metadata.rewards]))
    totals = ReportTotals(columns, pass_threshold)
    vocabulary = detail.Vocabulary()
    source = TextSource(dataset.metadata, tokenizer)
    lines: list[dict[str, Any]] = []
    details: list[str] = []
    with (
        _names_the_file(dataset.where),
        Reading("report", dataset.rows_about, show=progress) as reading,
    ):
        for group in reading(dataset.groups()):
            episodes = detail.group_episodes(group)
            source.note(group)
            room = _has_room(len(lines), totals.tokens, limit)
            numbers = totals.add(group)
            if room:
                texts = source.texts(group)
                completions = detail.group_detail(
                    group, episodes, vocabulary=vocabulary, texts=texts, columns=columns
                )
                first = group[0]
                about = {"data_idx": first.data_idx, "row_id": first.row_id}
                lines.append({**about, "prompt": detail.prompt_start(first.prompt), **numbers})
                details.append(html.packed(completions))
    if not totals.prompts:
        raise ReportError(f"{dataset.where}: no completions to report")
    index = {
        "columns": columns,
        "pass_threshold": pass_threshold,
        "logprob_unit": detail.LOGPROB_UNIT,
        "groups": lines,
    }
    values = {
        "name": dataset.path.name,
        "finished": dataset.finished,
        "version": dataset.metadata.package_version,
        "threshold": pass_threshold,
        "shown": len(lines),
        "problems": list(source.problems),
        "index": html.embedded_json(index),
        "vocabulary": html.packed(vocabulary.entries()),
        "details": details,
        **_head(dataset.metadata, totals, source.sources),
    }
    with replacing(output) as file:
        for piece in html.render("page.html", values, scripts=_SCRIPTS, styles=_STYLES):
            file.write(piece.encode())
        size = file.tell()
    return WrittenReport(
        path=output,
        prompts=totals.prompts,
        shown_prompts=len(lines),
        completions=totals.completions,
        size=size,
        problems=tuple(source.problems),
    )


@contextlib.contextmanager
def _names_the_file(path: str) -> Iterator[None]:
    try:
        yield
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error


def _has_room(shown: int, tokens: int, limit: int | None) -> bool:
    """Whether the next group comes with its texts, after `tokens` sampled tokens."""
    if limit is not None:
        return shown < limit
    return shown < DEFAULT_PROMPTS and tokens < DEFAULT_TOKENS


def _head(
    metadata: FileMetadata, totals: ReportTotals, sources: Mapping[str, str]
) -> dict[str, Any]:
    """What the page says of all rollouts. `sources`: what rows say of their sampling where the
    metadata does not, as facts."""
    bins, cut = length_bins(totals.lengths)
    facts = list(sources.items())
    if metadata.sampling is not None:
        facts = html.sampling_facts(metadata.sampling)
    facts += html.data_facts(metadata)
    return {
        "header_facts": facts,
        "header_figures": [
            ("prompts", f"{totals.prompts:,}"),
            ("completions", f"{totals.completions:,}"),
            ("failed", f"{totals.failed:,}"),
            ("truncated", f"{totals.truncated:,}"),
            ("sampled tokens", f"{totals.tokens:,}"),
        ],
        "total": totals.prompts,
        "episodes": totals.episodes,
        "columns": [_column(i, name, metadata, totals) for i, name in enumerate(totals.columns)],
        "lengths": histogram(
            "lengths",
            "Completion lengths",
            bins,
            label="sampled tokens",
            marked=("truncated", cut),
            whole_numbers=True,
            nothing="there are no completions",
        ),
    }


def _column(i: int, name: str, metadata: FileMetadata, totals: ReportTotals) -> dict[str, Any]:
    """What the page says of the `i`-th reward column."""
    column = totals.columns[name]
    points = column.pass_curve()
    shown = {2**i for i in range(len(points).bit_length())} | {len(points)}
    settings = metadata.rewards.get(name)
    nothing = "no completion has a reward"
    return {
        "name": name,
        "evaluator": None if settings is None else settings.evaluator,
        "figures": [
            ("mean reward", "none" if column.mean is None else f"{column.mean:.3f}"),
            *((f"pass@{p.k}", f"{p.value:.3f}") for p in points if p.k in shown),
            ("unscored", f"{totals.unscored(name):,}"),
            *((f"mean {metric}", f"{mean:.3f}") for metric, mean in column.metrics.means.items()),
        ],
        "histogram": histogram(
            f"rewards-{i}", "Rewards", reward_bins(column.rewards), label="reward", nothing=nothing
        ),
        "curve": pass_curve(f"pass-{i}", points, nothing=nothing),
    }


class TextSource:
    """Finds tokenizers for groups, and loads each once.

    Args:
        metadata: of the file.
        tokenizer: name of the one to take in place of what the file says.
    """

    def __init__(self, metadata: FileMetadata, tokenizer: str | None) -> None:
        self._metadata = metadata
        self._chosen = tokenizer
        self._loaded: dict[str, TokenTexts | None] = {}
        self._seen: dict[str, dict[str, None]] = {"Model": {}, "Tokenizer": {}}
        self.problems: dict[str, None] = {}
        """Why tokens are shown as ids, each reason once."""

    def texts(self, group: Sequence[CompletionRow]) -> TokenTexts | None:
        """Token texts for the completions of one prompt, None where there are none to be had."""
        name = self._chosen or self._recorded(group)
        if name is None:
            self.problems["the file does not say which tokenizer they are of"] = None
            return None
        if name not in self._loaded:
            try:
                self._loaded[name] = detail.load_token_texts(name)
            except TokenizerError as error:
                self.problems[str(error)] = None
                self._loaded[name] = None
        return self._loaded[name]

    def note(self, group: Sequence[CompletionRow]) -> None:
        """Remember how the rows say they were sampled, where the file does not say it for all."""
        if self._metadata.sampling is None:
            for name, value in zip(self._seen, _row_sampling(group), strict=True):
                self._seen[name][value or "not recorded"] = None

    @property
    def sources(self) -> Mapping[str, str]:
        """What rows said of their sampling, as facts."""
        return {name: ", ".join(values) for name, values in self._seen.items() if values}

    def _recorded(self, group: Sequence[CompletionRow]) -> str | None:
        if self._metadata.sampling is not None:
            return self._metadata.sampling.tokenizer
        return _row_sampling(group)[1]


def _row_sampling(group: Sequence[CompletionRow]) -> tuple[str | None, str | None]:
    """Model and tokenizer, as the group's row of Eval Protocol says."""
    text = group[0].evaluation_row
    row = {} if text is None else msgspec.json.decode(text, type=dict[str, Any])
    extra = (row.get("execution_metadata") or {}).get("extra") or {}
    sampling = extra.get("sampling") or {}
    return sampling.get("model"), sampling.get("tokenizer")


def finite_reward(row: CompletionRow, column: str) -> float | None:
    """The reward, None where there is none or it is no finite number.

    Raises:
        ReportError: it is too large to be summed up.
    """
    reward = row.scores.get(column, UNSCORED).reward
    if reward is None or not math.isfinite(reward):
        return None
    if abs(reward) > LARGEST:
        raise broken(row, f"{column} is {reward:g}, beyond {LARGEST:g}")
    return reward


class ColumnTotals:
    """One reward column over all prompt groups. Of a completion no more than a few numbers stay in
    memory."""

    def __init__(self) -> None:
        self.values: array[float] = array("d")
        self.groups: Counter[tuple[int, int]] = Counter()
        """(scored, passed) -> prompts with these numbers."""
        self.metrics = MetricMeans()
        """What the evaluator measured beside the reward."""

    def add(self, rewards: Sequence[float], threshold: float) -> dict[str, Any]:
        """Count the scored completions of one prompt; what its line in the table says of them."""
        passed = sum(reward >= threshold for reward in rewards)
        self.values.extend(rewards)
        self.groups[len(rewards), passed] += 1
        mean = math.fsum(rewards) / len(rewards) if rewards else None
        return {"scored": len(rewards), "passed": passed, "mean": mean}

    @property
    def rewards(self) -> Array:
        return np.array(self.values)

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / len(self.values) if self.values else None

    def pass_curve(self) -> list[PassAtK]:
        """pass@k for every k up to the most scored completions of a prompt, each the mean over the
        prompts that have k of them."""
        pairs = np.array(list(self.groups), np.int64).reshape(-1, 2)
        return mean_pass_at_k(*pairs.T, times=list(self.groups.values()))


class ReportTotals:
    """Sums over prompt groups, one added after the other."""

    def __init__(self, columns: Iterable[str], pass_threshold: float) -> None:
        self.columns = {name: ColumnTotals() for name in columns}
        self.pass_threshold = pass_threshold
        """Reward from which on a completion counts as passed."""
        self.prompts = self.failed = self.truncated = 0
        self.completions = 0
        """Asked for, failed ones included."""
        self.episodes = 0
        """Completions of several turns."""
        self.tokens = 0
        """Sampled."""
        self.lengths: Counter[tuple[int, bool]] = Counter()
        """(sampled tokens, truncated) -> completions that did not fail."""

    def add(self, group: Sequence[CompletionRow]) -> dict[str, Any]:
        """Count the completions of one prompt, in the order of `sample_idx`; what its line in the
        table says of them."""
        survivors = [row for row in group if not row.failed]
        lengths = [(row.num_tokens, bool(row.truncated)) for row in survivors]
        tokens, truncated = sum(n for n, _ in lengths), sum(cut for _, cut in lengths)
        self.prompts += 1
        self.completions += len(group)
        self.failed += len(group) - len(survivors)
        self.truncated += truncated
        self.episodes += sum(row.episode is not None for row in survivors)
        self.tokens += tokens
        self.lengths.update(lengths)
        columns = []
        for name, column in self.columns.items():
            rewards = [r for row in survivors if (r := finite_reward(row, name)) is not None]
            columns.append(column.add(rewards, self.pass_threshold))
            for row in group:
                column.metrics.add(row.scores.get(name, UNSCORED).metrics)
        return {
            "size": len(group),
            "failed": len(group) - len(survivors),
            "truncated": truncated,
            "mean_length": tokens / len(lengths) if lengths else None,
            "columns": columns,
        }

    def unscored(self, column: str) -> int:
        """Completions that did not fail and have no reward."""
        return self.completions - self.failed - len(self.columns[column].values)


def reward_bins(rewards: Array) -> list[Bar]:
    """Each value by itself where there are few, else bins of one width with round edges."""
    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= _MOST_SINGLE_VALUES:
        return [Bar(float(v), float(v), int(n)) for v, n in zip(values, counts, strict=True)]
    edges = _edges(float(values[0]), float(values[-1]))
    place = np.searchsorted(edges, values, side="right") - 1
    totals = np.bincount(place, weights=counts, minlength=len(edges) - 1)
    return [
        Bar(low, high, int(total))
        for low, high, total in zip(edges[:-1], edges[1:], totals, strict=True)
    ]


def length_bins(lengths: Mapping[tuple[int, bool], int]) -> tuple[list[Bar], list[int]]:
    """Bins of whole numbers, all of one width; and how many of each are truncated completions.

    Args:
        lengths: (tokens, truncated) -> completions.
    """
    if not lengths:
        return [], []
    low = min(length for length, _ in lengths)
    high = max(length for length, _ in lengths)
    step = max(1, round(nice_step(high - low + 1, _BINS)))
    start = low // step * step
    totals = [[0, 0] for _ in range((high - start) // step + 1)]
    for (length, truncated), count in lengths.items():
        totals[(length - start) // step][truncated] += count
    bins = [
        Bar(start + i * step, start + (i + 1) * step, sum(both)) for i, both in enumerate(totals)
    ]
    return bins, [cut for _, cut in totals]


def _edges(low: float, high: float) -> list[float]:
    """Bin edges from at most `low` to above `high`, round where floats allow it."""
    step = nice_step(high - low, _BINS)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step), math.floor(high / step)
    # Rounded, so that the edge at 0.3 is the number that a reward of 0.3 is.
    edges = [round(i * step, digits) for i in range(first - 1, last + 3)]
    below = [edge for edge in edges if edge <= low]
    within = sorted({edge for edge in edges if low < edge <= high})
    above = [edge for edge in edges if edge > high]
    return [
        below[-1] if below else low,
        *within,
        above[0] if above else math.nextafter(high, math.inf),
    ]
