"""What the head of the page says: where the rollouts come from and what their numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from eval_protocol_rft.data import DataSettings, FileMetadata, SamplingSettings
from eval_protocol_rft.report._charts import (
    BarChart,
    CurveChart,
    bar_chart,
    curve_chart,
    length_bins,
    reward_bins,
)
from eval_protocol_rft.report._page_stats import PassPoint, ReportTotals

Facts = list[tuple[str, str]]
"""Names and values, to be shown one below the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnView:
    """What the page says of one reward column."""

    name: str
    evaluator: str | None
    figures: Facts
    histogram: BarChart
    curve: CurveChart
    points: list[PassPoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderView:
    """What the page says of all rollouts."""

    facts: Facts
    figures: Facts
    lengths: BarChart
    columns: list[ColumnView]


def header_view(
    metadata: FileMetadata, totals: ReportTotals, sources: Mapping[str, str]
) -> HeaderView:
    """The head of the page.

    Args:
        metadata: of the file.
        totals: over all its prompts.
        sources: what rows say of their sampling where the metadata does not, as facts.
    """
    facts = (
        list(sources.items()) if metadata.sampling is None else sampling_facts(metadata.sampling)
    )
    return HeaderView(
        facts=facts + ([] if metadata.data is None else data_facts(metadata.data)),
        figures=[
            ("prompts", f"{totals.prompts:,}"),
            ("completions", f"{totals.completions:,}"),
            ("failed", f"{totals.failed:,}"),
            ("truncated", f"{totals.truncated:,}"),
            ("sampled tokens", f"{totals.tokens:,}"),
        ],
        lengths=bar_chart(length_bins(totals.lengths), whole_numbers=True),
        columns=[_column(name, metadata, totals) for name in totals.columns],
    )


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


def _column(name: str, metadata: FileMetadata, totals: ReportTotals) -> ColumnView:
    column = totals.columns[name]
    points = column.pass_curve()
    shown = {2**i for i in range(len(points).bit_length())} | {len(points)}
    figures = [
        ("mean reward", "none" if column.mean is None else f"{column.mean:.3f}"),
        *((f"pass@{p.k}", f"{p.estimate:.3f}") for p in points if p.k in shown),
        ("unscored", f"{totals.unscored(name):,}"),
        *((f"mean {metric}", f"{mean:.3f}") for metric, mean in column.metrics.means.items()),
    ]
    settings = metadata.rewards.get(name)
    return ColumnView(
        name=name,
        evaluator=None if settings is None else settings.evaluator,
        figures=figures,
        histogram=bar_chart(reward_bins(column.rewards)),
        curve=curve_chart(points),
        points=points,
    )
