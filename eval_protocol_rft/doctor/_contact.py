"""The first completion: whether the server answers at all, takes seeds, and uses our prompt ids.

Invariant: when nothing comes back there is one finding that says why, and nothing else is asked.

A `Completion` holds nothing of the prompt: decoding refuses a wrong echo, but a right one and none
look the same to it. So one reply is looked at as it came.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import aiohttp
import msgspec

from eval_protocol_rft.doctor._completion_checks import PROMPT_ECHO, prompt_echo
from eval_protocol_rft.doctor._findings import Finding, skipped
from eval_protocol_rft.doctor._probe import Probe
from eval_protocol_rft.sampling import (
    ABSENT,
    NO_CLOCKS,
    Completion,
    ContractError,
    Deadline,
    Endpoint,
    Failure,
    SamplingError,
    SamplingParams,
    TokenIds,
    endpoint_headers,
    parse_reply,
    proxy_for,
    read_body,
    reply_limit,
    request_body,
)

_MODELS_SECONDS = 10.0
_MODELS_BYTES = 4 << 20


async def ask_echo(
    endpoint: Endpoint, prompt: TokenIds, params: SamplingParams
) -> tuple[list[int] | None, int | None]:
    """Ask for one token.

    Returns:
        The prompt's ids as they came back, and how many the server counted; None where it does not
        say.

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
                raise SamplingError(
                    f"HTTP {response.status}", kind="connection", status=response.status
                )
            body = await read_body(response, limit=reply_limit(prompt, params))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SamplingError(type(error).__name__, kind="connection") from None
    reply = parse_reply(body)
    if not reply.choices:
        raise ContractError("the reply has no choices")
    choice = reply.choices[0]
    raw_output = ABSENT if choice.raw_output is None else choice.raw_output.prompt_token_ids
    echo = choice.prompt_token_ids if choice.prompt_token_ids != ABSENT else raw_output
    try:
        ids = None if echo == ABSENT else msgspec.json.decode(echo, type=list[int])
    except msgspec.ValidationError:
        raise ContractError("prompt_token_ids are no list of integers") from None
    return ids, reply.usage.prompt_tokens if reply.usage else None


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
        reply = msgspec.json.decode(body, type=dict[str, Any])
        return [str(m["id"]) for m in msgspec.convert(reply["data"], list[dict[str, Any]])]
    except (
        aiohttp.ClientError, OSError, TimeoutError, SamplingError, msgspec.DecodeError, ValueError,
        KeyError,
    ):  # fmt: skip
        return []


EXACT_REPLY = "exact replies"
_BAR = "every reply is exact token data; a request that fails for another reason warns"
_ATTEMPTS = 3

_SHOWN_MODELS = 8
_ADVICE: dict[str, str] = {
    "refused": "Change what the message names.",
    "unavailable": "The server failed: its log says why.",
    "connection": "Is the server running, and is --base-url its address?",
    "timeout": "The server is too slow for --timeout, or hangs: look at its log.",
    "contract": "Its replies are not exact token data, so nothing can be trained from them: "
    "see docs/wire.md for what a server has to send.",
    "internal": "The model failed: check its weights and dtype.",
    "prompt": "The prompt cannot be rendered.",
}
"""By kind of failure, where its status and words say no more."""
_ADVICE_BY_STATUS: dict[int, str] = {
    401: "The key is missing or wrong: --api-key-env NAME says which variable holds it.",
    403: "The key is not allowed this model: another key (--api-key-env) or another model.",
    413: "The request is too large for the server or for a proxy before it.",
    425: "The server is loading weights: try again when it has them.",
    429: "The server turns requests away, as too many or over a quota: try again later, with a "
    "lower --concurrency.",
    502: "A proxy answered for the server, which is away: is it running?",
    503: "The server is loading or overloaded: try again when it answers.",
    504: "A proxy answered for the server, which is too slow or away: look at its log.",
}
_ADVICE_BY_WORDS: tuple[tuple[str, str], ...] = (
    (
        "certificate",
        "The server's certificate is not trusted here: name its authority's file in SSL_CERT_FILE, "
        "or mend the host's name in --base-url.",
    ),
    ("[ssl:", "What answers there speaks no TLS: write http:// in --base-url."),
    ("name or service not known", "There is no host of that name: check --base-url."),
    ("nodename nor servname", "There is no host of that name: check --base-url."),
)
"""Words of connections that failed, in lower case."""


