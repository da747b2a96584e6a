"""Fewer rollouts: a file in, the completions or prompts worth keeping out.

Invariant: every completion is kept or dropped for one reason, the first in the order of `REASONS`.
Rules that contradict themselves are an error before any row is read. The file read is never the
file written; what is written appears whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from annotated_types import Ge
from numpy.typing import NDArray

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft._statistics import equal, percentile
from eval_protocol_rft.data import _files as files
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._episodes import nested_arrays
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._sql import rows_where
from eval_protocol_rft.data._stats import SAMPLED_COLUMNS, numbers_of_groups, read_numbers

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Groups = Mapping[str, NDArray[Any]]

REASONS = {
    "duplicate_prompt": "an earlier data row has the same prompt and tools",
    "group_unscored": "a rule on rewards, and no completion of the data row has one",
    "pass_rate": "the data row's pass rate is outside the band",
    "reward_percentile": "the data row's mean reward is outside the band of percentiles",
    "zero_variance": "all rewards of the data row are equal",
    "failed": "the sampler got no completion",
    "unscored": "no reward",
    "truncated": "cut off at max_tokens",
    "too_short": "fewer sampled tokens than min_tokens",
    "too_long": "more sampled tokens than max_tokens",
    "reward": "reward below reward_min or above reward_max",
    "where": "the expression of --where is false or null",
    "duplicate_completion": "an earlier completion of the data row has the same tokens",
    "small_group": "fewer than min_completions are left of the data row",
}
"""In the order in which they are looked at: what is dropped counts under the first that applies."""


class Band(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        ends = ("" if math.isinf(end) else format(end, "g") for end in self)
        return ":".join(ends)


def parse_band(text: str) -> Band:
    """`low:high`, one of which may be left out: `0.1:0.9`, `:0.5`, `25:`.

    Raises:
        JobError: it is not that.
    """
    low, colon, high = text.partition(":")
    try:
        band = Band(float(low or "-inf"), float(high or "inf"))
    except ValueError:
        band = None
    if band is None or not colon or not (low or high) or any(map(math.isnan, band)):
        raise JobError(
            f"{text!r} is no band: write low:high, and leave one of them out where it is open"
        )
    return band


_BAND = Flag(metavar="LOW:HIGH", parse=parse_band)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterRules:
    """What is kept.

    Rules on data rows come first and see all scored completions of the data row, also those that a
    rule on completions drops. A completion that lacks what a rule asks for does not pass it: a
    failed one has no length and no reward.
    """

    reward: Annotated[str | None, Flag(unset="the main one")] = None
    """Name of a further reward."""
    pass_threshold: Annotated[float, Flag()] = 1.0
    """Reward from which on a completion counts as passed."""
    dedupe_prompts: Annotated[bool, Flag()] = False
    """Of equal prompts keep the first.

    Of data rows with the same prompt and tools."""
    pass_rate: Annotated[Band | None, _BAND] = None
    """Prompts of whose scored completions such a share passes, ends included.

    In [0, 1]."""
    reward_percentile: Annotated[Band | None, _BAND] = None
    """Prompts whose mean reward lies between these percentiles, ends included.

    In [0, 100], of the mean rewards of data rows: those that have one, without duplicate
    prompts. The q-th percentile of R means in order stands at place q / 100 * (R - 1), between two
    of them in proportion. Means equal to an end of the band are in it, so ties stay together and
    0:100 keeps all."""
    drop_zero_variance: Annotated[bool, Flag()] = False
    """Drop prompts whose rewards are all equal.

    Also those with a single scored completion."""
    drop_failed: Annotated[bool, Flag()] = False
    """Drop completions that could not be sampled."""
    drop_unscored: Annotated[bool, Flag()] = False
    """Drop completions without a reward.

    Failed completions have no reward either, and are counted as failed."""
    drop_truncated: Annotated[bool, Flag()] = False
    """Drop completions cut off at max_tokens."""
    min_tokens: Annotated[int | None, Ge(1), Flag()] = None
    """Fewest sampled tokens of a completion."""
    max_tokens: Annotated[int | None, Ge(1), Flag()] = None
    """Most sampled tokens of a completion."""
    reward_min: Annotated[float | None, Flag()] = None
    """Least reward of a completion."""
    reward_max: Annotated[float | None, Flag()] = None
    """Most reward of a completion."""
    where: Annotated[str | None, Flag(metavar="SQL")] = None
    """Completions for which an SQL expression is true, over the columns of `ep-rft sql`: 'reward >
    mean_reward and original_level >= 3'.

    Where it is null it is not true."""
    dedupe_completions: Annotated[bool, Flag()] = False
    """Of a prompt's completions with equal tokens keep one.

    The first that passes all rules above."""
    min_completions: Annotated[int | None, Ge(1), Flag()] = None
    """Fewest completions of a prompt, after everything above.

    Failed ones are not counted."""

    def __post_init__(self) -> None:
        _check_band("pass_rate", self.pass_rate, 1.0)
        _check_band("reward_percentile", self.reward_percentile, 100.0)
        for low, high in (("min_tokens", "max_tokens"), ("reward_min", "reward_max")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise JobError(f"{low} {least:g} is above {high} {most:g}")
        check_options(self, JobError)

    @property
    def on_group_rewards(self) -> bool:
        """Whether a rule asks for the rewards of data rows."""
        bands = (self.pass_rate, self.reward_percentile)
        return self.drop_zero_variance or any(band is not None for band in bands)

    @property
    def on_rewards(self) -> bool:
        """Whether a rule drops what has no reward."""
        ends = (self.reward_min, self.reward_max)
        some = any(end is not None for end in ends)
        return self.on_group_rewards or some or self.drop_unscored

    @property
    def on_lengths(self) -> bool:
        """Whether a rule asks for the number of tokens."""
        return self.min_tokens is not None or self.max_tokens is not None


def _check_band(name: str, band: Band | None, most: float) -> None:
    if band is None:
        return
    for end in band:
        if not (math.isinf(end) or 0 <= end <= most):
            raise JobError(f"{name} {band}: both ends must lie between 0 and {most:g}")
    if not band.low <= band.high:
        raise JobError(f"{name} {band}: the first end is above the second")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSummary:
    """What became of the completions of a file. `kept` and `dropped` add up to `completions`."""

    completions: int
    scored: int
    """Completions with a reward."""
    kept: int
    dropped: dict[str, int]
    """Reason (see `REASONS`) -> completions, in that order."""
    groups: int
    """Data rows."""
    groups_kept: int
    """Those of which something is kept."""
    finished: bool = True
    """False where the file's job is not: it may yet have more."""
    mean_band: Band | None
    """The mean rewards that `reward_percentile` came to."""


