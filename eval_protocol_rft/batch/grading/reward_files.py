"""A column of rewards put into a file.

Invariant: every other value of the file stays as it is, and the rows keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft.batch.rollouts.format import (
    METADATA_KEY,
    ORIGINAL_PREFIX,
    RewardSettings,
    metadata_of,
    reward_columns,
    schema,
)
from eval_protocol_rft.batch.store.merge import Keys

SCORES = pa.schema(
    [
        ("data_idx", pa.int64()),
        ("sample_idx", pa.int32()),
        ("reward", pa.float64()),
        ("reason", pa.string()),
        ("metrics", pa.string()),
        ("error", pa.string()),
    ]
)
"""Rewards on their way into a file. `error`: why there is none."""
_VALUES = ("reward", "reason", "metrics", "error")


def schema_with_reward(known: pa.Schema, column: str, settings: RewardSettings) -> pa.Schema:
    """The schema of a file that also has the reward `column`."""
    metadata = metadata_of(known)
    changed = msgspec.structs.replace(metadata, rewards={**metadata.rewards, column: settings})
    original = {
        field.name.removeprefix(ORIGINAL_PREFIX): field.type
        for field in known
        if field.name.startswith(ORIGINAL_PREFIX)
    }
    full = schema(changed, original, ground_truth=known.field("ground_truth").type)
    foreign = [field for field in known if field.name not in full.names]
    return pa.schema([*full, *foreign]).with_metadata(
        {**(known.metadata or {}), METADATA_KEY: changed.encode()}
    )


def with_scores(
    tables: Iterator[pa.Table],
    scores: Iterator[pa.Table],
    wanted: pa.Schema,
    column: str,
    *,
    places: Callable[[pa.Table], Keys],
    keep: bool,
) -> Iterator[pa.Table]:
    """Tables of a file with rewards in them.

    Args:
        tables: the file's rows.
        scores: rows of `SCORES` in the file's order; not every completion needs one.
        wanted: schema of the result.
        column: of the rewards.
        places: number of each row of a table in the file.
        keep: where there is no new reward, the old one stays; else it goes.
    """
    pending = SCORES.empty_table()
    for table in tables:
        last = int(places(table)[-1])
        while not len(pending) or int(places(pending)[-1]) <= last:
            more = next(scores, None)
            if more is None:
                break
            pending = pa.concat_tables([pending, more])
        size = int(np.searchsorted(places(pending), last, side="right"))
        yield _filled(table, pending.slice(0, size), wanted, column, places=places, keep=keep)
        pending = pending.slice(size).combine_chunks()


def _filled(
    table: pa.Table,
    scores: pa.Table,
    wanted: pa.Schema,
    column: str,
    *,
    places: Callable[[pa.Table], Keys],
    keep: bool,
) -> pa.Table:
    """One table with its rewards."""
    spots = places(scores) - int(places(table)[0])
    graded = np.zeros(len(table), np.bool_)
    graded[spots] = True
    chosen = np.full(len(table), -1, np.int64)
    chosen[spots] = np.arange(len(scores))
    indices = pa.array(chosen, mask=~graded)
    names = reward_columns(column)
    values = {
        name: scores.column(value).take(indices) for name, value in zip(names, _VALUES, strict=True)
    }
    if keep:
        values = {
            name: pc.if_else(pa.array(graded), value, table.column(name))
            for name, value in values.items()
        }
    if column == "reward":
        values["evaluation_row"] = _without_result(table.column("evaluation_row"))
    columns = [
        values[field.name]
        if field.name in values
        else table.column(field.name)
        if field.name in table.schema.names
        else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def _without_result(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Rows of Eval Protocol without the evaluation result that other rewards gave."""
    if column.null_count == len(column):
        return column
    encoded = column.combine_chunks().dictionary_encode()
    texts = []
    for text in encoded.dictionary.to_pylist():
        row = msgspec.json.decode(text)
        row.pop("evaluation_result", None)
        texts.append(msgspec.json.encode(row).decode())
    return pa.chunked_array([pa.array(texts, pa.string()).take(encoded.indices)])
