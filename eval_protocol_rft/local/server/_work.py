"""One request on its way from its prompts to its reply.

Invariant: nothing is sent before every completion of a request is there, so a reply has all its
choices, and an error its own status, for streams too.

Work that runs only for as long as somebody waits for it.

Invariant: when the client goes away or the server stops, the work is cancelled, and its end is
awaited before anything else is done.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.server import _protocol as protocol
from eval_protocol_rft.local.server import _reply_bodies as replies
from eval_protocol_rft.local.server._protocol import ApiError, CompletionRequest, json_reply
from eval_protocol_rft.local.server._reply_bodies import Json
from eval_protocol_rft.sampling import Completion, Sampler, SamplingError

_MAX_CHARACTERS_PER_TOKEN = 32
"""Of a whole text, on average: prose has four, deeply indented code ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What answers the requests that name one model."""

    name: str
    """What replies call it."""
    sampler: Sampler
    """Makes the completions; concurrent requests reach it concurrently."""
    tokenizer: LoadedTokenizer
    """Encodes text prompts and spells sampled ids."""
    context_length: int | None
    """Most tokens of prompt and completion together, None where unknown."""


class ReplyForm(Protocol):
    """How an endpoint writes what was sampled: `_reply_bodies` is that of completions."""

    def head(self, model: str) -> Json:
        """What the reply, and every chunk of one, begins with."""

    def whole_reply(
        self,
        head: Json,
        request: CompletionRequest,
        samples: Sequence[replies.Sampled],
        metrics: dict[str, str],
    ) -> Json:
        """All choices in one body; `samples` are ordered prompt by prompt."""

    def chunks(
        self,
        head: Json,
        request: CompletionRequest,
        samples: Sequence[replies.Sampled],
        metrics: dict[str, str],
    ) -> Iterable[Json]:
        """The same in pieces."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request on its way from its prompts to its reply."""

    http: Request
    request: CompletionRequest
    model: ServedModel
    form: ReplyForm
    started: float
    in_flight: int = field(kw_only=True)

    async def reply(self) -> Response:
        # Text of a million characters takes seconds to encode and a reply of a hundred thousand
        # tokens to write: others are answered meanwhile.
        prompts = await asyncio.to_thread(self._prompts)
        completions = await self._sample(prompts)
        return await asyncio.to_thread(self._answer, prompts, completions)

    def _prompts(self) -> list[replies.Prompt]:
        return [self._prompt(given) for given in self.request.prompts()]

    def _prompt(self, given: str | list[int]) -> replies.Prompt:
        tokenizer = self.model.tokenizer
        if isinstance(given, str):
            check_length(len(given), self.model.context_length, field="prompt")
            ids, text = list(tokenizer.tokenizer.encode(given)), given
        else:
            ids, text = given, tokenizer.decode(given)
        params = self.request.sampling_params(
            prompt_tokens=len(ids), context_length=self.model.context_length
        )
        return replies.Prompt(token_ids=ids, text=text, params=params)

    async def _sample(self, prompts: Iterable[replies.Prompt]) -> list[Completion]:
        """Sample n completions of each prompt at once, ordered prompt by prompt. The first failure
        cancels the others: a reply has all its choices or none."""
        jobs = [
            (prompt, protocol.choice_seed(self.request.seed, index))
            for prompt in prompts
            for index in range(self.request.n or 1)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(prompt, seed)) for prompt, seed in jobs]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, prompt: replies.Prompt, seed: int | None) -> Completion:
        return await self.model.sampler.sample(prompt.token_ids, prompt.params, seed=seed)

    def _answer(self, prompts: list[replies.Prompt], completions: list[Completion]) -> Response:
        request, form = self.request, self.form
        each = [prompt for prompt in prompts for _ in range(request.n or 1)]
        samples = [
            replies.Sampled(
                prompt=prompt,
                completion=completion,
                spelling=replies.spell(self.model.tokenizer, completion, prompt.params),
            )
            for prompt, completion in zip(each, completions, strict=True)
        ]
        seconds = time.perf_counter() - self.started
        metrics = replies.perf_metrics(samples, request, seconds=seconds, in_flight=self.in_flight)
        head = form.head(self.model.name)
        headers = request_id(self.http)
        if request.stream:
            events = [
                b"data: %b\n\n" % msgspec.json.encode(chunk)
                for chunk in form.chunks(head, request, samples, metrics)
            ]
            return StreamingResponse(
                _each([*events, b"data: [DONE]\n\n"]),
                media_type="text/event-stream",
                headers=headers | {"cache-control": "no-cache"},
            )
        headers |= {f"fireworks-{name}": value for name, value in metrics.items()}
        return json_reply(form.whole_reply(head, request, samples, metrics), headers=headers)


def check_length(characters: int, context_length: int | None, *, field: str) -> None:
    """Refuse what would be encoded in vain: a million characters take a gigabyte.

    Raises:
        ApiError: no context of that length takes so long a text.
    """
    if context_length is None:
        return
    bound = _MAX_CHARACTERS_PER_TOKEN * context_length
    if characters > bound:
        raise ApiError(
            f"The prompt is too long: {characters} characters, and a context of {context_length} "
            f"tokens takes no text beyond {bound}; send token ids if they do fit, field: '{field}'"
        )


async def _each(events: Iterable[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event


def request_id(http: Request) -> dict[str, str]:
    return {"x-request-id": http.headers.get("x-request-id") or uuid.uuid4().hex}


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
