"""A local sampler whose weights are replaced while it serves.

Invariant: the weights and their name change together, between two tokens; a reload that is refused
changes neither. A completion that two sets of weights sampled says so, whatever they are called.

Weights in a folder, as safetensors: one file, or shards with an index.

Invariant: what is returned is the whole of what the folder says it holds, every value finite. A
folder that is incomplete, or names files outside itself, is refused.

The endpoints that change weights, in vLLM's words (development mode): `ep-rft serve --reloads`.

Invariant: a server that was not started for it answers 403 and changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.models import VERSION_KEY
from eval_protocol_rft.local.server._protocol import ApiError, json_reply, read_json_body
from eval_protocol_rft.sampling import Completion, RefusedError, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct, frozen=True):
    """What is read of an index."""

    weight_map: dict[str, str]


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Read `folder`, as transformers would: the single file where there is one, else the shards.

    Returns:
        All weights, and what to call them: the name in the files' metadata, else one made of the
        content, so that the same weights have the same, however they are sharded.

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
        tensors, metadata = _read(folder / name)
        if missing := sorted(expected - tensors.keys()):
            raise RefusedError(
                f"{name} in {str(folder)!r} lacks {_first(missing)}, which {_INDEX} says it has: "
                "was the folder written to its end?"
            )
        weights |= tensors
        versions.add(metadata.get(VERSION_KEY, ""))
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RefusedError(f"{name} in {str(folder)!r} has values that are not finite")
    named = versions.pop() if len(versions) == 1 else ""
    return weights, named or _content_name(weights)


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


FIRST_VERSION = "initial"
"""The name of the weights that the server began with."""


class ReloadingSampler:
    """A `Sampler` that reads new weights from a folder.

    Args:
        sampler: nobody else's, with a name for its weights: they change.
    """

    def __init__(self, sampler: LocalSampler) -> None:
        if sampler.policy_version is None:
            raise ValueError("the sampler must name its weights: pass policy_version=")
        self._sampler = sampler
        # The sampler knows weights by a key that no reload shares, so that giving weights another
        # name is no new version of them.
        self._names: dict[str | None, str] = {sampler.policy_version: sampler.policy_version}
        self._keys = count(1)
        self._one_at_a_time = asyncio.Lock()

    @property
    def version(self) -> str:
        """The name of the weights that sample now."""
        return self._names[self._sampler.policy_version]

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        """As `LocalSampler.sample`; versions are named as they are called when it ends."""
        completion = await self._sampler.sample(prompt_ids, params, seed=seed)
        name = self._names[completion.policy_version]
        first = None
        if completion.first_policy_version is not None:
            first = self._names[completion.first_policy_version]
            if first == name:
                first = f"{first}-replaced"
        return replace(completion, policy_version=name, first_policy_version=first)

    async def reload(self, folder: Path) -> str:
        """Sample with the weights in `folder` from here on; what is being sampled goes on with
        them. Returns their name: that in the files, else one made of their content.

        Raises:
            RefusedError: they cannot be read, or are not this model's. Nothing is changed then.
        """
        async with self._one_at_a_time:
            weights, version = await asyncio.to_thread(read_checkpoint, folder)
            await asyncio.to_thread(_check_tied, self._sampler.model.state_dict(), weights)
            key = f"{FIRST_VERSION}+{next(self._keys)}"
            self._names[key] = version
            try:
                await self._sampler.load_weights(weights, policy_version=key)
            except RefusedError:
                del self._names[key]
                raise
            return version

    async def rename(self, version: str) -> None:
        """Call the weights that sample now `version`."""
        async with self._one_at_a_time:
            self._names[self._sampler.policy_version] = version

    async def aclose(self) -> None:
        await self._sampler.aclose()


def _check_tied(current: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Tensors that are one in the model may come several times, but not as several."""
    first_of: dict[int, str] = {}
    for name, value in current.items():
        if name not in weights:
            continue
        first = first_of.setdefault(value.data_ptr(), name)
        if first != name and not weights[first].equal(weights[name]):
            raise RefusedError(
                f"{first} and {name} differ, and this model's are tied: they are one tensor"
            )


_T = TypeVar("_T")


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `reload_weights`."""

    weights_path: Annotated[str, Meta(min_length=1)]


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of `/collective_rpc`."""

    method: Literal["reload_weights"]
    kwargs: _Place
    args: Annotated[list[Any], Meta(max_length=0)] = []
    timeout: float | None = None
    """Accepted and set aside: reading takes as long as it takes."""


class _Name(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of `/update_weight_version`."""

    new_version: Annotated[str, Meta(min_length=1, max_length=200)]


class WeightEndpoints:
    """`sampler` is None where the server takes no new weights."""

    def __init__(self, sampler: ReloadingSampler | None) -> None:
        self._given = sampler

    def routes(self) -> list[Route]:
        return [
            Route("/collective_rpc", self.collective_rpc, methods=["POST"]),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
            Route("/update_weight_version", self.update_weight_version, methods=["POST"]),
        ]

    async def collective_rpc(self, http: Request) -> Response:
        sampler = self._sampler
        call = await _body(http, _Call)
        await sampler.reload(Path(call.kwargs.weights_path))
        return json_reply({"results": [None]})

    async def reset_prefix_cache(self, http: Request) -> Response:
        """Nothing to forget: what sessions keep between turns went when the weights changed."""
        _ = self._sampler
        return json_reply({"success": True})

    async def update_weight_version(self, http: Request) -> Response:
        sampler = self._sampler
        version = (await _body(http, _Name)).new_version
        await sampler.rename(version)
        return json_reply({"success": True, "new_version": version})

    @property
    def _sampler(self) -> ReloadingSampler:
        if self._given is None:
            raise ApiError(
                "this server takes no new weights: start it with `ep-rft serve --reloads`",
                status=HTTPStatus.FORBIDDEN,
            )
        return self._given


async def _body(http: Request, kind: type[_T]) -> _T:
    """The request's body.

    Raises:
        ApiError: 400, it is not JSON of that kind; and as `read_json_body`.
    """
    body = await read_json_body(http)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"{http.url.path}: {error}") from error
