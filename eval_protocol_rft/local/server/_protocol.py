"""What `/v1/completions` takes, in Fireworks' words. Pure.

Invariant: no field is ignored if it could change a token. A request field is used, handed to the
sampler to judge, or refused by name; what is accepted and set aside (`user`, cache keys, metadata)
only labels the request. JSON null means "not given" everywhere.

How the server says no: a status and a body in Fireworks' form.

Only an unknown model is answered with "Model not found": Fireworks' clients take those words for a
deployment that is still starting, and wait.

What one request may take of the server, and giving it back afterwards.

Invariant: nothing that a web page may send without the server's leave is read as a request; a body
is read no further than its bound; a server that is left alone holds no memory of what it did.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.sampling import FailureKind, SamplingError, SamplingParams

_STATUS_OF_FAILURE: Mapping[FailureKind, HTTPStatus] = {
    "refused": HTTPStatus.BAD_REQUEST,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
}


class ApiError(EvalProtocolRftError):
    """A request that gets an error reply: status, body in Fireworks' form, perhaps Retry-After."""

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`code`: default the status's name; of 400, that of the kind."""
        super().__init__(message)
        self.status = status
        bad = status == HTTPStatus.BAD_REQUEST
        self.code = code or ("invalid_request_error" if bad else HTTPStatus(status).name)
        self.retry_after = retry_after

    @classmethod
    def from_sampling(cls, error: SamplingError) -> ApiError:
        """The reply to a completion that could not be had, by the kind of its failure."""
        status = _STATUS_OF_FAILURE.get(error.kind, HTTPStatus.INTERNAL_SERVER_ERROR)
        return cls(str(error), status=status, retry_after=error.retry_after)

    @classmethod
    def unknown_model(cls, model: str, *, served: Iterable[str]) -> ApiError:
        return cls(
            "Model not found, inaccessible, and/or not deployed: "
            f"{model!r}; this server has {', '.join(map(repr, served)) or 'none'}",
            status=HTTPStatus.NOT_FOUND,
        )

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"object": "error", "type": kind, "code": self.code, "message": str(self)}
        return msgspec.json.encode({"error": fields})


def error_reply(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """`error` as a reply, with these headers beside its own."""
    retry = {"retry-after": str(math.ceil(error.retry_after))} if error.retry_after else {}
    return Response(
        error.body(),
        status_code=error.status,
        media_type="application/json",
        headers={**(headers or {}), **retry},
    )


def json_reply(value: Any, *, headers: Mapping[str, str] | None = None) -> Response:
    """Any value as a reply."""
    return Response(msgspec.json.encode(value), media_type="application/json", headers=headers)


MAX_CHOICES = 1024
"""Completions in one reply, prompts times n: a reply is held whole before any of it is sent."""

DEFAULT_MAX_TOKENS = 256
"""Sampled when a request names no limit; lowered where the context leaves less."""

_TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_StopString: TypeAlias = Annotated[str, Meta(min_length=1)]

_SAMPLER_FIELDS: Mapping[str, Any] = {
    "ignore_eos": False,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "mirostat_target": None,
    "mirostat_lr": None,
}
"""Fields that change what is drawn, with the value that changes nothing. Any other value goes to
the sampler in `SamplingParams.extra`; a sampler that does not know it refuses."""

_UNSUPPORTED_FIELDS: Mapping[str, Any] = {
    "echo": False,
    "echo_last": 0,
    "top_logprobs": 0,
    "images": [],
    "response_format": {"type": "text"},
    "reasoning_effort": None,
    "reasoning_history": None,
    "thinking": None,
    "speculation": None,
    "prediction": None,
}
"""Fields of Fireworks' that a `Sampler` has no means to honour, with the value that asks for
nothing. They need prompt logprobs, alternatives, grammars or images."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's. The last chunk carries `usage` whatever this says, as Fireworks' does."""

    include_usage: bool | None = None


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One `/v1/completions` body. Sampling defaults are the full distribution (temperature 1,
    top_p 1, top_k off), not a model's generation_config."""

    model: str
    prompt: str | list[_TokenId | str | list[_TokenId]]
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    context_length_exceeded_behavior: Literal["truncate", "error"] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=100)] | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=4)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=5)] | None = None
    """True: `content[]`. An integer: the legacy format, holding the sampled token alone."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """vLLM's: tokens of `logprobs` are written as `token_id:7`, not as their text."""
    raw_output: bool | None = None
    perf_metrics_in_response: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1)] | None = None
    """vLLM's: most tokens of one chunk of a stream."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_isolation_key: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None

    ignore_eos: bool | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    mirostat_target: float | None = None
    mirostat_lr: float | None = None

    echo: bool | None = None
    echo_last: Annotated[int, Meta(ge=0)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    images: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | int | bool | None = None
    reasoning_history: str | None = None
    thinking: dict[str, Any] | None = None
    speculation: str | list[int] | None = None
    prediction: Any = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts asked for, one or many; each is text or token ids.

        Raises:
            ApiError: there is none, kinds are mixed, or they make more than `MAX_CHOICES`
                completions.
        """
        given = self.prompt
        if self._is_one_prompt():
            return [given]  # type: ignore[list-item]  # checked: a string or integers only
        if self.choices() > MAX_CHOICES:
            raise ApiError(
                f"{len(given)} prompts with n={self.n or 1} make {self.choices()} completions, and "
                f"one request may have {MAX_CHOICES}: send several requests, field: 'prompt'"
            )
        if not given or not all(type(item) is type(given[0]) for item in given):
            raise ApiError(
                "Expected text, token ids, or a list of either with at least one entry and of one "
                "kind, field: 'prompt'"
            )
        return given  # type: ignore[return-value]  # checked: strings only, or lists only

    def choices(self) -> int:
        """Completions asked for: prompts times n."""
        return (1 if self._is_one_prompt() else len(self.prompt)) * (self.n or 1)

    def _is_one_prompt(self) -> bool:
        given = self.prompt
        return isinstance(given, str) or (bool(given) and all(type(i) is int for i in given))

    def sampling_params(self, *, prompt_tokens: int, context_length: int | None) -> SamplingParams:
        """How to sample a prompt of `prompt_tokens` tokens.

        Raises:
            ApiError: the prompt is empty or leaves no room in `context_length` tokens, or
                `max_tokens` does not fit and the request wants an error then.
        """
        stop = self.stop or ()
        return SamplingParams(
            model=self.model,
            max_tokens=self._token_limit(prompt_tokens, context_length),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            extra={
                name: value
                for name, neutral in _SAMPLER_FIELDS.items()
                if (value := getattr(self, name)) not in (None, neutral)
            },
        )

    def _token_limit(self, prompt_tokens: int, context_length: int | None) -> int:
        asked = self.max_tokens or self.max_completion_tokens
        limit = asked or DEFAULT_MAX_TOKENS
        if not prompt_tokens:
            raise ApiError("The prompt is empty: it has no tokens, field: 'prompt'")
        if context_length is None:
            return limit
        room = context_length - prompt_tokens
        if room < 1:
            raise ApiError(
                f"The prompt is too long: {prompt_tokens} tokens, and the context of "
                f"{context_length} must hold at least one more, field: 'prompt'"
            )
        if asked and asked > room and self.context_length_exceeded_behavior == "error":
            raise ApiError(
                f"{prompt_tokens} prompt tokens and max_tokens {asked} exceed the context of "
                f"{context_length} tokens, field: 'max_tokens'"
            )
        return min(limit, room)


