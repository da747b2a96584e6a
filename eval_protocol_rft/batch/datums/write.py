"""From a rollout file to training datums, in files.

Invariant: every completion of the rollout file is in the output or counted under the reason for
which it is not. In memory is one batch, or, for RL-step lines, one prompt group.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.datums.files import check_numbered, write_batch, write_numbered
from eval_protocol_rft.batch.datums.jsonl import write_datums_jsonl
from eval_protocol_rft.batch.datums.rl_step import write_rl_step
from eval_protocol_rft.batch.datums.rows import scored_rows
from eval_protocol_rft.batch.progress import Reading
from eval_protocol_rft.batch.target import TargetError, check_target
from eval_protocol_rft.training.batch import TrainingBatch, build_batch, iter_batches
from eval_protocol_rft.training.errors import TrainingDataError
from eval_protocol_rft.training.options import BatchArguments

DatumsFormat = Literal["npz", "safetensors", "jsonl", "rl-step"]

SUFFIXES: dict[DatumsFormat, str] = {
    "npz": ".npz",
    "safetensors": ".safetensors",
    "jsonl": ".jsonl",
    "rl-step": ".jsonl",
}


@dataclass(slots=True, kw_only=True)
class DatumsSummary:
    """What was written, and what was not."""

    files: list[Path] = field(default_factory=list)
    batches: int = 0
    groups: int = 0
    """Prompt groups that something was written of."""
    datums: int = 0
    """Or samples, of RL-step lines."""
    sampled_tokens: int | None = 0
    """Targets with a weight; None for RL-step lines, which hold text."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason (see `training.filters.DROP_REASONS`) -> completions."""

    def counting(self, batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
        """The same batches, counted as they go by."""
        for batch in batches:
            self.batches += 1
            self.groups += batch.stats.groups_trained
            self.datums += len(batch)
            self.sampled_tokens = (self.sampled_tokens or 0) + batch.stats.sampled_tokens
            self.dropped.update(batch.dropped)
            yield batch


def write_datums(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: DatumsFormat | None = None,  # noqa: A002
    reward: str | None = None,
    max_groups: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Unpack[BatchArguments],
) -> DatumsSummary:
    """Turn a scored rollout file into training data.

    Args:
        source: the rollout file.
        output: where to. With `max_groups` or `max_tokens`, NPZ and safetensors become one file
            per batch: `datums.npz` stands for `datums-00000.npz` and so on, and files of an
            earlier run beyond the last are removed.
        format: default what the extension says. "rl-step", a text format in .jsonl, has to be
            named; it holds rewards, not advantages, so it takes none of the options below.
        reward: name of a further reward to train on; None is the main one.
        max_groups, max_tokens: limits of a batch, as for `iter_batches`. Default: all is one batch,
            in memory.
        overwrite: take the place of files that are there.
        progress: show a bar where it takes long; None: where stderr is a terminal.
        **options: as for `build_batch`: `algorithm`, `normalization`, `filters`, ...

    Raises:
        FormatError: no rollout file, or a broken one; no such reward.
        TrainingDataError: a row or an option is wrong; see `build_batch`.
        EmptyBatchError: nothing is left to train on.
        TargetError: the output must not be written to.
        MissingPackageError: `safetensors` is not installed.
    """
    limited = max_groups is not None or max_tokens is not None
    chosen = format or _format_of(Path(output))
    target = check_target(output, source, suffixes=[SUFFIXES[chosen]], overwrite=overwrite)
    if chosen == "rl-step" and (limited or options):
        raise TrainingDataError(
            "RL-step lines hold text and rewards, no datums: of the options, only the reward "
            "applies to them"
        )
    dataset = RolloutDataset(source)
    with Reading("datums", dataset.rows_about, show=progress) as reading:
        rows = scored_rows(dataset, reward=reward, reading=reading)
        return _write(
            target, chosen, rows, max_groups, max_tokens, overwrite=overwrite, options=options
        )


def _write(
    target: Path,
    format: DatumsFormat,  # noqa: A002
    rows: Iterator[dict[str, Any]],
    max_groups: int | None,
    max_tokens: int | None,
    *,
    overwrite: bool,
    options: BatchArguments,
) -> DatumsSummary:
    if format == "rl-step":
        counts = write_rl_step(target, rows)
        return DatumsSummary(
            files=[target],
            groups=counts.groups,
            datums=counts.samples,
            sampled_tokens=None,
            dropped=Counter(counts.dropped),
        )
    summary = DatumsSummary(files=[target])
    batches = summary.counting(_batches(rows, max_groups, max_tokens, options))
    if format == "jsonl":
        write_datums_jsonl(target, batches)
    elif max_groups is not None or max_tokens is not None:
        check_numbered(target, overwrite=overwrite)
        summary.files = write_numbered(target, batches)
    else:
        write_batch(target, next(batches))
    return summary


def _batches(
    rows: Iterator[dict[str, Any]],
    max_groups: int | None,
    max_tokens: int | None,
    options: BatchArguments,
) -> Iterator[TrainingBatch]:
    if max_groups is None and max_tokens is None:
        yield build_batch(rows, **options)
    else:
        yield from iter_batches(rows, max_groups=max_groups, max_tokens=max_tokens, **options)


def _format_of(path: Path) -> DatumsFormat:
    for name, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return name
    raise TargetError(f"{path}: its name must end in {', '.join(sorted(set(SUFFIXES.values())))}")
