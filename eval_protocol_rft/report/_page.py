"""Rollouts as one static HTML file that needs no server and asks no network for anything.

Invariant: statistics are of all prompts; where texts are of fewer, the page says so. A tokenizer is
named by the user or by the file, never guessed from the model's name: one that cannot be loaded
costs the texts of its groups, and the page says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from annotated_types import Ge

from eval_protocol_rft._durable import check_replaceable, replacing
from eval_protocol_rft._options import Flag, check_arguments
from eval_protocol_rft.data import (
    CompletionRow,
    DataSettings,
    FileMetadata,
    Reading,
    RolloutDataset,
    SamplingSettings,
    same_file,
)
from eval_protocol_rft.local import TokenizerError
from eval_protocol_rft.report._charts import histogram, pass_curve
from eval_protocol_rft.report._html import (
    Facts,
    ReportError,
    check_installed,
    embedded_json,
    packed,
    render,
)
from eval_protocol_rft.report._page_detail import (
    LOGPROB_UNIT,
    group_detail,
    group_episodes,
    prompt_start,
)
from eval_protocol_rft.report._page_stats import (
    ColumnTotals,
    ReportTotals,
    length_bins,
    reward_bins,
)
from eval_protocol_rft.report._page_tokens import TokenTexts, Vocabulary, load_token_texts

DEFAULT_PROMPTS = 2_000
DEFAULT_TOKENS = 4_000_000
"""Without a limit of the user's the page has texts of so many prompts, and stops sooner where these
have so many sampled tokens: a browser still opens it within seconds."""
_UNLIMITED = f"{DEFAULT_PROMPTS}, fewer where they hold {DEFAULT_TOKENS:,} tokens"

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
        ReportError: the file has no rows or inexact token data, `output` is the file itself, the
            threshold is no finite number, or matplotlib is not installed.
        FormatError: the file cannot be read.
        OSError: `output` cannot be written.
    """
    if same_file(output, dataset.path):
        raise ReportError(f"{output} is the rollout file itself: name another file for the page")
    check_replaceable(output)
    check_installed()
    check_arguments(write_report, locals(), ReportError)
    columns = list(dict.fromkeys(["reward", *dataset.metadata.rewards]))
    totals = ReportTotals({name: ColumnTotals() for name in columns}, pass_threshold)
    vocabulary = Vocabulary()
    source = TextSource(dataset.metadata, tokenizer)
    lines: list[dict[str, Any]] = []
    details: list[str] = []
    with (
        _names_the_file(dataset.where),
        Reading("report", dataset.rows_about, show=progress) as reading,
    ):
        for group in reading(dataset.groups()):
            episodes = group_episodes(group)
            source.note(group)
            room = _has_room(len(lines), totals.tokens, limit)
            numbers = totals.add(group)
            if room:
                texts = source.texts(group)
                detail = group_detail(
                    group, episodes, vocabulary=vocabulary, texts=texts, columns=columns
                )
                first = group[0]
                about = {"data_idx": first.data_idx, "row_id": first.row_id}
                lines.append({**about, "prompt": prompt_start(first.prompt), **numbers})
                details.append(packed(detail))
    if not totals.prompts:
        raise ReportError(f"{dataset.where}: no completions to report")
    index = {
        "columns": columns,
        "pass_threshold": pass_threshold,
        "logprob_unit": LOGPROB_UNIT,
        "groups": lines,
    }
    values = {
        "name": dataset.path.name,
        "finished": dataset.finished,
        "version": dataset.metadata.package_version,
        "threshold": pass_threshold,
        "shown": len(lines),
        "problems": list(source.problems),
        "index": embedded_json(index),
        "vocabulary": packed(vocabulary.entries()),
        "details": details,
        **_head(dataset.metadata, totals, source.sources),
    }
    with replacing(output) as file:
        for piece in render("page.html", values, scripts=_SCRIPTS, styles=_STYLES):
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
    facts = list(sources.items())
    if metadata.sampling is not None:
        facts = sampling_facts(metadata.sampling)
    if metadata.data is not None:
        facts += data_facts(metadata.data)
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
            length_bins(totals.lengths),
            label="sampled tokens",
            marked="truncated",
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


def sampling_facts(sampling: SamplingSettings) -> Facts:
    """How the completions were sampled."""
    parameters = [
        f"temperature {sampling.temperature:g}",
        f"top_p {sampling.top_p:g}",
        f"top_k {sampling.top_k}" if sampling.top_k > 0 else "top_k off",
    ]
    if sampling.max_tokens is not None:
        parameters.append(f"max_tokens {sampling.max_tokens}")
    parameters.append(f"n {sampling.n}")
    if sampling.seed is not None:
        parameters.append(f"seed {sampling.seed}" + ("" if sampling.seed_given else " (drawn)"))
    facts = [
        ("Model", sampling.model),
        ("Tokenizer", sampling.tokenizer or "not recorded"),
        ("Sampling", ", ".join(parameters)),
    ]
    if sampling.support_truncated:
        facts.append(("Note", "part of the vocabulary could not be drawn (top_p, top_k or alike)"))
    for name, value in (
        ("Stop", sampling.stop),
        ("System", sampling.system),
        ("Chat template options", sampling.chat_template_kwargs),
        ("Further options", sampling.other),
    ):
        if value:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            facts.append((name, text))
    if sampling.chat_template_hash:
        facts.append(("Chat template hash", sampling.chat_template_hash))
    return facts


def data_facts(data: DataSettings) -> Facts:
    """Which prompts they are."""
    chosen = [f"{data.num_rows:,} rows"]
    if data.where is not None:
        chosen.append(f"where {data.where}")
    if data.shuffle_seed is not None:
        chosen.append(f"shuffled with seed {data.shuffle_seed}")
    if data.limit is not None:
        chosen.append(f"limited to {data.limit:,}")
    return [
        ("Data set", f"{data.name} ({', '.join(chosen)})"),
        ("Its SHA-256", data.fingerprint[:16]),
    ]


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
                self._loaded[name] = load_token_texts(name)
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