Codes = NDArray[np.int8]
"""[N] 0 for what is kept, else the place of its reason in `REASONS`, counted from 1."""


def decide(
    tables: Iterable[pa.Table],
    rules: FilterRules,
    reward: str,
    *,
    where: str,
    asked: Callable[[Groups], Flags] | None = None,
) -> tuple[Codes, FilterSummary]:
    """What becomes of each of N completions.

    Args:
        tables: of a file in its order, with `decision_columns`.
        rules: what to keep.
        reward: column.
        where: how messages call the file.
        asked: says of all completions [N] whether `rules.where` is true.
    """
    digests = {"digest": _token_digests} if rules.dedupe_completions else {}
    prompts = {"prompt": _prompt_digests} if rules.dedupe_prompts else {}
    rows, heads = read_numbers(tables, reward, where=where, of_rows=digests, of_heads=prompts)
    groups = numbers_of_groups(rows, rules.pass_threshold)
    again = _seen_before(heads["prompt"]) if rules.dedupe_prompts else groups["num_scored"] < 0
    band = _band_of_means(groups["mean_reward"][~again], rules.reward_percentile)
    group = np.repeat(np.arange(len(again)), groups["num_completions"].astype(np.int64))
    codes = np.zeros(len(group), np.int8)

    def drop(reason: str, flags: Flags) -> None:
        codes[(codes == 0) & flags] = _CODES[reason]

    for reason, flags in _groups_to_drop(groups, again, rules, band).items():
        drop(reason, flags[group])
    for reason, flags in _completions_to_drop(rows, rules).items():
        drop(reason, flags)
    if asked is not None:
        drop("where", ~asked(groups))
    if rules.dedupe_completions:
        drop("duplicate_completion", _same_tokens(rows, (codes == 0) & ~rows["failed"]))
    if rules.min_completions is not None:
        left = np.bincount(group[(codes == 0) & ~rows["failed"]], minlength=len(again))
        drop("small_group", (left < rules.min_completions)[group])
    kept, *dropped = np.bincount(codes, minlength=len(REASONS) + 1).tolist()
    return codes, FilterSummary(
        completions=len(codes),
        scored=int(groups["num_scored"].sum()),
        kept=kept,
        dropped={reason: n for reason, n in zip(REASONS, dropped, strict=True) if n},
        groups=len(again),
        groups_kept=len(np.unique(group[codes == 0])),
        mean_band=band,
    )


