"""What travels between the readers and the writers of a conversion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from eval_protocol_rft.batch.rollouts.format import FileMetadata, metadata_of
from eval_protocol_rft.batch.rollouts.rows import CompletionRow, from_record_batch

Format = Literal["rollouts", "ep", "verl", "trl"]


class ConvertError(ValueError):
    """The file cannot be converted; the message names file and place."""


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What a conversion did."""

    source: Path
    target: Path
    from_format: Format
    to_format: Format
    data_rows: int
    """Written to the target."""
    completions: int
    """Written to the target; of a rollout file and of rows, failed ones too."""
    notes: tuple[str, ...]
    """What the target does not hold, and what was changed."""

    def __str__(self) -> str:
        done = f"{self.completions} completions of {self.data_rows} data rows"
        return "\n".join([f"{self.target} ({self.to_format}): {done}", *self.notes])


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Rollouts from whatever file, as those of a rollout file. Can be read more than once."""

    path: Path
    schema: pa.Schema
    read: Callable[[], Iterator[pa.Table]]
    """The tables, none of them empty; the completions of a data row stand together."""
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> FileMetadata:
        return metadata_of(self.schema)

    def groups(self) -> Iterator[list[CompletionRow]]:
        """The completions of one data row after the other."""
        metadata = self.metadata
        where = str(self.path)
        tables = (from_record_batch(table, metadata, where=where) for table in self.read())
        rows = itertools.chain.from_iterable(tables)
        for _, group in itertools.groupby(rows, key=lambda row: row.data_idx):
            yield list(group)


def split_note(data_rows: int) -> tuple[str, ...]:
    """What to say of data rows that became a row for each of their prompts."""
    if not data_rows:
        return ()
    return (
        f"data rows with completions of several prompts ({data_rows}) are a row for each prompt: "
        "their chat template rendered something else when the job went on, such as the date",
    )


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer put into the target."""

    data_rows: int
    completions: int
    notes: tuple[str, ...] = ()
