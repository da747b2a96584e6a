"""What the model's context leaves for prompts and completions.

Invariant: it is what the model or its server says, never a guess. What does not fit is told before
the first request; a prompt that does not fit costs none, and `max_tokens` never asks for more than
there is.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import aiohttp

from eval_protocol_rft import sampling
from eval_protocol_rft.data._questions import Questions
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import PromptError, RolloutRequest

logger = logging.getLogger(__name__)
_SECONDS = 10.0
"""For the server's list of models."""
_MOST_BYTES = 8 << 20
_LENGTH_FIELDS = ("max_model_len", "context_length")
"""What vLLM and SGLang, and what Fireworks and `ep-rft serve` call it there."""


async def context_length(sampler: sampling.Sampler, request: RolloutRequest) -> int | None:
    """Most tokens of prompt and completion together; None where nobody says."""
    known: int | None = getattr(sampler, "context_length", None)
    if known is not None or request.endpoint is None:
        return known
    return await _listed(request.endpoint, request.params.model)


async def _listed(endpoint: sampling.Endpoint, model: str) -> int | None:
    """As the server's list of models has it. A server that has none, or is still loading, says what
    does not fit when it is asked."""
    url = f"{endpoint.base_url}/models"
    try:
        async with (
            sampling.Deadline(_SECONDS),
            aiohttp.ClientSession(
                headers=sampling.endpoint_headers(endpoint),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=sampling.NO_CLOCKS,
            ) as session,
            session.get(url, allow_redirects=False, proxy=sampling.proxy_for(url)) as response,
        ):
            if response.status != 200:
                return None
            listed = json.loads(await sampling.read_body(response, limit=_MOST_BYTES))
    except (aiohttp.ClientError, OSError, ValueError, RecursionError, sampling.SamplingError):
        return None
    entries = listed.get("data") if isinstance(listed, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("id") == model:
            lengths = (entry.get(name) for name in _LENGTH_FIELDS)
            return next((n for n in lengths if type(n) is int and n > 0), None)
    return None


async def tell_what_does_not_fit(
    questions: Questions,
    missing: Callable[[int], list[int]],
    tokenizer: LoadedTokenizer,
    request: RolloutRequest,
    context: int | None,
) -> None:
    """Say of how many prompts, of which completions are missing, the context holds too little.

    Raises:
        PromptError: it holds none of them.
    """
    if context is None:
        return
    asked = request.params.max_tokens or 1
    least = max(1, context - asked + 1)
    looked_at = await asyncio.to_thread(
        lambda: list(questions.lengths(missing, tokenizer, request, least))
    )
    lengths = [length for _, length in looked_at if length is not None]
    too_long = [(place, length) for place, length in looked_at if length and length >= context]
    model = request.params.model
    if too_long:
        (place, length), *_ = too_long
        what = (
            f"{len(too_long):,} of {len(looked_at):,} prompts do not fit into the context of "
            f"{context:,} tokens of {model}, the first in {place} with {length:,}"
        )
        if len(too_long) == len(looked_at):
            raise PromptError(f"{what}: nothing can be sampled")
        logger.warning("%s: their completions fail, and no request is made for them", what)
    short = [length for length in lengths if least <= length < context]
    if short and request.params.max_tokens is not None:
        logger.warning(
            "max_tokens is %s, and the context of %s tokens of %s leaves fewer, %s at least, for "
            "%s of %s prompts: it is lowered to what is left there",
            f"{asked:,}",
            f"{context:,}",
            model,
            f"{context - max(short):,}",
            f"{len(short):,}",
            f"{len(looked_at):,}",
        )
