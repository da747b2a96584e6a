"""What a row of Eval Protocol carries for the rollout file, beside its rollout record:
`extra["rollout_file"]`. Pure.

Invariant: it is believed only while it is about the completions that are on the row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.batch.evaluation_rows.record import failure
from eval_protocol_rft.batch.rollouts.format import (
    DataSettings,
    FileMetadata,
    PromptKind,
    RewardSettings,
    SamplingSettings,
)
from eval_protocol_rft.batch.rollouts.rows import UNSCORED, CompletionRow, Score
from eval_protocol_rft.record import RecordError, has_record

FILE_KEY = "rollout_file"
"""Key of `extra`. Inside the column `evaluation_row` it holds something else: see `Imported`."""
Trajectories = Sequence[Sequence[Mapping[str, Any]]]
"""[G][S_i] segments, as a record has them."""
_EXTRAS = ("began_at", "temperature", "top_p", "top_k", "max_tokens")


class FileWide(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of all its rows; see `FileMetadata`."""

    prompt_kind: PromptKind
    sampling: SamplingSettings | None = None
    data: DataSettings | None = None
    rewards: dict[str, RewardSettings] = {}


class FilePart(msgspec.Struct, frozen=True, kw_only=True):
    """What the record has no place for."""

    data_idx: int
    generated: bool
    """The columns hold all of the row; False where it came from Eval Protocol."""
    has_original: bool
    """`input_metadata.dataset_info` is the data set's columns."""
    file: FileWide
    tokens: int
    """`token_checksum` of the surviving completions, of all turns of those that are episodes."""
    survived: list[dict[str, Any]]
    """Of each survivor, the columns that a record holds once for all of them, or not at all."""
    failed: list[dict[str, Any]]
    """As in the record, with the same columns and the prompt's ids."""
    scores: dict[str, list[Score]]
    """Further reward columns, by survivor."""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluation_row` says of the record that its row had."""

    keys: list[str]
    """Which optional keys the record had."""
    answer: int | None
    """`sample_idx` of the completion that is the last message, or of the episode that is the row's
    conversation; None where it is none's."""


def file_part(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    metadata: FileMetadata,
    trajectories: Trajectories | None,
) -> dict[str, Any]:
    """A `FilePart`, as plain values. `trajectories` are the survivors' where they are episodes."""
    others = sorted({name for row in group for name in row.scores if name != "reward"})
    part = FilePart(
        data_idx=group[0].data_idx,
        generated=group[0].evaluation_row is None,
        has_original=bool(group[0].original),
        file=FileWide(
            prompt_kind=metadata.prompt_kind,
            sampling=metadata.sampling,
            data=metadata.data,
            rewards=metadata.rewards,
        ),
        tokens=token_checksum([row.completion_ids for row in survivors], trajectories),
        survived=[_extras(row) for row in survivors],
        failed=[{**failure(row), **_extras(row)} for row in group if row.failed],
        scores={name: [row.scores.get(name, UNSCORED) for row in survivors] for name in others},
    )
    values: dict[str, Any] = msgspec.to_builtins(part)
    return values


def read_file_part(extra: Mapping[str, Any]) -> FilePart | None:
    """What `to_row` left in the row of a file; None where it did not, or where the row was rolled
    out anew since.

    Raises:
        RecordError: it is broken.
    """
    if extra.get(FILE_KEY) is None:
        return None
    try:
        part = msgspec.convert(extra[FILE_KEY], FilePart)
    except msgspec.ValidationError as error:
        raise RecordError(f"broken {FILE_KEY!r} in extra: {error}") from error
    is_survived = has_record(extra)
    ids = extra["completion_ids"] if is_survived else []
    trajectories = extra.get("trajectories") if is_survived else None
    return part if token_checksum(ids, trajectories) == part.tokens else None


def token_checksum(completions: Sequence[Any], trajectories: Trajectories | None) -> int:
    """Of the ids of all completions [G][T_i], and of all segments where they are episodes."""
    checksum = 0
    segments = (segment["tokens"] for episode in trajectories or () for segment in episode)
    for ids in (*completions, *segments):
        checksum = zlib.crc32(np.asarray(ids, "<i4").tobytes(), checksum)
    return checksum


def _extras(row: CompletionRow) -> dict[str, Any]:
    extras = {name: getattr(row, name) for name in _EXTRAS if getattr(row, name) is not None}
    if row.failed:
        extras["kind"] = row.error_kind
        extras["prompt_ids"] = None if row.prompt_ids is None else row.prompt_ids.tolist()
    # A record has no way to say that these are not known.
    return extras | {name: None for name in ("attempts", "seconds") if getattr(row, name) is None}
