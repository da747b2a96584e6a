"""Weights in a folder, as safetensors: one file, or shards with an index.

Invariant: what is returned is the whole of what the folder says it holds, every value finite. A
folder that is incomplete, or names files outside itself, is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.sampling.types import RefusedError

if TYPE_CHECKING:
    from torch import Tensor

VERSION_KEY = "weight_version"
"""In a file's metadata: what to call the weights. Readers that do not know it pass over it."""
_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct, frozen=True):
    """What is read of an index."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All weights of one folder."""

    weights: dict[str, Tensor]
    version: str
    """The name in the files' metadata, else one made of the content: the same weights have the
    same, however they are sharded."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read `folder`, as transformers would: the single file where there is one, else the shards.

    Raises:
        RefusedError: there are no weights, or not all that the index names, or some that cannot
            be read or are not finite.
    """
    # Not Path's own: a path that is too long, or not ours to look at, is an error there.
    if not os.path.isdir(folder):
        raise RefusedError(f"{str(folder)!r} is no folder on the machine of this server")
    weights: dict[str, Tensor] = {}
    versions: set[str] = set()
    for name, expected in _files(folder).items():
        found, metadata = _read(folder / name)
        if missing := sorted(expected - found.keys()):
            raise RefusedError(
                f"{name} in {str(folder)!r} lacks {_first(missing)}, which {_INDEX} says it has: "
                "was the folder written to its end?"
            )
        weights |= found
        versions.add(metadata.get(VERSION_KEY, ""))
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RefusedError(f"{name} in {str(folder)!r} has values that are not finite")
    named = versions.pop() if len(versions) == 1 else ""
    return Checkpoint(weights, named or _content_name(weights))


def _files(folder: Path) -> dict[str, set[str]]:
    """Files to read, with the tensors that each must have as far as an index tells."""
    if os.path.isfile(folder / _FILE):
        return {_FILE: set()}
    try:
        index = msgspec.json.decode((folder / _INDEX).read_bytes(), type=_Index)
    except FileNotFoundError as error:
        raise RefusedError(f"{str(folder)!r} has neither {_FILE} nor {_INDEX}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise RefusedError(f"cannot read {_INDEX} in {str(folder)!r}: {error}") from error
    files: dict[str, set[str]] = {}
    for tensor, name in index.weight_map.items():
        if name != Path(name).name:
            raise RefusedError(f"{_INDEX} names {name!r}: shards must lie in the same folder")
        files.setdefault(name, set()).add(tensor)
    if not files:
        raise RefusedError(f"{_INDEX} in {str(folder)!r} names no tensor")
    return files


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"cannot read {str(path)!r}: {error}") from error


def _content_name(weights: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"weights-{digest.hexdigest()}"


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
