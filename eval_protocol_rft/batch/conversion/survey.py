"""What there is in rollouts to be converted: asked before a file with fewer columns is written.

Invariant: a column of the target exists exactly where some completion has a value for it. Chat
templates take a field that is there and null for one that is set, so messages have no field that
none of them uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft.batch.conversion.types import Rollouts
from eval_protocol_rft.batch.rollouts.format import MESSAGES, FileMetadata

_ALWAYS = ("role", "content")


@dataclass(slots=True)
class Survey:
    """Of all completions that did not fail."""

    held: set[str] = field(default_factory=set)
    """Columns with a value somewhere."""
    failed: int = 0
    """Completions that failed, which nothing else here counts."""
    _fields: set[str] = field(default_factory=lambda: set(_ALWAYS))

    @classmethod
    def of(cls, rollouts: Rollouts) -> Survey:
        """Read them once."""
        survey = cls()
        for table in rollouts.read():
            survey._add(table)
        return survey

    @property
    def messages(self) -> pa.DataType:
        """Type of the prompt column."""
        return pa.list_(pa.struct([f for f in MESSAGES.value_type if f.name in self._fields]))

    def notes(self, carried: Iterable[str], metadata: FileMetadata) -> tuple[str, ...]:
        """What a target that has only `carried` does not hold."""
        notes = []
        if self.failed:
            notes.append(f"failed completions ({self.failed}) are not in the output")
        left_out = sorted(self.held - set(carried))
        if left_out:
            notes.append(f"columns not in the output: {', '.join(left_out)}")
        if "ground_truth" in self.held and "ground_truth" in metadata.json_columns:
            notes.append("ground truths of several types are JSON text in the output")
        return tuple(notes)

    def _add(self, table: pa.Table) -> None:
        survived = table.filter(pc.is_null(table.column("error")))
        self.failed += len(table) - len(survived)
        for name in set(survived.schema.names) - self.held:
            if survived.column(name).null_count < len(survived):
                self.held.add(name)
        if survived.schema.field("prompt").type == MESSAGES:
            for chunk in survived.column("prompt").chunks:
                messages = chunk.flatten()
                for i, name in enumerate(MESSAGES.value_type.names):
                    if messages.field(i).null_count < len(messages):
                        self._fields.add(name)
