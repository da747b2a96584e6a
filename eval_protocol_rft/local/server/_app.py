"""The ASGI application: any `Sampler`, or many, behind Fireworks' completion endpoints.

Invariant: a request is answered by the model that it names, or refused in Fireworks' form; what
else a server has does not change it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.models import LOCAL_PREFIX
from eval_protocol_rft.local.server import _protocol as protocol
from eval_protocol_rft.local.server import _reply_bodies as replies
from eval_protocol_rft.local.server._protocol import ApiError, CompletionRequest, json_reply
from eval_protocol_rft.local.server._reply_bodies import Json
from eval_protocol_rft.local.server._weights import ReloadingSampler, WeightEndpoints
from eval_protocol_rft.local.server._work import (
    ReplyForm,
    ServedModel,
    Work,
    request_id,
    while_wanted,
)
from eval_protocol_rft.sampling import Sampler, SamplingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGE_REQUEST = 64
"""Completions of a request after which memory is given back, where no other is in flight."""

_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a reply that nobody will read."""

logger = logging.getLogger(__name__)


class ModelLookup(Protocol):
    """The models of a server."""

    async def find(self, name: str) -> ServedModel:
        """The model that a request names.

        Raises:
            ApiError: there is none of that name, or it cannot answer now.
        """

    async def listed(self) -> Iterable[Json]:
        """`id`, `created`, `supports_chat` and `context_length` of each model."""


def create_app(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    context_length: int | None = None,
) -> Starlette:
    """Serve `sampler` in Fireworks' shape.

    The application owns the sampler: it closes it when the server shuts down. Setting the event
    `app.state.stopping` answers 503 to every request in flight, and to every later one.

    Args:
        sampler: makes the completions; concurrent requests reach it concurrently. A
            `ReloadingSampler` may be given new weights over HTTP.
        tokenizer: encodes text prompts and spells sampled ids.
        model_name: the one model that requests may name, with or without `local/` in front.
        context_length: most tokens of prompt and completion together, None where unknown.
    """
    weights = WeightEndpoints(sampler if isinstance(sampler, ReloadingSampler) else None)
    model = ServedModel(
        name=model_name,
        sampler=sampler,
        tokenizer=LoadedTokenizer.wrap(tokenizer),
        context_length=context_length,
    )
    endpoints = CompletionEndpoints(_OneModel(model))

    async def health(http: Request) -> Response:
        return json_reply({"status": "ok", "model": model_name})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await sampler.aclose()

    app = Starlette(
        routes=[*endpoints.routes(), Route("/health", health), *weights.routes()],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.state.stopping = endpoints.stopping
    return app


class _OneModel:
    """The lookup of `ep-rft serve`."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._created = int(time.time())

    async def find(self, name: str) -> ServedModel:
        # `local/` is no part of a name: our clients sample what begins with it themselves.
        if name.removeprefix(LOCAL_PREFIX) != self._model.name.removeprefix(LOCAL_PREFIX):
            raise ApiError.unknown_model(name, served=[self._model.name])
        return self._model

    async def listed(self) -> Iterable[Json]:
        entry = {
            "id": self._model.name,
            "created": self._created,
            "supports_chat": False,
            "context_length": self._model.context_length,
        }
        return [entry]


class CompletionEndpoints:
    """Completions of the models that `models` finds. State: requests in flight, and whether the
    server is stopping.

    Any application may have them: `routes` are added to its own, with `EXCEPTION_HANDLERS`.
    """

    def __init__(self, models: ModelLookup) -> None:
        self.models = models
        self._in_flight = 0
        self.stopping = asyncio.Event()
        """Set: every request in flight, and every later one, is answered with 503."""

    def routes(self) -> list[Route]:
        """Each path with and without `/inference` in front, as clients' base URLs have it."""
        return [
            route
            for prefix in ("/v1", "/inference/v1")
            for route in (
                Route(f"{prefix}/completions", self.completions, methods=["POST"]),
                Route(f"{prefix}/models", self.list_models),
            )
        ]

    async def list_models(self, http: Request) -> Response:
        data = [
            {"id": one["id"], "object": "model", "owned_by": "eval-protocol-rft", **one}
            for one in await self.models.listed()
        ]
        return json_reply({"object": "list", "data": data})

    async def completions(self, http: Request) -> Response:
        started = time.perf_counter()
        request = protocol.parse_request(await protocol.read_json_body(http))
        model = await self.models.find(request.model)
        return await self.answer(http, request, model, replies, started)

    async def answer(
        self,
        http: Request,
        request: CompletionRequest,
        model: ServedModel,
        form: ReplyForm,
        started: float,
    ) -> Response:
        """Sample what a request asks for, while its client waits, and write it.

        Args:
            started: `time.perf_counter()` as the request came.
        """
        self._in_flight += 1
        work = Work(http, request, model, form, started, in_flight=self._in_flight)
        try:
            return await while_wanted(work.reply(), http=http, stopping=self.stopping)
        finally:
            self._in_flight -= 1
            if not self._in_flight and request.choices() >= _LARGE_REQUEST:
                asyncio.get_running_loop().run_in_executor(None, protocol.give_memory_back)


async def _answer_error(http: Request, error: Exception) -> Response:
    """Any failure as an error body of Fireworks' form."""
    headers = request_id(http)
    if isinstance(error, SamplingError):
        error = ApiError.from_sampling(error)
        if error.status == 500:
            logger.error("%s: %s", headers["x-request-id"], error)
    elif isinstance(error, HTTPException):
        where = f"{http.method} {http.url.path}"
        headers |= error.headers or {}
        error = ApiError(f"{error.detail}: {where}", status=error.status_code, code="NO_ROUTE")
    elif not isinstance(error, ApiError):
        error = ApiError(
            f"{type(error).__name__} in the server; its log has the traceback",
            status=500,
        )
        # Starlette raises it on, for the log, and uvicorn then closes the connection: unsaid, that
        # would be under the client's next request.
        headers["connection"] = "close"
    return protocol.error_reply(error, headers)


async def _answer_nobody(http: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


EXCEPTION_HANDLERS: Mapping[Any, Any] = {
    ApiError: _answer_error,
    SamplingError: _answer_error,
    HTTPException: _answer_error,
    ClientDisconnect: _answer_nobody,
    Exception: _answer_error,
}
"""Starlette's, for an application with `CompletionEndpoints`."""
