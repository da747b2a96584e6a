"""The endpoints that change weights, in vLLM's words (development mode): `ep-rft serve --reloads`.

Invariant: a server that was not started for it answers 403 and changes nothing.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft.server.bounds import read_json_body
from eval_protocol_rft.server.errors import ApiError
from eval_protocol_rft.server.reloading import ReloadingSampler

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
        return _json({"results": [None]})

    async def reset_prefix_cache(self, http: Request) -> Response:
        """Nothing to forget: no keys and values outlive the completions they were made for."""
        _ = self._sampler
        return _json({"success": True})

    async def update_weight_version(self, http: Request) -> Response:
        sampler = self._sampler
        version = (await _body(http, _Name)).new_version
        await sampler.rename(version)
        return _json({"success": True, "new_version": version})

    @property
    def _sampler(self) -> ReloadingSampler:
        if self._given is None:
            raise ApiError(
                "this server takes no new weights: start it with `ep-rft serve --reloads`",
                status=HTTPStatus.FORBIDDEN,
                code=HTTPStatus.FORBIDDEN.name,
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


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
