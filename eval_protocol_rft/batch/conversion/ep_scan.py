"""A first look at a file of Eval Protocol's rows: what its rollout file has to be like.

Invariant: every row was read whole, so that the second reading fails at nothing but its storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.conversion.json_types import JsonColumn
from eval_protocol_rft.batch.conversion.types import ConvertError
from eval_protocol_rft.batch.evaluation_rows.file_part import FilePart, FileWide, read_file_part
from eval_protocol_rft.batch.evaluation_rows.from_row import FailedRolloutError, from_row
from eval_protocol_rft.batch.evaluation_rows.rest import extra_of
from eval_protocol_rft.batch.rollouts.format import (
    ORIGINAL_PREFIX,
    FileMetadata,
    RewardSettings,
    SamplingSettings,
    schema,
)
from eval_protocol_rft.batch.rollouts.rows import CompletionRow
from eval_protocol_rft.record import RecordError, has_record, is_marked
from eval_protocol_rft.training.importing import read_rows

_HOW_SAMPLED = frozenset(SamplingSettings.__struct_fields__)


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, from 0.

    Raises:
        TrainingDataError: a line is no row; the message names it.
    """
    return enumerate(read_rows(path))


def line_of(path: Path, index: int) -> int:
    """Number, from 1, of the line that row `index` stands in: there may be blank ones."""
    with path.open("rb") as lines:
        filled = (number for number, line in enumerate(lines, 1) if not line.isspace())
        return next(number for i, number in enumerate(filled) if i == index)


@dataclass(slots=True)
class EpScan:
    """What all rows together say. `add` every row, then read it."""

    path: Path
    drop_failed_rows: bool
    num_rows: int = 0
    dropped: set[int] = field(default_factory=set)
    """Numbers of the rows whose rollout failed."""
    continued: set[int] = field(default_factory=set)
    """Numbers of the rows that are more of the data row before them: `to_rows` makes several of
    one whose completions have different prompts."""
    _parts: list[int] = field(default_factory=list)
    """`data_idx` of the data rows that came from a rollout file."""
    _last: tuple[Any, ...] = ()
    """What names the data row of the last row, where it came from a rollout file."""
    _places: set[int] = field(default_factory=set)
    """`sample_idx` of its completions so far."""
    _file_wide: FileWide | None = None
    one_file: bool = True
    """Whether the rows say alike which rollout file they came from, or that from none."""
    _rewards: dict[str, RewardSettings] = field(default_factory=dict)
    _mixed_rewards: set[str] = field(default_factory=set)
    _sampling: SamplingSettings | None = None
    _one_sampling: bool = True
    _original: dict[str, JsonColumn] = field(default_factory=dict)
    _ground_truth: JsonColumn = field(default_factory=JsonColumn)

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Take row `index` into account.

        Raises:
            ConvertError: it is broken, or its rollout failed and is not to be dropped.
        """
        try:
            completions = from_row(row, index, prompt_kind="messages")
            part = read_file_part(extra_of(row))
        except FailedRolloutError as error:
            if self.drop_failed_rows:
                self.dropped.add(index)
                return
            raise ConvertError(
                f"{self.path}:{line_of(self.path, index)}: {error}. It has no completions to "
                "convert: --drop-failed-rows leaves such rows out and counts them"
            ) from error
        except RecordError as error:
            raise ConvertError(f"{self.path}:{line_of(self.path, index)}: {error}") from error
        self.num_rows += 1
        self._add_columns(completions[0])
        self._add_part(index, part, completions)
        if has_record(extra_of(row)):
            self._add_sampling(extra_of(row))

    def schema(self) -> pa.Schema:
        """Of the rollout file to be."""
        columns = self._original.items()
        json_columns = [ORIGINAL_PREFIX + name for name, column in columns if column.is_json]
        if self._ground_truth.is_json:
            json_columns.append("ground_truth")
        common = self._file_wide if self.one_file else None
        sampling = self._sampling if self._one_sampling else None
        metadata = FileMetadata(
            prompt_kind="messages" if common is None else common.prompt_kind,
            sampling=sampling if common is None else common.sampling,
            data=None if common is None else common.data,
            rewards=self._rewards,
            json_columns=json_columns,
        )
        types = {name: column.type for name, column in columns}
        return schema(metadata, types, ground_truth=self._ground_truth.type)

    @property
    def renumbered(self) -> bool:
        """Whether `data_idx` is the number of the row in this file, not what the row says."""
        data_rows = self.num_rows - len(self.continued)
        return len(self._parts) < data_rows or len(set(self._parts)) < data_rows

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.dropped:
            notes.append(f"{len(self.dropped)} rows whose rollout failed are not in the output")
        if self._parts and self.renumbered:
            notes.append("rows of several files: data_idx is their number in this one")
        notes += [
            f"{name}: given by different evaluators; the metadata names the first"
            for name in sorted(self._mixed_rewards)
        ]
        return tuple(notes)

    def _add_columns(self, first: CompletionRow) -> None:
        self._ground_truth.add(first.ground_truth)
        for name, value in first.original.items():
            self._original.setdefault(name, JsonColumn()).add(value)

    def _add_part(
        self, index: int, part: FilePart | None, completions: list[CompletionRow]
    ) -> None:
        file = None if part is None else part.file
        if self.num_rows == 1:
            self._file_wide = file
        self.one_file = self.one_file and file == self._file_wide
        places = {completion.sample_idx for completion in completions}
        data_row = () if part is None else (part.data_idx, completions[0].row_id, file)
        if data_row and data_row == self._last and not places & self._places:
            self.continued.add(index)
            self._places |= places
        else:
            self._last, self._places = data_row, places
            if part is not None:
                self._parts.append(part.data_idx)
        if part is not None:
            for name, settings in part.file.rewards.items():
                if self._rewards.setdefault(name, settings) != settings:
                    self._mixed_rewards.add(name)

    def _add_sampling(self, extra: Mapping[str, Any]) -> None:
        sampling = extra["sampling"] if is_marked(extra) else {}
        values = {k: v for k, v in sampling.items() if k in _HOW_SAMPLED}
        if any(values.get(name) is None for name in ("model", "temperature", "top_p", "top_k")):
            self._one_sampling = False  # another program's row, which does not say
            return
        settings = msgspec.convert(values, SamplingSettings)
        self._sampling = self._sampling or settings
        self._one_sampling = self._one_sampling and settings == self._sampling