def read_object(body: bytes) -> dict[str, Any]:
    """A body of JSON.

    Raises:
        ApiError: 400, it is no JSON object.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"The request body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError("The request body must be a JSON object")
    return fields


def parse_request(body: bytes) -> CompletionRequest:
    """Read and check one request body.

    Raises:
        ApiError: 400, naming the field that is unknown, missing, mistyped or out of range.
    """
    fields = read_object(body)
    for name in fields:
        if name not in CompletionRequest.__struct_fields__:
            raise ApiError(f"Extra inputs are not permitted, field: '{name}'")
    try:
        request = msgspec.convert(fields, CompletionRequest)
    except msgspec.ValidationError as error:
        raise ApiError(_naming_the_field(str(error))) from error
    for name, neutral in _UNSUPPORTED_FIELDS.items():
        if getattr(request, name) not in (None, neutral):
            raise ApiError(f"Not supported by this server, leave it out, field: '{name}'")
    if request.max_tokens and request.max_completion_tokens:
        raise ApiError(
            "max_tokens and max_completion_tokens mean the same, give one, "
            "field: 'max_completion_tokens'"
        )
    return request


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index` of a prompt. Choice 0 keeps `seed`, so it equals the n=1 result;
    the others' are hashed from (seed, index), so that neighbouring seeds share no choice."""
    if seed is None or index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _naming_the_field(problem: str) -> str:
    """msgspec says "... - at `$.stop[1]`"; Fireworks says "..., field: 'stop'"."""
    what, _, where = problem.partition(" - at `$.")
    return f"{what}, field: '{where.rstrip('`')}'" if where else problem


MAX_BODY_BYTES = 8 * 2**20
"""A prompt of a million token ids, and then some."""


async def read_json_body(http: Request) -> bytes:
    """The body of a request that says it is JSON.

    Raises:
        ApiError: 415, it does not say so; 413, it has more than `MAX_BODY_BYTES`.
        ClientDisconnect: the client went away before the end.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            "send JSON, with the header 'content-type: application/json'",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    chunks, size = [], 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                f"the body has more than {MAX_BODY_BYTES} bytes: send fewer prompts in one request",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                code="REQUEST_ENTITY_TOO_LARGE",
            )
        chunks.append(chunk)
    return b"".join(chunks)


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can (glibc): it keeps the freed parts
    of every thread's heap otherwise, and a server that is left alone would hold them for ever."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
