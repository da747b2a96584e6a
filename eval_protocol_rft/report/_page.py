"""Rollouts as one static HTML file that needs no server and asks no network for anything.

Invariant: nothing in the page runs or loads but its own script: the policy in its head allows that
script and that style sheet by their hashes, and no request at all. Statistics are of all prompts;
where texts are of fewer, the page says so.

Which tokenizer gives the tokens of a prompt group their texts.

Invariant: a tokenizer is named by the user or by the file, never guessed from the model's name. One
that cannot be loaded costs the texts of its groups, and the page says so.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft._durable import check_replaceable, replacing
from eval_protocol_rft.data import CompletionRow, FileMetadata, Reading, RolloutDataset, same_file
from eval_protocol_rft.local import TokenizerError
from eval_protocol_rft.report._charts import FRAME
from eval_protocol_rft.report._page_detail import (
    GroupLine,
    PageIndex,
    embedded_json,
    group_detail,
    group_line,
    packed,
)
from eval_protocol_rft.report._page_episodes import group_episodes, put_episodes
from eval_protocol_rft.report._page_header import header_view
from eval_protocol_rft.report._page_stats import (
    ColumnTotals,
    ReportError,
    ReportTotals,
    group_stats,
)
from eval_protocol_rft.report._page_tokens import TokenTexts, Vocabulary, load_token_texts

if TYPE_CHECKING:
    from jinja2 import Template


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
            sampling = _row_sampling(group)
            self._seen["Model"][sampling.model or "not recorded"] = None
            self._seen["Tokenizer"][sampling.tokenizer or "not recorded"] = None

    @property
    def sources(self) -> Mapping[str, str]:
        """What rows said of their sampling, as facts."""
        return {name: ", ".join(values) for name, values in self._seen.items() if values}

    def _recorded(self, group: Sequence[CompletionRow]) -> str | None:
        if self._metadata.sampling is not None:
            return self._metadata.sampling.tokenizer
        return _row_sampling(group).tokenizer


class _Sampling(msgspec.Struct):
    model: str | None = None
    tokenizer: str | None = None


class _Extra(msgspec.Struct):
    sampling: _Sampling = msgspec.field(default_factory=_Sampling)


class _Execution(msgspec.Struct):
    extra: _Extra | None = None


class _Row(msgspec.Struct):
    execution_metadata: _Execution = msgspec.field(default_factory=_Execution)


def _row_sampling(group: Sequence[CompletionRow]) -> _Sampling:
    """What the group's row of Eval Protocol says of its sampling."""
    text = group[0].evaluation_row
    extra = None if text is None else msgspec.json.decode(text, type=_Row).execution_metadata.extra
    return _Sampling() if extra is None else extra.sampling


DEFAULT_PROMPTS = 2_000
DEFAULT_TOKENS = 4_000_000
"""Without a limit of the user's the page has texts of so many prompts, and stops sooner where these
have so many sampled tokens: a browser still opens it within seconds."""

_SCRIPTS = ("text.js", "tokens.js", "episode.js", "group.js", "table.js", "start.js")
_STYLES = ("page.css", "details.css", "episode.css")


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


@contextlib.contextmanager
def _names_the_file(path: Path) -> Iterator[None]:
    try:
        yield
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error


