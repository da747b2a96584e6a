"""The first look at a file that is to be filtered: what no part of it says alone. Pure.

Invariant: what is held is a few numbers a data row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import msgspec
import numpy as np
import pyarrow as pa

from eval_protocol_rft.batch.filtering.rules import Band, FilterRules
from eval_protocol_rft.batch.numbers import Flags, Floats, group_numbers, group_rewards


@dataclass(frozen=True, slots=True)
class Survey:
    """What rules on data rows need to know of the whole file."""

    scored: int
    """Completions with a reward."""
    mean_band: Band | None
    """Mean rewards between the percentiles; None where no rule asks or no data row has one."""
    duplicates: frozenset[int]
    """`data_idx` of data rows whose prompt an earlier one has."""


def survey_columns(rules: FilterRules, reward: str) -> list[str]:
    """The columns that `survey` reads."""
    prompts = ["prompt", "tools"] if rules.dedupe_prompts else []
    return ["data_idx", "sample_idx", "error", reward, *prompts]


def survey(tables: Iterable[pa.Table], rules: FilterRules, reward: str) -> Survey:
    """Look at tables of whole data rows."""
    scored = 0
    seen: set[bytes] = set()
    duplicates: set[int] = set()
    means: list[Floats] = []
    for table in tables:
        numbers = group_numbers(table, reward)
        rewards = group_rewards(numbers, pass_threshold=rules.pass_threshold)
        scored += int(rewards.scored.sum())
        counts = rewards.scored > 0
        if rules.dedupe_prompts:
            again = _seen_before(table.take(numbers.starts), seen)
            duplicates.update(numbers.data_idx[again].tolist())
            counts &= ~again
        if rules.reward_percentile is not None:
            means.append(rewards.mean[counts])
    band = None
    if rules.reward_percentile is not None and means:
        band = _between_percentiles(np.sort(np.concatenate(means)), rules.reward_percentile)
    return Survey(scored, band, frozenset(duplicates))


def percentile(ordered: Floats, q: float) -> float:
    """The q-th percentile, in [0, 100], of rising numbers, at least one; between two of them in
    proportion.

    The place is computed exactly: in floating point 0.07 * 100 is more than 7, and the percentile
    would miss the number that it is.
    """
    place = Fraction(str(q)) / 100 * (len(ordered) - 1)
    first = math.floor(place)
    value, rest = float(ordered[first]), float(place - first)
    return value + (float(ordered[first + 1]) - value) * rest if rest else value


def _between_percentiles(ordered: Floats, band: Band) -> Band | None:
    if not len(ordered):
        return None
    return Band(*(end if math.isinf(end) else percentile(ordered, end) for end in band))


def _seen_before(firsts: pa.Table, seen: set[bytes]) -> Flags:
    """[P] whether prompt and tools of a row are in `seen`, to which they are added."""
    flags = np.zeros(len(firsts), np.bool_)
    pairs = zip(firsts["prompt"].to_pylist(), firsts["tools"].to_pylist(), strict=True)
    for i, prompt_and_tools in enumerate(pairs):
        digest = hashlib.sha256(msgspec.json.encode(prompt_and_tools)).digest()[:16]
        flags[i] = digest in seen
        seen.add(digest)
    return flags
