"""One request whose reply is read for what it says of the prompt.

A `Completion` holds nothing of the prompt: decoding refuses a wrong echo, but a right one and none
look the same to it. So one reply is looked at as it came.
"""

from __future__ import annotations

import aiohttp
import msgspec

from eval_protocol_rft.doctor.completion_checks import Echo
from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.sampling.bodies import read_body, reply_limit
from eval_protocol_rft.sampling.replies import ABSENT, parse_reply
from eval_protocol_rft.sampling.types import (
    ConnectionFailedError,
    ContractError,
    SamplingParams,
    TokenIds,
)
from eval_protocol_rft.sampling.wire import request_body


async def ask_echo(endpoint: Endpoint, prompt: TokenIds, params: SamplingParams) -> Echo:
    """Ask for one token.

    Raises:
        SamplingError: no reply of a completion's shape came. No secret is in its message: it holds
            nothing that was sent.
    """
    headers = {"content-type": "application/json"}
    if endpoint.api_key:
        headers["authorization"] = f"Bearer {endpoint.api_key}"
    headers.update((name.lower(), value) for name, value in endpoint.headers)
    try:
        async with (
            aiohttp.ClientSession(
                headers=headers, trust_env=True, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.post(
                f"{endpoint.base_url}/completions",
                data=request_body(prompt, params, None),
                timeout=aiohttp.ClientTimeout(total=params.timeout),
                allow_redirects=False,
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