def write_report(
    dataset: RolloutDataset,
    output: Path,
    *,
    pass_threshold: float = 1.0,
    limit: int | None = None,
    tokenizer: str | None = None,
    progress: bool | None = None,
) -> WrittenReport:
    """Write the page of a rollout file.

    Args:
        dataset: read once, group by group.
        output: the HTML file; replaced where it is there.
        pass_threshold: reward from which on a completion counts as passed.
        limit: prompts to show with their texts, the first of the file; default `DEFAULT_PROMPTS`
            and `DEFAULT_TOKENS`. Memory grows with these, and with a few numbers per completion.
        tokenizer: folder or hub id of the one to show tokens with; default what the file names.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        ReportError: the file has no rows or inexact token data, `output` is the file itself, or
            the threshold is no finite number.
        FormatError: the file cannot be read.
        OSError: `output` cannot be written.
    """
    if same_file(output, dataset.path):
        raise ReportError(f"{output} is the rollout file itself: name another file for the page")
    check_replaceable(output)
    if not math.isfinite(pass_threshold):
        raise ReportError(f"pass_threshold must be finite, got {pass_threshold}")
    columns = list(dict.fromkeys(["reward", *dataset.metadata.rewards]))
    totals = ReportTotals({name: ColumnTotals() for name in columns})
    vocabulary = Vocabulary()
    source = TextSource(dataset.metadata, tokenizer)
    lines: list[GroupLine] = []
    details: list[str] = []
    with (
        _names_the_file(dataset.path),
        Reading("report", dataset.rows_about, show=progress) as reading,
    ):
        for group in reading(dataset.groups()):
            episodes = group_episodes(group)
            lengths = {place: episode.length for place, episode in episodes.items()}
            stats = group_stats(group, columns, pass_threshold=pass_threshold, episodes=lengths)
            source.note(group)
            if _has_room(len(lines), totals.tokens, limit):
                texts = source.texts(group)
                detail = group_detail(group, vocabulary=vocabulary, texts=texts, columns=columns)
                put_episodes(detail, episodes, vocabulary, texts)
                lines.append(group_line(group, stats, columns))
                details.append(packed(detail))
            totals.add(stats)
            for row in group:
                for name, score in row.scores.items():
                    totals.columns[name].metrics.add(score.metrics)
    if not totals.prompts:
        raise ReportError(f"{dataset.path}: no completions to report")
    index = PageIndex(columns=columns, pass_threshold=pass_threshold, groups=lines)
    with replacing(output) as file:
        for chunk in _render(
            name=dataset.path.name,
            finished=dataset.finished,
            version=dataset.metadata.package_version,
            frame=FRAME,
            header=header_view(dataset.metadata, totals, source.sources),
            threshold=pass_threshold,
            total=totals.prompts,
            shown=len(lines),
            episodes=totals.episodes,
            problems=list(source.problems),
            index=embedded_json(index),
            vocabulary=packed(vocabulary.entries()),
            details=details,
        ):
            file.write(chunk.encode())
        size = file.tell()
    return WrittenReport(
        path=output,
        prompts=totals.prompts,
        shown_prompts=len(lines),
        completions=totals.completions,
        size=size,
        problems=tuple(source.problems),
    )


def _has_room(shown: int, tokens: int, limit: int | None) -> bool:
    """Whether the next group comes with its texts, after `tokens` sampled tokens."""
    if limit is not None:
        return shown < limit
    return shown < DEFAULT_PROMPTS and tokens < DEFAULT_TOKENS


def visible(text: str) -> str:
    """`text` with characters that cannot be seen, or that turn others around, as their numbers."""
    return "".join(c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in text)


def _render(**values: Any) -> Iterator[str]:
    from markupsafe import Markup

    script, style = _joined(_SCRIPTS), _joined(_STYLES)
    # Inside a script element `<` is escaped already, and base64 has nothing to escape.
    for name in ("index", "vocabulary"):
        values[name] = Markup(values[name])  # noqa: S704
    values["details"] = map(Markup, values["details"])
    yield from _template().generate(
        **values,
        script=Markup(script),  # noqa: S704
        script_hash=_policy_hash(script),
        style=Markup(style),  # noqa: S704
        style_hash=_policy_hash(style),
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eval_protocol_rft.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template("page.html")


@functools.cache
def _joined(names: tuple[str, ...]) -> str:
    assets = resources.files("eval_protocol_rft.report") / "assets"
    return "\n".join((assets / name).read_text(encoding="utf-8") for name in names)


def _policy_hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
