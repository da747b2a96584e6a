"""From a rollout file to training datums, in files: numbered NPZ or safetensors, JSON lines of
datums for readers in any language, or lines of a Fireworks RL step.

Invariant: every completion of the rollout file is in the output or counted under the reason for
which it is not. It carries the reward that was asked for and no other; a data row that was never
scored is an error, since its completions are not the evaluator's failures. In memory is one batch,
or, for RL-step lines, one prompt group.

After a run the files of a name are those of that run alone: `NAME-00000.npz`, and so on without a
gap. They appear when all of them are whole, or not at all. A JSON line holds one datum, number for
number: float32 values are written so that they read back as the same float32. What all datums share
stands in `<file>.metadata.json` beside them. RL-step lines are those of `export.rl_step.to_lines`
for all rows at once.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import msgspec
from annotated_types import Ge

from eval_protocol_rft import training
from eval_protocol_rft._durable import replacing, sync_folder
from eval_protocol_rft._options import Flag
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, check_target
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._jsonl import replacing_lines
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._records import prompt_groups
from eval_protocol_rft.data._to_ep import to_rows
from eval_protocol_rft.record import UNSCORED
from eval_protocol_rft.training import BatchArguments, PromptGroup, TrainingBatch, TrainingDataError
from eval_protocol_rft.training.export import files
from eval_protocol_rft.training.export.rl_step import RLStepData, to_lines


def numbered_path(path: Path, number: int) -> Path:
    """`datums.npz` -> `datums-00003.npz`."""
    return path.with_name(f"{path.stem}-{number:05d}{path.suffix}")


def check_numbered(path: Path, *, overwrite: bool) -> None:
    """Refuse to mix with the files of an earlier run.

    Raises:
        JobError: some are there.
    """
    first = numbered_path(path, 0)
    if first.exists() and not overwrite:
        raise JobError(
            f"{first} is there already, of an earlier run; write elsewhere, or say --overwrite "
            "(overwrite=True)"
        )


def write_numbered(path: Path, batches: Iterable[TrainingBatch]) -> list[Path]:
    """Write a file per batch, and remove those that an earlier run has left beyond them."""
    written: list[Path] = []
    # All of them beside, then all of them in: a run that is stopped leaves those of the one before.
    with tempfile.TemporaryDirectory(prefix=f".{path.stem[:64]}-", dir=path.parent) as folder:
        for number, batch in enumerate(batches):
            written.append(numbered_path(path, number))
            write_batch(Path(folder) / written[-1].name, batch)
        for target in written:
            if target.exists():
                shutil.copymode(target, Path(folder) / target.name)
            os.replace(Path(folder) / target.name, target)
    sync_folder(path.parent)
    # An earlier run's have no gap: what comes after one is somebody else's.
    for number in itertools.count(len(written)):
        left = numbered_path(path, number)
        if not left.exists():
            break
        left.unlink()
    return written


def write_batch(path: Path, batch: TrainingBatch) -> None:
    """Write one batch in the format of the extension, `.npz` or `.safetensors`."""
    save = files.save_npz if path.suffix == ".npz" else files.save_safetensors
    save(batch, path)


_ARRAYS = ("input_tokens", "target_tokens", "logprobs", "advantages", "weights")
_VALUES = ("row_id", "completion", "segment", "group", "reward", "truncated", "prompt_length")
_SHARED = ("algorithm", "loss_fn", "loss_fn_config", "normalization", "tokenizer")


def write_datums_jsonl(path: Path, batches: Iterable[TrainingBatch]) -> None:
    """Write the datums of at least one batch as they come, in place of a file that is there."""
    encoder = msgspec.json.Encoder()
    shared: dict[str, Any] = {}
    count = 0
    with replacing_lines(path) as lines:
        for number, batch in enumerate(batches):
            for datum in batch.datums:
                lines.write(encoder.encode(_line(number, datum)) + b"\n")
            shared = {name: getattr(batch, name) for name in _SHARED}
            shared |= {"batches": number + 1, "datums": (count := count + len(batch))}
        lines.metadata = shared


def _line(batch: int, datum: training.TrainingDatum) -> dict[str, Any]:
    values = {name: getattr(datum, name) for name in _VALUES}
    arrays = {name: getattr(datum, name).tolist() for name in _ARRAYS}
    if datum.routing_matrices is not None:
        arrays["routing_matrices"] = list(datum.routing_matrices)
    return {"batch": batch, **values, **arrays}


def write_rl_step(path: Path, rows: Iterable[dict[str, Any]]) -> DatumsSummary:
    """Write scored rows as RL-step lines; completions without a reward are dropped and counted.

    Raises:
        TrainingDataError: a row is wrong, or the rows of a prompt group do not stand together.
        EmptyBatchError: no completion is left.
    """
    groups = samples = 0
    dropped: Counter[str] = Counter()
    models: Counter[str] = Counter()
    with replacing(path) as file:
        for model, data in _by_group(rows):
            dropped.update(data.dropped)
            groups += len(data.lines)
            for line in data.lines:
                samples += len(line["samples"])
                models.update([model] * len(line["samples"]) if model else ())
                file.write(msgspec.json.encode(line) + b"\n")
        if not groups:
            raise training.EmptyBatchError(dropped)
    if problem := training.several_models(models):
        warnings.warn(problem, training.BiasedSamplingWarning, stacklevel=3)
    return DatumsSummary(
        files=[path], groups=groups, datums=samples, sampled_tokens=None, dropped=dropped
    )


def _by_group(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str | None, RLStepData]]:
    """The lines of each prompt group, and whose samples they are."""
    seen: set[int] = set()  # hashes, as in `iter_groups`
    for key, group in itertools.groupby(rows, key=training.row_key):
        if hash(key) in seen:
            raise TrainingDataError(
                f"row {key[1]!r} belongs to a prompt group whose rows ended before it: sort the "
                "file so that rows of one row_id stand together"
            )
        seen.add(hash(key))
        try:
            yield key[2], to_lines(group, unscored="drop")
        except training.EmptyBatchError as nothing:
            yield key[2], RLStepData([], nothing.dropped)


def _scored_groups(
    dataset: RolloutDataset, column: str, reading: Reading
) -> Iterator[list[CompletionRow]]:
    """The completions of one data row after the other, with no other rewards than those of a
    column, and these as the main ones.

    Raises:
        TrainingDataError: at a data row that was never scored.
    """
    for group in reading(dataset.groups()):
        survivors = [row for row in group if not row.failed]
        if survivors and not any(column in row.scores for row in survivors):
            raise TrainingDataError(
                f"{dataset.where}: data row {group[0].data_idx} ({group[0].row_id!r}) has no "
                f"{column} and no reason why. Score the file with `ep-rft score`, or leave such "
                "completions out with `ep-rft filter --drop-unscored`"
            )
        for row in group:
            row.scores = {"reward": row.scores.get(column, UNSCORED)}
        yield group


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
    """Reason (see `training.DROP_REASONS`) -> completions."""

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
    format: Annotated[DatumsFormat | None, Flag(unset="what the extension says")] = None,  # noqa: A002
    reward: Annotated[str | None, Flag(unset="the main one")] = None,
    max_groups: Annotated[int | None, Ge(1), Flag()] = None,
    max_tokens: Annotated[int | None, Ge(1), Flag()] = None,
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
    **options: Unpack[BatchArguments],
) -> DatumsSummary:
    """Turn a scored rollout file into training data.

    Args:
        source: the rollout file.
        output: where to. With `max_groups` or `max_tokens`, NPZ and safetensors become one file
            per batch: `datums.npz` stands for `datums-00000.npz` and so on, and files of an
            earlier run beyond the last are removed.
        format: rl-step: text for a Fireworks RL step, in .jsonl. It holds rewards, not advantages,
            so it takes none of the options of algorithms.
        reward: name of a further reward to train on.
        max_groups: most prompt groups of a batch. Without limits all is one batch, in memory.
        max_tokens: most tokens of a batch, prompts included; no group is split.
        overwrite: replace outputs that are there.
        progress: show a bar where it takes long; None: where stderr is a terminal.
        **options: as for `build_batch`: `algorithm`, `normalization`, `filters`, ...

    Raises:
        FormatError: no rollout file, or a broken one; no such reward.
        TrainingDataError: a row or an option is wrong; see `build_batch`.
        EmptyBatchError: nothing is left to train on.
        JobError: the output must not be written to.
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
    column = dataset.reward_column(reward)
    with Reading("datums", dataset.rows_about, show=progress) as reading:
        groups = _scored_groups(dataset, column, reading)
        if chosen == "rl-step":
            # The text of the rows, which the format takes, is that of Eval Protocol's.
            rows = (r for group in groups for r in to_rows(group, dataset.metadata))
            return write_rl_step(target, rows)
        summary = DatumsSummary(files=[target])
        parts = prompt_groups(groups, dataset.metadata)
        batches = summary.counting(_batches(parts, max_groups, max_tokens, options))
        if chosen == "jsonl":
            write_datums_jsonl(target, batches)
        elif limited:
            check_numbered(target, overwrite=overwrite)
            summary.files = write_numbered(target, batches)
        else:
            write_batch(target, next(batches))
        return summary


def _batches(
    parts: Iterator[PromptGroup],
    max_groups: int | None,
    max_tokens: int | None,
    options: BatchArguments,
) -> Iterator[TrainingBatch]:
    if max_groups is None and max_tokens is None:
        yield training.build_batch(training.group_rows(parts), **options)
    else:
        groups = training.iter_groups(parts)
        yield from training.iter_batches(
            groups, max_groups=max_groups, max_tokens=max_tokens, **options
        )


def _format_of(path: Path) -> DatumsFormat:
    for name, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return name
    raise JobError(f"{path}: its name must end in {', '.join(sorted(set(SUFFIXES.values())))}")