async def first_contact(
    probe: Probe, prompt: TokenIds, params: SamplingParams, endpoint: Endpoint | None
) -> tuple[bool, list[Finding]]:
    """Ask for one completion, with a seed, else without; then the probe sends no seeds from here
    on. `params` are at temperature 1, where unnamed logprobs of either kind are those of sampling.

    Returns:
        Whether a completion came back, and what that showed.
    """
    outcome = await probe.one(prompt, params, seed=probe.seed, attempts=_ATTEMPTS)
    if isinstance(outcome, Failure) and outcome.kind == "refused":
        unseeded = await probe.one(prompt, params, seed=None, attempts=_ATTEMPTS)
        if isinstance(unseeded, Completion):
            probe.seeds_refused, outcome = outcome.message, unseeded
    if isinstance(outcome, Completion):
        return True, [await _echo_finding(prompt, params, endpoint)]
    failed = Finding(
        name=EXACT_REPLY,
        verdict="fail",
        measured=f"the first request failed: {outcome.message}",
        bar=_BAR,
        advice=await _advice(outcome, params.model, endpoint),
    )
    findings = [failed]
    if outcome.kind == "contract" and endpoint is not None:
        # It may be the prompt that is not what was sent: then that is what to say.
        echo = await _echo_finding(prompt, params, endpoint)
        findings += [echo] if echo.verdict == "fail" else []
    others = skipped("all other checks", "no completion came back, so nothing else was asked")
    return False, [*findings, others]


async def _advice(failure: Failure, model: str, endpoint: Endpoint | None) -> str:
    """What to do about the first request's failure."""
    if failure.status == 404 and endpoint is not None:
        served = await served_models(endpoint)
        if not served:
            return (
                "Nothing answers there: --base-url names the server without /completions, as "
                "http://host:8000 or http://host:8000/v1."
            )
        if model not in served:
            more = len(served) - _SHOWN_MODELS
            names = ", ".join(
                [*served[:_SHOWN_MODELS], *([f"and {more} more"] if more > 0 else [])]
            )
            return f"The server has no model {model}. Name with --model what it serves: {names}."
        return f"The server lists {model} but does not complete with it: is it still loading?"
    if failure.kind == "connection" and failure.status is None:
        words = failure.message.lower()
        return next((say for part, say in _ADVICE_BY_WORDS if part in words), _ADVICE["connection"])
    return _ADVICE_BY_STATUS.get(failure.status or 0) or _ADVICE.get(failure.kind, "")


async def _echo_finding(
    prompt: TokenIds, params: SamplingParams, endpoint: Endpoint | None
) -> Finding:
    if endpoint is None:
        return skipped(PROMPT_ECHO, "a model in this process takes the ids as they are")
    try:
        returned, count = await ask_echo(endpoint, prompt, replace(params, max_tokens=1))
    except SamplingError as error:
        return skipped(PROMPT_ECHO, f"the request for it failed: {error}")
    return prompt_echo(prompt, returned, count)


def exact_replies(probe: Probe) -> Finding:
    """What became of all requests. A reply that is not exact is the server's fault, whatever the
    rest of them looks like; other failures may be of the moment."""
    failed = sum(probe.failures.values())
    total = probe.completed + failed
    measured = f"{probe.completed} of {total} completions came back"
    advice = ""
    if failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in probe.failures.most_common())
        measured += f"; {kinds}; the first: {probe.first_failure}"
        [(kind, _)] = probe.failures.most_common(1)
        advice = _ADVICE.get("contract" if probe.failures["contract"] else kind, "")
    return Finding(
        name=EXACT_REPLY,
        verdict="fail"
        if probe.failures["contract"] or not probe.completed
        else "warn"
        if failed
        else "pass",
        measured=measured,
        bar=_BAR,
        advice=advice,
        numbers={"completions": probe.completed, "failed": failed},
    )
