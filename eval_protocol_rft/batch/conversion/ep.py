"""Rows of Eval Protocol, one JSON a line: read and written.

Invariant: see `batch.evaluation_rows`. A row whose rollout failed stops the conversion, unless it
is to be dropped; then it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa

from eval_protocol_rft.batch.conversion.ep_scan import EpScan, numbered_rows
from eval_protocol_rft.batch.conversion.json_types import NonFinite, text_notes
from eval_protocol_rft.batch.conversion.types import ConvertError, Rollouts, Written, split_note
from eval_protocol_rft.batch.evaluation_rows.from_row import from_row
from eval_protocol_rft.batch.evaluation_rows.to_row import to_rows
from eval_protocol_rft.batch.files import tables_of
from eval_protocol_rft.batch.progress import Reading
from eval_protocol_rft.batch.rollouts.format import metadata_of
from eval_protocol_rft.batch.rollouts.rows import CompletionRow
from eval_protocol_rft.durable import replacing


def read(path: Path, *, drop_failed_rows: bool, reading: Reading) -> Rollouts:
    """The completions of all rows. Reads the file once here, and once each time they are read.

    Raises:
        ConvertError: a row is broken or its rollout failed; the message names the line.
        TrainingDataError: a line is no row.
    """
    scan = EpScan(path, drop_failed_rows)
    for index, row in reading(numbered_rows(path), lambda row: 1):
        scan.add(index, row)
    if not scan.num_rows:
        raise ConvertError(f"{path}: no row with a rollout in it")
    schema = scan.schema()

    def tables() -> Iterator[pa.Table]:
        try:
            yield from tables_of(_rows(scan, schema, reading), schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ConvertError(f"{path}: a value does not fit its column: {error}") from error

    return Rollouts(path, schema, tables, scan.notes)


def write(rollouts: Rollouts, target: Path) -> Written:
    """One row per data row, or per prompt of it."""
    metadata = rollouts.metadata
    non_finite = NonFinite()
    watched = Rollouts(rollouts.path, rollouts.schema, lambda: non_finite.watch(rollouts.read()))
    encoder = msgspec.json.Encoder(enc_hook=str)
    data_rows = completions = split = 0
    with replacing(target) as file:
        for group in watched.groups():
            rows = list(to_rows(group, metadata))
            file.write(encoder.encode_lines(rows))
            split += len(rows) > 1
            data_rows += 1
            completions += len(group)
    notes = (*text_notes(rollouts.schema), *non_finite.notes, *split_note(split))
    return Written(data_rows, completions, notes)


def _rows(scan: EpScan, schema: pa.Schema, reading: Reading) -> Iterator[CompletionRow]:
    prompt_kind = metadata_of(schema).prompt_kind
    renumbered = scan.renumbered
    group: list[CompletionRow] = []
    number = 0
    for index, row in reading(numbered_rows(scan.path), lambda row: 1):
        if index in scan.dropped:
            continue
        own = from_row(row, index, prompt_kind=prompt_kind, keep_row=not scan.one_file)
        if index not in scan.continued:
            yield from _in_order(group)
            group, number = [], index
        if renumbered:
            for completion in own:
                completion.data_idx = number
        group += own
    yield from _in_order(group)


def _in_order(group: list[CompletionRow]) -> list[CompletionRow]:
    """One data row's completions, which may have come as several rows."""
    return sorted(group, key=lambda completion: completion.sample_idx)