_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}


def decision_columns(rules: FilterRules, reward: str) -> list[str]:
    """The columns that `decide` reads, where the file has them."""
    columns = ["data_idx", "sample_idx", "error", "truncated", reward]
    if rules.dedupe_prompts:
        columns += ["prompt", "tools"]
    if rules.on_lengths or rules.dedupe_completions or rules.where is not None:
        columns += SAMPLED_COLUMNS
    if rules.dedupe_completions:
        columns += ["segment_tokens"]
    return columns


def _band_of_means(means: Floats, band: Band | None) -> Band | None:
    """The means between these percentiles of them; None where no rule asks or there are none."""
    ordered = np.sort(means[~np.isnan(means)])
    if band is None or not len(ordered):
        return None
    return Band(*(end if math.isinf(end) else percentile(ordered, end) for end in band))


def _groups_to_drop(
    groups: Groups, again: Flags, rules: FilterRules, means: Band | None
) -> dict[str, Flags]:
    """Reason -> [P] the data rows that it applies to."""
    reasons = {"duplicate_prompt": again}
    if not rules.on_group_rewards:
        return reasons
    reasons["group_unscored"] = groups["num_scored"] == 0
    for reason, band, values in (
        ("pass_rate", rules.pass_rate, groups["pass_rate"]),
        ("reward_percentile", means, groups["mean_reward"]),
    ):
        if band is not None:
            reasons[reason] = ~((values >= band.low) & (values <= band.high))
    if rules.drop_zero_variance:
        reasons["zero_variance"] = equal(groups["min_reward"], groups["max_reward"])
    return reasons


def _completions_to_drop(rows: Mapping[str, NDArray[Any]], rules: FilterRules) -> dict[str, Flags]:
    """Reason -> [N] the completions that it applies to."""
    rewards, tokens = rows["reward"], rows["tokens"]
    reasons: dict[str, Flags] = {}
    by_reward = rules.drop_unscored or rules.reward_min is not None or rules.reward_max is not None
    if rules.drop_failed or rules.on_lengths or by_reward:
        reasons["failed"] = rows["failed"]
    if by_reward:
        reasons["unscored"] = np.isnan(rewards)
    if rules.drop_truncated:
        reasons["truncated"] = rows["truncated"]
    if rules.min_tokens is not None:
        reasons["too_short"] = tokens < rules.min_tokens
    if rules.max_tokens is not None:
        reasons["too_long"] = tokens > rules.max_tokens
    low = -math.inf if rules.reward_min is None else rules.reward_min
    high = math.inf if rules.reward_max is None else rules.reward_max
    reasons["reward"] = (rewards < low) | (rewards > high)
    return reasons


def _prompt_digests(table: pa.Table) -> list[bytes]:
    pairs = zip(table["prompt"].to_pylist(), table["tools"].to_pylist(), strict=True)
    return [hashlib.sha256(msgspec.json.encode(pair)).digest()[:16] for pair in pairs]


