"""What a training batch holds besides arrays, as JSON and back.

Invariant: read back, it equals what was written; a value of the wrong type is an `ExportError`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from eval_protocol_rft.training.algorithms import ConfigValue
from eval_protocol_rft.training.batch import TrainingBatch
from eval_protocol_rft.training.datums import Normalization
from eval_protocol_rft.training.export.errors import ExportError
from eval_protocol_rft.training.stats import BatchStats

SCHEMA = 1


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    training_batch: int
    """Version of this layout."""
    algorithm: str
    loss_fn: str
    loss_fn_config: dict[str, ConfigValue]
    normalization: Normalization
    dropped: dict[str, int]
    stats: dict[str, Any]
    policy_versions: list[tuple[str | None, int]]
    """Of the statistics. Pairs, as None is no key in JSON."""
    tokenizer: str | None
    row_ids: list[str | None]
    """[D] per datum."""


def write_metadata(batch: TrainingBatch) -> bytes:
    """The JSON of a batch's scalars and its datums' row ids."""
    stats = {name: getattr(batch.stats, name) for name in BatchStats.__slots__}
    versions = stats.pop("policy_versions")
    return msgspec.json.encode(
        _Metadata(
            training_batch=SCHEMA,
            algorithm=batch.algorithm,
            loss_fn=batch.loss_fn,
            loss_fn_config=dict(batch.loss_fn_config),
            normalization=batch.normalization,
            dropped=dict(batch.dropped),
            stats=stats,
            policy_versions=list(versions.items()),
            tokenizer=batch.tokenizer,
            row_ids=[datum.row_id for datum in batch.datums],
        )
    )


def read_metadata(data: bytes, *, where: str) -> tuple[TrainingBatch, list[str | None]]:
    """Read what `write_metadata` gave.

    Returns:
        The batch, still without datums, and the row ids of those.

    Raises:
        ExportError: it is not that; the message begins with `where`.
    """
    try:
        read = msgspec.json.decode(data, type=_Metadata)
        # Not strict: the keys of a JSON object are text.
        versions = dict(read.policy_versions)
        stats = msgspec.convert(
            {**read.stats, "policy_versions": versions}, BatchStats, strict=False
        )
    except msgspec.DecodeError as error:
        raise ExportError(f"{where}: no metadata of a training batch: {error}") from error
    if read.training_batch != SCHEMA:
        raise ExportError(
            f"{where}: a training batch of layout {read.training_batch}, this version reads "
            f"{SCHEMA}"
        )
    batch = TrainingBatch(
        datums=[],
        algorithm=read.algorithm,
        loss_fn=read.loss_fn,
        loss_fn_config=read.loss_fn_config,
        normalization=read.normalization,
        dropped=read.dropped,
        stats=stats,
        tokenizer=read.tokenizer,
    )
    return batch, read.row_ids
