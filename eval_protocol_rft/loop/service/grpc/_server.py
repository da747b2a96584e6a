"""`gateway.Gateway`: the control plane's second face, over gRPC, on the loop of the first.

Invariant: a method is answered by the same `ControlPlane.call` as its HTTP counterpart, with the
same refusals; it has no state and no rules of its own.
"""

from __future__ import annotations

import functools
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import grpc
import grpc.aio

from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._requests import RequestLog
from eval_protocol_rft.loop.service.control._control import UnknownEndpointError
from eval_protocol_rft.loop.service.grpc._transcoding import (
    METHODS,
    reply_from_http,
    request_to_http,
)

_log = logging.getLogger(__name__)

_SERVICE = "/gateway.Gateway/"
_GRACE_S = 2.0
"""For calls in flight when the server stops."""
_STATUS = {int(status.value[0]): status for status in grpc.StatusCode}


class Call(Protocol):
    """`ControlPlane.call`."""

    async def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: dict[str, Any] | None, /
    ) -> dict[str, Any]: ...


class GrpcServer:
    """A server that runs; made by `serve_grpc`."""

    def __init__(self, server: Any, host: str, port: int) -> None:
        self._server = server
        self.port = port
        self.address = f"{host}:{port}"
        """What clients take as FIREWORKS_GATEWAY_ADDR."""

    async def aclose(self) -> None:
        """Idempotent; calls in flight have a moment to end."""
        await self._server.stop(_GRACE_S)


async def serve_grpc(
    call: Call,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    log: RequestLog | None = None,
) -> GrpcServer:
    """Answer `gateway.Gateway` on the running loop, without TLS.

    Args:
        call: answers the HTTP counterpart of each method.
        host: a name or an address that does not contain a colon: clients split at it.
        port: 0: any that is free. Not 443, where clients want TLS.
        api_key: what clients send as `x-api-key`; None: anyone may call.
        log: gets every call.

    Raises:
        ValueError: the client cannot reach such a host or port.
        OSError: the port is taken.
    """
    if ":" in host or port == 443:
        raise ValueError(
            f"gRPC clients of the service cannot talk to {host}, port {port}: they split the "
            "address at its colon, and want TLS at port 443"
        )
    # Else a second server could listen on the same port, and each would get half of the calls.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((_Gateway(call, api_key, log),))
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{port}: {error}") from error
    await server.start()
    return GrpcServer(server, host, bound)


class _Gateway(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Takes every method, so that those which are not answered are seen too."""

    def __init__(self, call: Call, api_key: str | None, log: RequestLog | None) -> None:
        self._call = call
        self._api_key = api_key
        self._log = log

    def service(self, details: Any) -> Any:
        metadata = dict(details.invocation_metadata or ())
        answer = functools.partial(self._answer, details.method, metadata)
        return grpc.unary_unary_rpc_method_handler(answer)

    async def _answer(
        self, path: str, metadata: dict[str, Any], data: bytes, context: Any
    ) -> bytes:
        began, resource, reply = time.perf_counter(), "", b""
        refusal: ServiceError | None = None
        try:
            self._check_key(metadata)
            name = path.removeprefix(_SERVICE)
            if name not in METHODS:
                raise UnknownEndpointError(f"{path}: this server has no such method")
            http = request_to_http(name, data)
            if http is not None:
                resource = http.path.removeprefix("/v1/")
                answer = await self._call(http.verb, http.path, http.query, http.body)
                reply = reply_from_http(name, answer)
        except UnknownEndpointError as error:
            # Clients take NOT_FOUND for the answer to "is it there?".
            refusal = UnknownEndpointError(str(error), code=Code.UNIMPLEMENTED)
        except ServiceError as error:
            refusal = error
        except Exception as error:  # noqa: BLE001 -- a fault of this server is told, and logged
            _log.exception("%s failed", path)
            refusal = ServiceError(f"{path} failed in this server: {error!r}", code=Code.INTERNAL)
        if self._log is not None:
            self._log.write(
                method="gRPC",
                path=path,
                query=resource and f"name={resource}",
                status=200 if refusal is None else refusal.status,
                seconds=time.perf_counter() - began,
                user_agent=str(metadata.get("user-agent", "")),
                unanswered=isinstance(refusal, UnknownEndpointError),
            )
        if refusal is not None:
            await context.abort(_STATUS[int(refusal.code)], str(refusal))
        return reply

    def _check_key(self, metadata: Mapping[str, Any]) -> None:
        if self._api_key is None:
            return
        key = metadata.get("x-api-key") or str(metadata.get("authorization", "")).partition(" ")[2]
        if not hmac.compare_digest(str(key).encode(), self._api_key.encode()):
            raise ServiceError(
                "the API key is missing or wrong: send the server's --api-key as x-api-key",
                code=Code.UNAUTHENTICATED,
            )
