"""Request bodies and exact replies of `/v1/completions`: Fireworks, vLLM, SGLang. Pure.

Invariant: one reply becomes exactly the completions that the server sampled, or a typed error that
names the choice, the field and the index. Everything in a reply that says the same thing twice
(ids in `content[]`, `token_ids`, `raw_output`; counts in `usage`; prompt ids) is compared.

What a server sends, see `docs/wire.md`: Fireworks' `logprobs.content[]` carries the id, the
sampling and the raw logprob of each token; vLLM and SGLang send `token_ids` beside
`logprobs.token_logprobs`, one unnamed logprob per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec

from eval_protocol_rft.sampling.distribution import reshaped_by
from eval_protocol_rft.sampling.replies import (
    ABSENT,
    Choice,
    Logprobs,
    Reply,
    parse_reply,
    parse_stream,
)
from eval_protocol_rft.sampling.types import (
    Completion,
    ContractError,
    FinishReason,
    SamplingParams,
    TokenIds,
    UnavailableError,
)

_ID_PREFIX = "token_id:"
"""How vLLM writes tokens under `return_tokens_as_token_ids`: text may stand for several ids, this
cannot."""

_token_id = attrgetter("token_id")
_logprob = attrgetter("logprob")
_sampling_logprob = attrgetter("sampling_logprob")
_text_offset = attrgetter("text_offset")


def request_body(prompt: TokenIds, params: SamplingParams, seed: int | None) -> bytes:
    """The JSON of one request for one completion. Costs nothing per prompt token after the first
    call for a prompt."""
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
    body: bytes, prompt: TokenIds, params: SamplingParams, *, n: int = 1
) -> list[Completion]:
    """The same for a whole server-sent event stream. A stream that ends without `[DONE]` is cut
    off, never a completion."""
    return _decode(parse_stream(body), prompt, params, n)


def _decode(reply: Reply, prompt: TokenIds, params: SamplingParams, n: int) -> list[Completion]:
    if reply.object not in (None, "text_completion"):
        raise ContractError(f"object is {reply.object!r}, expected 'text_completion'")
    choices = sorted(reply.choices, key=attrgetter("index"))
    if [choice.index for choice in choices] != list(range(n)):
        raise ContractError(
            f"choices have the indices {[choice.index for choice in reply.choices]}, "
            f"expected {list(range(n))}"
        )
    version = reply.model.rpartition("@")[2] if reply.model and "@" in reply.model else None
    completions = [_completion(choice, reply, version, prompt, params) for choice in choices]
    _check_usage(reply, prompt, params, completions)
    return completions


def _completion(
    choice: Choice, reply: Reply, version: str | None, prompt: TokenIds, params: SamplingParams
) -> Completion:
    where = f"choices[{choice.index}]"
    try:
        finish_reason = _finish_reason(choice)
        _check_prompt(choice, prompt)
        token_ids = _token_ids(choice)
        logprobs, raw_logprobs = _logprobs(choice, token_ids, params)
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
            stop_reason=choice.stop_reason,
            request_id=reply.id,
            policy_version=version,
        )
    except ContractError as error:
        raise ContractError(f"{where}: {error}") from error


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


def _check_prompt(choice: Choice, prompt: TokenIds) -> None:
    echoed = [("prompt_token_ids", choice.prompt_token_ids)]
    if choice.raw_output is not None:
        echoed.append(("raw_output.prompt_token_ids", choice.raw_output.prompt_token_ids))
    for name, raw in echoed:
        # Same bytes, same ids: no Python integer is made for the prompt of every completion.
        if raw == ABSENT or bytes(raw) == prompt.json:
            continue
        try:
            ids = msgspec.json.decode(raw, type=list[int])
        except msgspec.ValidationError as error:
            raise ContractError(f"{name}: {error}") from error
        _check_same(name, ids, "the prompt ids sent", prompt)


def _token_ids(choice: Choice) -> list[int]:
    """The sampled ids from the first place that has them, equal to every other place."""
    logprobs = choice.logprobs
    sources: list[tuple[str, list[int]]] = []
    if logprobs is not None and logprobs.content is not None:
        sources.append(("logprobs.content[].token_id", list(map(_token_id, logprobs.content))))
    if choice.token_ids is not None:
        sources.append(("token_ids", choice.token_ids))
    if choice.raw_output is not None and choice.raw_output.completion_token_ids is not None:
        sources.append(("raw_output.completion_token_ids", choice.raw_output.completion_token_ids))
    if logprobs is not None and logprobs.token_ids is not None:
        sources.append(("logprobs.token_ids", logprobs.token_ids))
    if not sources:
        raise ContractError(
            "no token ids: the server must answer return_token_ids (vLLM, SGLang) or send "
            "logprobs.content[] (Fireworks)"
        )
    (first_name, first), *others = sources
    for name, ids in others:
        _check_same(name, ids, first_name, first)
    return first


def _logprobs(
    choice: Choice, token_ids: list[int], params: SamplingParams
) -> tuple[list[float], list[float] | None]:
    logprobs = choice.logprobs
    if logprobs is None:
        raise ContractError("no logprobs")
    if logprobs.content is not None:
        _check_order("logprobs.content[].text_offset", list(map(_text_offset, logprobs.content)))
        raw = _complete("logprobs.content[].logprob", list(map(_logprob, logprobs.content)))
        sampling: list[float | None] = list(map(_sampling_logprob, logprobs.content))
        if sampling and sampling.count(None) == len(sampling):
            if params.logprobs_mode == "processed_logprobs":
                return raw, None
            return _raw_as_sampling(raw, params, "sampling_logprob is null"), raw
        return _complete("logprobs.content[].sampling_logprob", sampling), raw
    if logprobs.token_logprobs is None:
        raise ContractError("no logprobs.content and no logprobs.token_logprobs")
    _check_order("logprobs.text_offset", logprobs.text_offset or [])
    values = _complete("logprobs.token_logprobs", logprobs.token_logprobs)
    _check_tokens_as_ids(logprobs, token_ids, values)
    if params.logprobs_mode == "processed_logprobs":
        return values, None
    return _raw_as_sampling(values, params, "token_logprobs may be raw"), values


def _raw_as_sampling(raw: list[float], params: SamplingParams, because: str) -> list[float]:
    """Raw logprobs are sampling logprobs where nothing reshapes the distribution; only there."""
    reshaping = reshaped_by(params)
    if reshaping:
        raise ContractError(
            f"{because} and {', '.join(reshaping)} reshapes the distribution, so they are not the "
            "logprobs of sampling. Start vLLM with --logprobs-mode processed_logprobs and say so "
            "with completion_params['logprobs_mode'] = 'processed_logprobs', or sample with "
            "temperature 1, top_p 1 and top_k off"
        )
    return raw


def _check_tokens_as_ids(logprobs: Logprobs, token_ids: list[int], values: list[float]) -> None:
    """Where tokens are written as ids they are a second witness of ids, and with `top_logprobs` of
    the logprobs."""
    tokens = logprobs.tokens
    if tokens is None or not tokens or not tokens[0].startswith(_ID_PREFIX):
        return
    expected = [f"{_ID_PREFIX}{token}" for token in token_ids]
    _check_same("logprobs.tokens", tokens, "token_ids", expected)
    if logprobs.top_logprobs is None:
        return
    witnessed = [
        (top or {}).get(token) for token, top in zip(tokens, logprobs.top_logprobs, strict=False)
    ]
    _check_same("logprobs.top_logprobs", witnessed, "logprobs.token_logprobs", values)


def _check_usage(
    reply: Reply, prompt: TokenIds, params: SamplingParams, completions: list[Completion]
) -> None:
    usage = reply.usage
    if usage is None:
        return
    if usage.prompt_tokens is not None and usage.prompt_tokens != len(prompt):
        raise ContractError(
            f"usage.prompt_tokens is {usage.prompt_tokens}, but {len(prompt)} prompt ids were sent"
        )
    # Whether the tokens of a stop string count is the server's secret.
    sampled = sum(len(completion.token_ids) for completion in completions)
    counted = usage.completion_tokens
    if counted is not None and counted != sampled and not params.stop:
        raise ContractError(f"usage.completion_tokens is {counted}, but {sampled} ids came back")


def _complete(name: str, values: Sequence[float | None]) -> list[float]:
    if None in values:
        raise ContractError(f"{name} is null at index {list(values).index(None)}")
    return list(values)  # type: ignore[arg-type]


def _check_same(name: str, got: Sequence[Any], other: str, expected: Sequence[Any]) -> None:
    if len(got) == len(expected) and list(got) == list(expected):
        return
    index = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
        min(len(got), len(expected)),
    )
    a = got[index] if index < len(got) else "nothing"
    b = expected[index] if index < len(expected) else "nothing"
    raise ContractError(
        f"{name} ({len(got)} entries) differs from {other} ({len(expected)}) at index {index}: "
        f"{a} against {b}"
    )


def _check_order(name: str, offsets: list[int | None]) -> None:
    """Offsets into the text never go back: entries or events that changed places show."""
    if None not in offsets and offsets != sorted(offsets):  # type: ignore[type-var]
        raise ContractError(f"{name} goes back: entries are out of order")
