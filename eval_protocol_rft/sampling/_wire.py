"""Request bodies and exact replies of `/v1/completions`: Fireworks, vLLM, SGLang. Pure.

Invariant: one reply becomes exactly the completions that the server sampled, or a typed error that
names the choice, the field and the index (see `_exactness.py`).

What a server sends, see `docs/wire.md`: Fireworks' `logprobs.content[]` carries the id, the
sampling and the raw logprob of each token; vLLM and SGLang send `token_ids` beside
`logprobs.token_logprobs`, one unnamed logprob per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgspec

from eval_protocol_rft.sampling._exactness import (
    check_prompt,
    check_usage,
    sampled_ids,
    sampled_logprobs,
)
from eval_protocol_rft.sampling._replies import Choice, Reply, parse_reply, parse_stream
from eval_protocol_rft.sampling._types import (
    Completion,
    ContractError,
    FinishReason,
    SamplingParams,
    TokenIds,
    UnavailableError,
)

_NO_MODELS: Mapping[int, Sequence[str]] = MappingProxyType({})


def request_body(
    prompt: TokenIds,
    params: SamplingParams,
    seed: int | None,
    *,
    stream: bool = False,
    ask_usage: bool = True,
    prompt_cache_key: str | None = None,
) -> bytes:
    """The JSON of one request for one completion. Costs nothing per prompt token after the first
    call for a prompt.

    Args:
        stream: ask for a stream of events.
        ask_usage: ask for the counts of tokens in a stream, by which lost events show. vLLM sends
            them only then; Fireworks sends them always and does not know the field.
        prompt_cache_key: what to call the prompt, where the server knows the field.
    """
    body: dict[str, Any] = {
        "model": params.model,
        "prompt": msgspec.Raw(prompt.json),
        "temperature": params.temperature,
        # Left out, servers fall back on the model's generation_config and cut the support.
        "top_p": params.top_p,
        "top_k": params.top_k,
        "logprobs": True,
        "return_token_ids": True,
        "raw_output": True,
        "context_length_exceeded_behavior": "error",
    }
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if seed is not None:
        body["seed"] = seed
    if stream:
        body["stream"] = True
        if ask_usage:
            body["stream_options"] = {"include_usage": True}
    if prompt_cache_key is not None:
        body["prompt_cache_key"] = prompt_cache_key
    if params.logprobs_mode is not None:
        # Only vLLM's users set the mode; there this makes every id and logprob checkable.
        body["return_tokens_as_token_ids"] = True
    body.update(params.extra)
    return msgspec.json.encode(body)


def decode_reply(
    body: bytes,
    prompt: TokenIds,
    params: SamplingParams,
    *,
    n: int = 1,
    request_id: str | None = None,
) -> list[Completion]:
    """Decode a whole JSON reply to `n` choices of one prompt, in `index` order. `request_id` as
    the headers tell it goes before the `id` of the body.

    Raises:
        ContractError: the reply is not exact token data.
        ConnectionFailedError: the reply is cut off.
        UnavailableError, RefusedError: the reply is an error, or its generation was aborted.
    """
    reply = parse_reply(body)
    reply.id = request_id or reply.id
    return _decode(reply, prompt, params, n)


def decode_stream(
    body: bytes,
    prompt: TokenIds,
    params: SamplingParams,
    *,
    n: int = 1,
    request_id: str | None = None,
) -> list[Completion]:
    """The same for a whole server-sent event stream. A stream that ends without `[DONE]` is cut
    off, never a completion."""
    reply, models = parse_stream(body)
    reply.id = request_id or reply.id
    return _decode(reply, prompt, params, n, models)


def _decode(
    reply: Reply,
    prompt: TokenIds,
    params: SamplingParams,
    n: int,
    models: Mapping[int, Sequence[str]] = _NO_MODELS,
) -> list[Completion]:
    """`models`: choice index -> the models that its tokens' events name, see `parse_stream`."""
    if reply.object not in (None, "text_completion"):
        raise ContractError(f"object is {reply.object!r}, expected 'text_completion'")
    choices = sorted(reply.choices, key=attrgetter("index"))
    if [choice.index for choice in choices] != list(range(n)):
        raise ContractError(
            f"choices have the indices {[choice.index for choice in reply.choices]}, "
            f"expected {list(range(n))}"
        )
    completions = [
        _completion(choice, reply, prompt, params, models.get(choice.index, ()))
        for choice in choices
    ]
    check_usage(reply, prompt, params, completions)
    return completions


def _completion(
    choice: Choice, reply: Reply, prompt: TokenIds, params: SamplingParams, models: Sequence[str]
) -> Completion:
    where = f"choices[{choice.index}]"
    version, first_version = _versions(models, reply.model)
    try:
        finish_reason = _finish_reason(choice)
        check_prompt(choice, prompt)
        token_ids = sampled_ids(choice)
        logprobs, raw_logprobs = sampled_logprobs(choice, token_ids, params)
        if params.max_tokens is not None and len(token_ids) > params.max_tokens:
            raise ContractError(
                f"{len(token_ids)} tokens, more than max_tokens={params.max_tokens}"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            finish_reason=finish_reason,
            text=choice.text,
            stop_reason=(choice.matched_stop if choice.stop_reason is None else choice.stop_reason),
            request_id=reply.id,
            policy_version=version,
            first_policy_version=first_version,
        )
    except ContractError as error:
        raise ContractError(f"{where}: {error}") from error


def _versions(models: Sequence[str], model: str | None) -> tuple[str | None, str | None]:
    """The last version of the weights that sampled a choice, and the first other one.

    A model named without a version, among others that are named with one, goes by its name: it is
    what was served before the first version was loaded.
    """
    if not any("@" in name for name in models):
        return _version(model or ""), None
    *_, last = models
    others = (name for name in models if _version(name) != _version(last))
    first = next(others, None)
    return _version(last), first and (_version(first) or first)


def _version(model: str) -> str | None:
    """`name@version` -> `version`."""
    return model.partition("@")[2] or None


def _finish_reason(choice: Choice) -> FinishReason:
    if choice.finish_reason == "stop":
        return "stop"
    if choice.finish_reason == "length":
        return "length"
    if choice.finish_reason in ("abort", "error"):
        # A paused or failing engine hands out the tokens it had: a fragment, not a completion.
        raise UnavailableError(
            f"choices[{choice.index}]: the server ended the generation with finish_reason "
            f"{choice.finish_reason!r}"
        )
    raise ContractError(f"finish_reason is {choice.finish_reason!r}, expected 'stop' or 'length'")
