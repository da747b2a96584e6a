"""Requests whose replies are read for what else they say: of the prompt, and of the models.

A `Completion` holds nothing of the prompt: decoding refuses a wrong echo, but a right one and none
look the same to it. So one reply is looked at as it came.
"""

from __future__ import annotations

import aiohttp
import msgspec

from eval_protocol_rft.doctor.completion_checks import Echo
from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.sampling.bodies import read_body, reply_limit
from eval_protocol_rft.sampling.clock import Deadline
from eval_protocol_rft.sampling.http import NO_CLOCKS, endpoint_headers, proxy_for
from eval_protocol_rft.sampling.replies import ABSENT, parse_reply
from eval_protocol_rft.sampling.types import (
    ConnectionFailedError,
    ContractError,
    SamplingError,
    SamplingParams,
    TokenIds,
)
from eval_protocol_rft.sampling.wire import request_body

_MODELS_SECONDS = 10.0
_MODELS_BYTES = 4 << 20


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


async def ask_echo(endpoint: Endpoint, prompt: TokenIds, params: SamplingParams) -> Echo:
    """Ask for one token.

    Raises:
        SamplingError: no reply of a completion's shape came. No secret is in its message: it holds
            nothing that was sent.
    """
    url = f"{endpoint.base_url}/completions"
    try:
        async with (
            Deadline(params.timeout),
            aiohttp.ClientSession(
                headers={"content-type": "application/json", **endpoint_headers(endpoint)},
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session,
            session.post(
                url,
                data=request_body(prompt, params, None),
                timeout=NO_CLOCKS,
                allow_redirects=False,
                proxy=proxy_for(url),
            ) as response,
        ):
            if response.status != 200:
                raise ConnectionFailedError(f"HTTP {response.status}", status=response.status)
            body = await read_body(response, limit=reply_limit(prompt, params))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConnectionFailedError(type(error).__name__) from None
    reply = parse_reply(body)
    if not reply.choices:
        raise ContractError("the reply has no choices")
    choice = reply.choices[0]
    raw_output = ABSENT if choice.raw_output is None else choice.raw_output.prompt_token_ids
    told = choice.prompt_token_ids if choice.prompt_token_ids != ABSENT else raw_output
    try:
        ids = None if told == ABSENT else msgspec.json.decode(told, type=list[int])
    except msgspec.ValidationError:
        raise ContractError("prompt_token_ids are no list of integers") from None
    return Echo(ids, reply.usage.prompt_tokens if reply.usage else None)


async def served_models(endpoint: Endpoint) -> list[str]:
    """The models that the server names at `/models`, in its order; empty where it does not say."""
    url = f"{endpoint.base_url}/models"
    try:
        async with (
            Deadline(_MODELS_SECONDS),
            aiohttp.ClientSession(
                headers=endpoint_headers(endpoint), cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.get(
                url,
                timeout=NO_CLOCKS,
                allow_redirects=False,
                proxy=proxy_for(url),
            ) as response,
        ):
            body = await read_body(response, limit=_MODELS_BYTES) if response.status == 200 else b""
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except (
        aiohttp.ClientError, OSError, TimeoutError, SamplingError, msgspec.DecodeError, ValueError
    ):  # fmt: skip
        return []
