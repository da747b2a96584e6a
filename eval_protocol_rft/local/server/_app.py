"""The ASGI application: any `Sampler` behind Fireworks' completion endpoints.

Invariant: nothing is sent before every completion of a request is there, so a reply has all its
choices, and an error its own status, for streams too.

Work that runs only for as long as somebody waits for it.

Invariant: when the client goes away or the server stops, the work is cancelled, and its end is
awaited before anything else is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.models import LOCAL_PREFIX
from eval_protocol_rft.local.server import _protocol as protocol
from eval_protocol_rft.local.server import _reply_bodies as replies
from eval_protocol_rft.local.server._protocol import ApiError, CompletionRequest, json_reply
from eval_protocol_rft.local.server._weights import ReloadingSampler, WeightEndpoints
from eval_protocol_rft.sampling import Completion, Sampler, SamplingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")


async def while_wanted(
    work: Coroutine[Any, Any, _T], *, http: Request, stopping: asyncio.Event
) -> _T:
    """Run `work` for a request whose body was read.

    Raises:
        ClientDisconnect: the client closed the connection first.
        SamplingError: of kind `unavailable`, `stopping` was set first.
    """
    working = asyncio.ensure_future(work)
    watching = [
        asyncio.ensure_future(_client_leaves(http)),
        asyncio.ensure_future(_server_stops(stopping)),
    ]
    try:
        done, _ = await asyncio.wait([working, *watching], return_when=asyncio.FIRST_COMPLETED)
        return await (working if working in done else done.pop())
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _client_leaves(http: Request) -> NoReturn:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _server_stops(stopping: asyncio.Event) -> NoReturn:
    await stopping.wait()
    raise SamplingError("the server is shutting down", kind="unavailable")


_LARGE_REQUEST = 64
"""Completions of a request after which memory is given back, where no other is in flight."""

_MAX_CHARACTERS_PER_TOKEN = 32
"""Of a whole text, on average: prose has four, deeply indented code ten."""

_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a reply that nobody will read."""

logger = logging.getLogger(__name__)


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
    service = _Service(sampler, LoadedTokenizer.wrap(tokenizer), model_name, context_length)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await sampler.aclose()

    app = Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/inference/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/inference/v1/models", service.models),
            Route("/health", service.health),
            *weights.routes(),
        ],
        exception_handlers={
            ApiError: _answer_error,
            SamplingError: _answer_error,
            HTTPException: _answer_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_error,
        },
        lifespan=lifespan,
    )
    app.state.stopping = service.stopping
    return app


class _Service:
    """The endpoints. State: requests in flight, and whether the server is stopping."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: LoadedTokenizer,
        model_name: str,
        context_length: int | None,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._context_length = context_length
        self._created = int(time.time())
        self._in_flight = 0
        self.stopping = asyncio.Event()

    async def health(self, http: Request) -> Response:
        return json_reply({"status": "ok", "model": self._model_name})

    async def models(self, http: Request) -> Response:
        model = {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "eval-protocol-rft",
            "supports_chat": False,
            "context_length": self._context_length,
        }
        return json_reply({"object": "list", "data": [model]})

    async def completions(self, http: Request) -> Response:
        started = time.perf_counter()
        request = protocol.parse_request(await protocol.read_json_body(http))
        if not self._serves(request.model):
            raise ApiError.unknown_model(request.model, served=self._model_name)
        self._in_flight += 1
        try:
            return await while_wanted(
                self._reply(http, request, started, self._in_flight),
                http=http,
                stopping=self.stopping,
            )
        finally:
            self._in_flight -= 1
            if not self._in_flight and request.choices() >= _LARGE_REQUEST:
                asyncio.get_running_loop().run_in_executor(None, protocol.give_memory_back)

    def _serves(self, model: str) -> bool:
        """`local/` is no part of a name: our clients sample what begins with it themselves."""
        return model.removeprefix(LOCAL_PREFIX) == self._model_name.removeprefix(LOCAL_PREFIX)

    async def _reply(
        self, http: Request, request: CompletionRequest, started: float, in_flight: int
    ) -> Response:
        # Text of a million characters takes seconds to encode and a reply of a hundred thousand
        # tokens to write: others are answered meanwhile.
        prompts = await asyncio.to_thread(self._prompts, request)
        completions = await self._sample(request, prompts)
        return await asyncio.to_thread(
            self._answer, http, request, prompts, completions, started, in_flight
        )

    def _prompts(self, request: CompletionRequest) -> list[replies.Prompt]:
        return [self._prompt(request, given) for given in request.prompts()]

    def _prompt(self, request: CompletionRequest, given: str | list[int]) -> replies.Prompt:
        if isinstance(given, str):
            self._check_length(given)
            ids, text = list(self._tokenizer.tokenizer.encode(given)), given
        else:
            ids, text = given, self._tokenizer.decode(given)
        params = request.sampling_params(
            prompt_tokens=len(ids), context_length=self._context_length
        )
        return replies.Prompt(token_ids=ids, text=text, params=params)

    def _check_length(self, text: str) -> None:
        """Refuse what would be encoded in vain: a million characters take a gigabyte."""
        if self._context_length is None:
            return
        bound = _MAX_CHARACTERS_PER_TOKEN * self._context_length
        if len(text) > bound:
            raise ApiError(
                f"The prompt is too long: {len(text)} characters, and a context of "
                f"{self._context_length} tokens takes no text beyond {bound}; send token ids if "
                "they do fit, field: 'prompt'"
            )

    async def _sample(
        self, request: CompletionRequest, prompts: Iterable[replies.Prompt]
    ) -> list[Completion]:
        """Sample n completions of each prompt at once, ordered prompt by prompt. The first failure
        cancels the others: a reply has all its choices or none."""
        jobs = [
            (prompt, protocol.choice_seed(request.seed, index))
            for prompt in prompts
            for index in range(request.n or 1)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(prompt, seed)) for prompt, seed in jobs]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, prompt: replies.Prompt, seed: int | None) -> Completion:
        return await self._sampler.sample(prompt.token_ids, prompt.params, seed=seed)

    def _answer(
        self,
        http: Request,
        request: CompletionRequest,
        prompts: list[replies.Prompt],
        completions: list[Completion],
        started: float,
        in_flight: int,
    ) -> Response:
        each = [prompt for prompt in prompts for _ in range(request.n or 1)]
        samples = [
            replies.Sampled(
                prompt=prompt,
                completion=completion,
                spelling=replies.spell(self._tokenizer, completion, prompt.params),
            )
            for prompt, completion in zip(each, completions, strict=True)
        ]
        seconds = time.perf_counter() - started
        metrics = replies.perf_metrics(samples, request, seconds=seconds, in_flight=in_flight)
        head = replies.head(self._model_name)
        headers = _request_id(http)
        if request.stream:
            events = [
                b"data: %b\n\n" % msgspec.json.encode(chunk)
                for chunk in replies.chunks(head, request, samples, metrics)
            ]
            return StreamingResponse(
                _each([*events, b"data: [DONE]\n\n"]),
                media_type="text/event-stream",
                headers=headers | {"cache-control": "no-cache"},
            )
        headers |= {f"fireworks-{name}": value for name, value in metrics.items()}
        return json_reply(replies.whole_reply(head, request, samples, metrics), headers=headers)


async def _each(events: Iterable[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event


def _request_id(http: Request) -> dict[str, str]:
    return {"x-request-id": http.headers.get("x-request-id") or uuid.uuid4().hex}


async def _answer_error(http: Request, error: Exception) -> Response:
    """Any failure as an error body of Fireworks' form."""
    headers = _request_id(http)
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