def _token_digests(table: pa.Table) -> NDArray[np.uint64]:
    """[N, 2] equal where the tokens are; of episodes, those of all turns and between them."""
    column = table["completion_ids"].combine_chunks()
    ids, ends = column.values.to_numpy(), column.offsets.to_numpy().tolist()
    tokens = [ids[i:j].tobytes() for i, j in pairwise(ends)]
    if "segment_tokens" in table.schema.names:
        for i, segments in enumerate(nested_arrays(table["segment_tokens"])):
            if segments is not None:
                parts = [len(segment).to_bytes(8) + segment.tobytes() for segment in segments]
                tokens[i] = b"".join(parts)
    digests = (hashlib.sha256(text).digest()[:16] for text in tokens)
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _seen_before(digests: list[bytes]) -> Flags:
    """[P] whether an earlier one is the same."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(d, i) != i for i, d in enumerate(digests)], np.bool_)


def _same_tokens(rows: Mapping[str, NDArray[Any]], among: Flags) -> Flags:
    """[N] whether an earlier completion of the data row has the same tokens; only among some."""
    keys = np.column_stack([rows["digest"], rows["data_idx"].astype(np.uint64)])[among]
    order = np.lexsort(keys.T)  # stable: of the same ones, the first comes first
    again = np.zeros(len(keys), np.bool_)
    again[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    flags = np.zeros(len(among), np.bool_)
    flags[among] = again
    return flags


def filter_rollouts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rules: FilterRules,
    *,
    prompts: Annotated[bool, Flag()] = False,
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> FilterSummary:
    """Write what the rules keep of a rollout file.

    Args:
        source: the file, or that of an unfinished job.
        output: .parquet or .jsonl. All columns and the file's metadata stay as they are.
        rules: what to keep.
        prompts: write the data set's own rows of what is left, once each.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        FormatError: no rollout file, or a broken one; no such reward; no columns of a data set.
        JobError: a rule on rewards, and the file has none.
        MissingPackageError: `where` is asked for, and DuckDB is not installed.
        JobError: nothing is kept.
        QueryError: `where` is no expression, or fails on a row.
        JobError: the output is the source, exists already, or has another extension.
    """
    target = files.check_target(
        output, source, suffixes=files.ROLLOUT_SUFFIXES, overwrite=overwrite
    )
    dataset = RolloutDataset(source)
    reward = dataset.reward_column(rules.reward)
    if prompts:
        files.original_columns(dataset.schema)
    with Reading("filter", dataset.rows_about, show=progress) as reading:
        asked = None
        if rules.where is not None:
            asked = functools.partial(
                rows_where, dataset, rules.where, reading, reward, rules.pass_threshold
            )
        needed = [c for c in decision_columns(rules, reward) if c in dataset.schema.names]
        tables = reading(dataset.tables(needed))
        codes, summary = decide(tables, rules, reward, where=dataset.where, asked=asked)
        if rules.on_rewards and not summary.scored:
            raise JobError(
                f"{dataset.where}: a rule asks for rewards, and no completion has one in the "
                f"column {reward!r}. Score the file first, with `ep-rft score`"
            )
        if not summary.kept:
            counts = ", ".join(f"{reason} {count}" for reason, count in summary.dropped.items())
            raise JobError(
                f"nothing is left of {summary.completions} completions, so nothing was written. "
                f"Dropped: {counts or 'there were none'}"
            )
        kept = _kept(reading(dataset.tables()), codes == 0)
        if prompts:
            files.write_prompts(target, dataset.schema, kept)
        else:
            files.write_file(target, dataset.schema, kept)
    return replace(summary, finished=dataset.finished)


def _kept(tables: Iterable[pa.Table], keep: Flags) -> Iterator[pa.Table]:
    """What is left of tables, in tables that are not empty."""
    place = 0
    for table in tables:
        part = keep[place : place + len(table)]
        place += len(table)
        if part.all():
            yield table
        elif part.any():
            yield table.filter(pa.array(part))
