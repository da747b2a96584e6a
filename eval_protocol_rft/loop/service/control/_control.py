"""The control plane: one table of routes, and HTTP in front of it.

Invariant: every request is answered, with what a client reads or with a refusal in the service's
form; whatever a client sends, the server lives. HTTP and gRPC ask the same `call`, so they say the
same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft.loop.service import _names as names
from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._requests import UNANSWERED
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import Weights
from eval_protocol_rft.loop.service.control._datasets import MAX_UPLOAD_BYTES, Datasets
from eval_protocol_rft.loop.service.control._deployments import Deployments
from eval_protocol_rft.loop.service.control._jobs import Jobs
from eval_protocol_rft.loop.service.control._models import Models
from eval_protocol_rft.loop.service.control._resources import Call, Handler
from eval_protocol_rft.loop.service.control._steps import StepRunner
from eval_protocol_rft.loop.service.inference._hot_load import Served

_METHODS = ["GET", "POST", "PATCH", "PUT", "DELETE"]
_PREFIXES = ("/v1", "/inference/v1")
"""A client whose base URL ends in `/inference` asks for everything below that."""

logger = logging.getLogger(__name__)


class UnknownEndpointError(ServiceError):
    """A request that no endpoint answers."""


class ControlPlane:
    """The resources of the one account.

    Args:
        store: all that is remembered.
        weights: the models.
        served: told of new weights of deployments.
        say: takes a line of every state that changes.
        drop_job: told the id of a job in service mode that is deleted.
        url: under which clients reach this server, where a request does not tell.
    """

    def __init__(
        self,
        store: Store,
        weights: Weights,
        served: Served,
        *,
        say: Callable[[str], None],
        drop_job: Callable[[str], None] = lambda job: None,
        url: str = "",
    ) -> None:
        self.url = url
        self._models = Models(store, weights, say)
        self._datasets = Datasets(store, say)
        self._deployments = Deployments(store, self._models, served, say)
        self._steps = StepRunner(store, weights, self._datasets, self._models, say)
        self._jobs = Jobs(store, weights, self._models, self._steps, drop_job, say)
        groups = (self._models, self._datasets, self._deployments, self._jobs)
        self._routes = [
            (method, re.compile(re.escape(path).replace(r"\*", "[^/:]+")), handler)
            for group in groups
            for method, path, handler in group.routes
        ]

    def resume(self) -> None:
        """Go on with what was under way when the last process ended. Needs a running loop."""
        self._steps.resume()

    async def aclose(self) -> None:
        """Stop what is under way; `resume` goes on with it."""
        await self._steps.aclose()

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        base_url: str | None = None,
    ) -> dict[str, Any]:
        """Answer one request.

        Args:
            method: of HTTP.
            path: `/v1/accounts/acc/...`; `/v1/` may be left out.
            query: of the URL.
            body: the JSON form of the message.
            base_url: under which this client reaches the server; default: `url`.

        Raises:
            ServiceError: it is refused.
        """
        path = path.strip("/").removeprefix("v1/")
        handler = self._handler(method, path)
        if handler is None:
            raise UnknownEndpointError(f"no endpoint: {method} /v1/{path}", code=Code.NOT_FOUND)
        name = re.sub(r":[^/]*$", "", path)
        _check_account(method, name)
        return await handler(Call(name, query or {}, body or {}, base_url or self.url))

    def _handler(self, method: str, path: str) -> Handler | None:
        for wanted, pattern, handler in self._routes:
            if wanted == method and pattern.fullmatch(path):
                return handler
        return None

    # HTTP

    def routes(self) -> list[Route]:
        return [
            *(
                Route(f"{prefix}/{path}", self._answer, methods=_METHODS)
                for prefix in _PREFIXES
                for path in ("accounts", "accounts/{rest:path}")
            ),
            Route("/uploads/{key}/{token}", self._receive, methods=["PUT"]),
            Route("/downloads/{key}/{token}", self._send, methods=["GET"]),
            Route("/verifyApiKey", self._verify_key, methods=["GET"]),
        ]

    async def _answer(self, http: Request) -> Response:
        path = "/" + http.url.path.partition("/v1/")[2]
        try:
            if http.method == "POST" and path.endswith(":upload"):
                answer = await self._upload(http, path)
            else:
                answer = await self.call(
                    http.method,
                    path,
                    dict(http.query_params),
                    _read(await http.body()),
                    base_url=str(http.base_url).rstrip("/"),
                )
        except ServiceError as error:
            if isinstance(error, UnknownEndpointError):
                http.scope[UNANSWERED] = True
            return JSONResponse(error.body(), status_code=error.status)
        except (ClientDisconnect, HTTPException):
            raise
        except Exception as error:
            logger.exception("%s %s", http.method, http.url.path)
            fault = ServiceError(
                f"{type(error).__name__} in the server; its log has the traceback",
                code=Code.INTERNAL,
            )
            return JSONResponse(fault.body(), status_code=fault.status)
        return JSONResponse(answer)

    async def _upload(self, http: Request, path: str) -> dict[str, Any]:
        name = path.strip("/").removesuffix(":upload")
        if not re.fullmatch(r"accounts/[^/:]+/datasets/[^/:]+", name):
            raise UnknownEndpointError(f"no endpoint: POST /v1{path}", code=Code.NOT_FOUND)
        _check_account("POST", name)
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ServiceError(":upload takes multipart/form-data with the field 'file'")
        # Or a body that never ends would fill the disk.
        if int(http.headers.get("content-length") or 0) > MAX_UPLOAD_BYTES + 2**20:
            raise ServiceError(
                f":upload takes {MAX_UPLOAD_BYTES} bytes; use :getUploadEndpoint for more"
            )
        try:
            form = await http.form(max_files=1)
        except HTTPException as error:
            raise ServiceError(f"the form cannot be read: {error.detail}") from None
        try:
            file = form.get("file")
            if file is None or isinstance(file, str):
                raise ServiceError("there is no file in the form's field 'file'")
            return await self._datasets.upload(name, file.filename or "", await file.read())
        finally:
            await form.close()

    async def _receive(self, http: Request) -> Response:
        key, token = http.path_params["key"], http.path_params["token"]
        try:
            await self._datasets.receive(key, token, http.stream())
        except ServiceError as error:
            return JSONResponse(error.body(), status_code=error.status)
        return Response()

    async def _send(self, http: Request) -> Response:
        try:
            path = self._datasets.file(http.path_params["key"], http.path_params["token"])
        except ServiceError as error:
            return JSONResponse(error.body(), status_code=error.status)
        return FileResponse(path, media_type="application/octet-stream")

    async def _verify_key(self, http: Request) -> Response:
        _, _, key = http.headers.get("authorization", "").partition(" ")
        if not (key.strip() or http.headers.get("x-api-key")):
            refusal = ServiceError("there is no API key", code=Code.UNAUTHENTICATED)
            return JSONResponse(refusal.body(), status_code=refusal.status)
        account = names.last(names.ACCOUNT)
        return JSONResponse({}, headers={"x-fireworks-account-id": account})


def _read(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        return {}
    try:
        # Not `json`, which reads what cannot be written again: NaN, infinity, half characters.
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ServiceError(f"the body is {str(body)[:80]!r}, no object")
    return body


def _check_account(method: str, name: str) -> None:
    account = "/".join(name.split("/")[:2])
    if account in ("accounts", names.ACCOUNT):
        return
    if account != names.PUBLIC_ACCOUNT:
        raise ServiceError(
            f"this key is of {names.ACCOUNT}, and may not see {account}",
            code=Code.PERMISSION_DENIED,
        )
    if method != "GET":
        raise ServiceError(
            f"this key is of {names.ACCOUNT}, and may change nothing of {account}",
            code=Code.PERMISSION_DENIED,
        )
