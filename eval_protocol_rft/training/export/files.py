"""A training batch in one file, NPZ or safetensors, and back.

Invariant: what is read back equals what was written, array by array, and the batch's metadata with
it; a file that does not hold that is an `ExportError`. Nothing is pickled. A file appears under its
name when it is complete.

Both formats hold the same arrays, for D datums with T_i targets each, laid end to end:
`input_tokens`, `target_tokens` [sum T_i] int64; `logprobs`, `advantages`, `weights` [sum T_i]
float32; `offsets` [D+1] int64, so that datum i is `offsets[i]:offsets[i+1]`; `prompt_lengths`,
`groups`, `completions`, `segments` [D] int64; `rewards` [D] float64; `truncated` [D] bool. The rest
is JSON, routing matrices too: in NPZ the bytes of the array `metadata`, in safetensors the metadata
entry `eval_protocol_rft`.

What a training batch holds besides arrays, as JSON and back.

Invariant: read back, it equals what was written; a value of the wrong type is an `ExportError`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._durable import replacing
from eval_protocol_rft.training._algorithms import ConfigValue
from eval_protocol_rft.training._batch import BatchStats, TrainingBatch
from eval_protocol_rft.training._datums import Normalization, TrainingDatum
from eval_protocol_rft.training._types import ExportError, require

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
    routing_matrices: list[list[str] | None] | None = None
    """[D][T_i], where a datum has some."""


def write_metadata(batch: TrainingBatch) -> bytes:
    """The JSON of a batch's scalars and its datums' row ids."""
    stats = {name: getattr(batch.stats, name) for name in BatchStats.__slots__}
    versions = stats.pop("policy_versions")
    matrices = [datum.routing_matrices for datum in batch.datums]
    routing = [None if held is None else list(held) for held in matrices]
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
            routing_matrices=routing if any(routing) else None,
        )
    )


def read_metadata(data: bytes, *, where: str) -> tuple[TrainingBatch, list[dict[str, Any]]]:
    """Read what `write_metadata` gave.

    Returns:
        The batch, still without datums, and the fields of those that it holds.

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
    routing = read.routing_matrices or [None] * len(read.row_ids)
    fields = [
        {"row_id": row_id, "routing_matrices": matrices}
        for row_id, matrices in zip(read.row_ids, routing, strict=False)
    ]
    return batch, fields


METADATA_KEY = "eval_protocol_rft"
_PER_TOKEN = {
    "input_tokens": np.int64,
    "target_tokens": np.int64,
    "logprobs": np.float32,
    "advantages": np.float32,
    "weights": np.float32,
}
_PER_DATUM = {
    "prompt_lengths": ("prompt_length", np.int64),
    "rewards": ("reward", np.float64),
    "truncated": ("truncated", np.bool_),
    "groups": ("group", np.int64),
    "completions": ("completion", np.int64),
    "segments": ("segment", np.int64),
}

Arrays = Mapping[str, NDArray[Any]]


def save_npz(batch: TrainingBatch, path: str | os.PathLike[str]) -> None:
    """Write `batch` as an uncompressed NPZ file, in place of one that is there."""
    metadata = np.frombuffer(write_metadata(batch), np.uint8)
    with replacing(path) as unfinished, unfinished.path.open("r+b") as file:
        arrays: dict[str, Any] = {**_arrays(batch), "metadata": metadata}
        np.savez(file, **arrays)


def load_npz(path: str | os.PathLike[str]) -> TrainingBatch:
    """Read what `save_npz` wrote.

    Raises:
        ExportError: the file holds no batch, or not all of one.
    """
    try:
        with Path(path).open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, Mapping) else {}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path}: not an NPZ file: {error}") from error
    if "metadata" not in arrays:
        raise ExportError(f"{path}: not an NPZ file with the array `metadata` of a training batch")
    return _batch(arrays, arrays["metadata"].tobytes(), path)


def save_safetensors(batch: TrainingBatch, path: str | os.PathLike[str]) -> None:
    """Write `batch` as a safetensors file, in place of one that is there.

    Raises:
        MissingPackageError: `safetensors` is not installed.
    """
    numpy_api = require("safetensors.numpy", install="eval-protocol-rft[local]")
    with replacing(path) as unfinished:
        metadata = {METADATA_KEY: write_metadata(batch).decode()}
        # Not save_file: it puts another file, readable by its owner alone, under the name.
        unfinished.write(numpy_api.save(_arrays(batch), metadata=metadata))


def load_safetensors(path: str | os.PathLike[str]) -> TrainingBatch:
    """Read what `save_safetensors` wrote.

    Raises:
        MissingPackageError: `safetensors` is not installed.
        ExportError: the file holds no batch, or not all of one.
    """
    api = require("safetensors", install="eval-protocol-rft[local]")
    try:
        with api.safe_open(path, framework="numpy") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except api.SafetensorError as error:
        raise ExportError(f"{path}: not a safetensors file: {error}") from error
    if metadata is None:
        raise ExportError(
            f"{path}: a safetensors file without the metadata entry {METADATA_KEY!r} of a training "
            "batch"
        )
    return _batch(arrays, metadata.encode(), path)


def _arrays(batch: TrainingBatch) -> dict[str, NDArray[Any]]:
    datums = batch.datums
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([getattr(datum, name) for datum in datums]) for name in _PER_TOKEN
    }
    arrays["offsets"] = np.cumsum([0, *map(len, datums)], dtype=np.int64)
    for name, (field, dtype) in _PER_DATUM.items():
        arrays[name] = np.array([getattr(datum, field) for datum in datums], dtype)
    return arrays


def _batch(arrays: Arrays, metadata: bytes, path: str | os.PathLike[str]) -> TrainingBatch:
    batch, held = read_metadata(metadata, where=str(path))
    _check(arrays, len(held), path)
    starts = arrays["offsets"].tolist()
    columns = {field: arrays[name].tolist() for name, (field, _) in _PER_DATUM.items()}
    datums: list[TrainingDatum] = []
    for i, own in enumerate(held):
        fields: dict[str, Any] = {field: values[i] for field, values in columns.items()} | own
        fields |= {name: arrays[name][starts[i] : starts[i + 1]] for name in _PER_TOKEN}
        datums.append(TrainingDatum(**fields))
    return replace(batch, datums=datums)


def _check(arrays: Arrays, size: int, path: str | os.PathLike[str]) -> None:
    """Every array is there, has its dtype, and the length that the others imply."""
    offsets = arrays.get("offsets")
    tokens = int(offsets[-1]) if offsets is not None and offsets.size else 0
    expected: dict[str, tuple[int, Any]] = {"offsets": (size + 1, np.int64)}
    expected |= {name: (size, dtype) for name, (_, dtype) in _PER_DATUM.items()}
    expected |= {name: (tokens, dtype) for name, dtype in _PER_TOKEN.items()}
    for name, (length, dtype) in expected.items():
        array = arrays.get(name)
        actual = None if array is None else (array.shape, array.dtype)
        if actual != ((length,), np.dtype(dtype)):
            raise ExportError(
                f"{path}: array {name!r} must have shape ({length},) and dtype {np.dtype(dtype)}, "
                f"found {'none' if actual is None else f'{actual[0]} {actual[1]}'}"
            )
    if offsets is None or offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise ExportError(f"{path}: array 'offsets' must rise from 0, by 1 or more at each step")
