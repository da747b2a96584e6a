"""RL-step lines of more rollouts than fit in memory: one prompt group after the other.

Invariant: the lines are those of `export.rl_step.to_lines` for all rows at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eval_protocol_rft.durable import replacing
from eval_protocol_rft.training.errors import EmptyBatchError, TrainingDataError
from eval_protocol_rft.training.export.rl_step import RLStepData, to_lines
from eval_protocol_rft.training.rows import row_key


class RLStepCounts(NamedTuple):
    """What was written."""

    groups: int
    """Lines."""
    samples: int
    dropped: dict[str, int]


def write_rl_step(path: Path, rows: Iterable[dict[str, Any]]) -> RLStepCounts:
    """Write scored rows as RL-step lines; completions without a reward are dropped and counted.

    Raises:
        TrainingDataError: a row is wrong, or the rows of a prompt group do not stand together.
        EmptyBatchError: no completion is left.
    """
    groups = samples = 0
    dropped: Counter[str] = Counter()
    with replacing(path) as file:
        for data in _by_group(rows):
            dropped.update(data.dropped)
            groups += len(data.lines)
            for line in data.lines:
                samples += len(line["samples"])
                file.write(msgspec.json.encode(line) + b"\n")
        if not groups:
            raise EmptyBatchError(dropped)
    return RLStepCounts(groups, samples, dict(dropped))


def _by_group(rows: Iterable[dict[str, Any]]) -> Iterator[RLStepData]:
    seen: set[int] = set()  # hashes, as in `iter_groups`
    for key, group in itertools.groupby(rows, key=row_key):
        if hash(key) in seen:
            raise TrainingDataError(
                f"row {key[1]!r} belongs to a prompt group whose rows ended before it: sort the "
                "file so that rows of one row_id stand together"
            )
        seen.add(hash(key))
        try:
            yield to_lines(group, unscored="drop")
        except EmptyBatchError as nothing:
            yield RLStepData([], nothing.dropped)
