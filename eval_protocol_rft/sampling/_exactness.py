"""Exact replies of `/v1/completions` (Fireworks, vLLM, SGLang): all that a reply says twice is
compared here. Pure.

Invariant: one reply becomes exactly the completions that the server sampled, or a typed error. Ids,
logprobs, prompt and counts leave this module only if no other part of the reply contradicts them; a
`ContractError` names the choice, the field and the first index that differs.

What a server sends, see `docs/wire.md`: Fireworks' `logprobs.content[]` carries the id, the
sampling and the raw logprob of each token; vLLM and SGLang send `token_ids` beside
`logprobs.token_logprobs`, one unnamed logprob per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgspec

from eval_protocol_rft.sampling import _replies, _types
from eval_protocol_rft.sampling._event_stream import EventStream
from eval_protocol_rft.sampling._replies import ABSENT, Choice, Logprobs, Reply
from eval_protocol_rft.sampling._types import Completion, ContractError, SamplingParams, TokenIds

_NO_MODELS: Mapping[int, Sequence[str]] = MappingProxyType({})
_ID_PREFIX = "token_id:"
"""How vLLM writes tokens under `return_tokens_as_token_ids`: text may stand for several ids, this
cannot."""

_LOWEST = -3.0e38
"""Below, a logprob is minus infinity in float32, which every trainer computes in."""

_token_id = attrgetter("token_id")
_logprob = attrgetter("logprob")
_sampling_logprob = attrgetter("sampling_logprob")
_text_offset = attrgetter("text_offset")


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
        SamplingError: the reply is cut off (of kind `connection`), is an error, or its generation
            was aborted (`unavailable` or `refused`).
    """
    reply = _replies.parse_reply(body)
    reply.id = request_id or reply.id
    return _decode(reply, prompt, params, n)


def decode_stream(
    stream: EventStream | bytes,
    prompt: TokenIds,
    params: SamplingParams,
    *,
    n: int = 1,
    request_id: str | None = None,
) -> list[Completion]:
    """The same for an event stream that has arrived. One that ends without `[DONE]` is cut off,
    never a completion."""
    if isinstance(stream, bytes):
        body, stream = stream, EventStream()
        stream.feed(body)
    reply, models = stream.reply()
    reply.id = request_id or reply.id
    return _decode(reply, prompt, params, n, models)


def _decode(
    reply: Reply,
    prompt: TokenIds,
    params: SamplingParams,
    n: int,
    models: Mapping[int, Sequence[str]] = _NO_MODELS,
) -> list[Completion]:
    """`models`: choice index -> the models that its events name, see `EventStream.reply`."""
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
    _check_usage(reply, prompt, params, completions)
    return completions


def _completion(
    choice: Choice, reply: Reply, prompt: TokenIds, params: SamplingParams, models: Sequence[str]
) -> Completion:
    where = f"choices[{choice.index}]"
    version, first_version = _versions(models, reply.model)
    try:
        finish_reason = _finish_reason(choice)
        _check_prompt(choice, prompt)
        token_ids = _sampled_ids(choice)
        logprobs, raw_logprobs = _sampled_logprobs(choice, token_ids, params)
        if params.max_tokens is not None and len(token_ids) > params.max_tokens:
            raise ContractError(
                f"{len(token_ids)} tokens, more than max_tokens={params.max_tokens}"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            routing_matrices=_routing(choice),
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


def _finish_reason(choice: Choice) -> _types.FinishReason:
    if choice.finish_reason == "stop":
        return "stop"
    if choice.finish_reason == "length":
        return "length"
    if choice.finish_reason in ("abort", "error"):
        # A paused or failing engine hands out the tokens it had: a fragment, not a completion.
        raise _types.SamplingError(
            f"choices[{choice.index}]: the server ended the generation with finish_reason "
            f"{choice.finish_reason!r}",
            kind="unavailable",
        )
    raise ContractError(f"finish_reason is {choice.finish_reason!r}, expected 'stop' or 'length'")


def _check_prompt(choice: Choice, prompt: TokenIds) -> None:
    """Prompt ids that come back are those that were sent."""
    for name, raw in _echoed_prompts(choice):
        # Same bytes, same ids: no Python integer is made for the prompt of every completion.
        if bytes(raw) == prompt.json:
            continue
        try:
            ids = msgspec.json.decode(raw, type=list[int])
        except msgspec.ValidationError as error:
            raise ContractError(f"{name}: {error}") from error
        _check_same(name, ids, "the prompt ids sent", prompt)


def _sampled_ids(choice: Choice) -> list[int]:
    """The sampled ids from the first place that has them, equal to every other place."""
    sources = _id_sources(choice)
    if not sources:
        raise ContractError(
            "no token ids: the server must answer return_token_ids (vLLM, SGLang) or send "
            "logprobs.content[] (Fireworks)"
        )
    (first_name, first), *others = sources
    for name, ids in others:
        _check_same(name, ids, first_name, first)
    return first


def _echoed_prompts(choice: Choice) -> list[tuple[str, msgspec.Raw]]:
    echoed = [("prompt_token_ids", choice.prompt_token_ids)]
    if choice.raw_output is not None:
        echoed.append(("raw_output.prompt_token_ids", choice.raw_output.prompt_token_ids))
    return [(name, raw) for name, raw in echoed if raw != ABSENT]


def _id_sources(choice: Choice) -> list[tuple[str, list[int]]]:
    logprobs, raw_output = choice.logprobs, choice.raw_output
    content = logprobs.content if logprobs is not None else None
    sources = [
        ("logprobs.content[].token_id", None if content is None else list(map(_token_id, content))),
        ("token_ids", choice.token_ids),
        (
            "raw_output.completion_token_ids",
            raw_output.completion_token_ids if raw_output is not None else None,
        ),
        ("logprobs.token_ids", logprobs.token_ids if logprobs is not None else None),
    ]
    return [(name, ids) for name, ids in sources if ids is not None]


def _sampled_logprobs(
    choice: Choice, token_ids: list[int], params: SamplingParams
) -> tuple[list[float], list[float] | None]:
    """Sampling logprobs and, where the reply tells them, raw ones; each as many as `token_ids` or
    the `Completion` made of them is refused."""
    logprobs = choice.logprobs
    if logprobs is None:
        raise ContractError("no logprobs")
    if logprobs.content is not None:
        _check_order("logprobs.content[].text_offset", list(map(_text_offset, logprobs.content)))
        values = list(map(_logprob, logprobs.content))
        raw = None if _all_null(values) else _complete("logprobs.content[].logprob", values)
        sampling: list[float | None] = list(map(_sampling_logprob, logprobs.content))
        if _all_null(sampling) and raw is not None:
            if params.logprobs_mode == "processed_logprobs":
                return raw, None
            return _raw_as_sampling(raw, params, "sampling_logprob is null"), raw
        return _complete("logprobs.content[].sampling_logprob", sampling), raw
    if logprobs.token_logprobs is None:
        raise ContractError("no logprobs.content and no logprobs.token_logprobs")
    _check_order("logprobs.text_offset", logprobs.text_offset or [])
    unnamed = _complete("logprobs.token_logprobs", logprobs.token_logprobs)
    _check_tokens_as_ids(logprobs, token_ids, unnamed)
    if params.logprobs_mode == "processed_logprobs":
        return unnamed, None
    return _raw_as_sampling(unnamed, params, "token_logprobs may be raw"), unnamed


def _routing(choice: Choice) -> list[str] | None:
    """As Fireworks tells it where `include_routing_matrix` asks for it; None where it does not."""
    content = choice.logprobs.content if choice.logprobs is not None else None
    matrices = [entry.routing_matrix or "" for entry in content or ()]
    return matrices if any(matrices) else None


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
    """The server counted what came back. Its counts are asked where nothing else bears witness:
    prompt ids that were not echoed, sampled ids that were told once."""
    usage = reply.usage
    if usage is None:
        return
    sampled = sum(len(completion.token_ids) for completion in completions)
    if usage.prompt_tokens not in (None, len(prompt)) and not all(
        map(_echoed_prompts, reply.choices)
    ):
        raise ContractError(
            f"usage.prompt_tokens is {usage.prompt_tokens}, but {len(prompt)} prompt ids were sent"
        )
    # Whether the tokens of a stop string count is the server's secret.
    if (
        usage.completion_tokens not in (None, sampled)
        and not params.stop
        and not all(len(_id_sources(choice)) > 1 for choice in reply.choices)
    ):
        raise ContractError(
            f"usage.completion_tokens is {usage.completion_tokens}, but {sampled} ids came back"
        )


def _all_null(values: Sequence[float | None]) -> bool:
    return list(values) == [None] * len(values)


def _complete(name: str, values: Sequence[float | None]) -> list[float]:
    known: list[float] = list(values)  # type: ignore[arg-type]
    try:
        # Finds a null too, and costs half of looking for one first.
        lowest = min(known, default=0.0)
        if lowest < _LOWEST:
            raise ContractError(
                f"{name}[{known.index(lowest)}] is {lowest!r}: minus infinity in float32, no "
                "logprob of a token"
            )
    except TypeError:
        raise ContractError(f"{name} is null at index {list(values).index(None)}") from None
    return known


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
    try:
        in_order = offsets == sorted(offsets)  # type: ignore[type-var]
    except TypeError:
        known = [offset for offset in offsets if offset is not None]
        in_order = known == sorted(known)
    if not in_order:
        raise ContractError(f"{name} goes back: entries are out of order")


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "tfs": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "xtc_probability": (0,),
    "no_repeat_ngram_size": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "mirostat_target": (),
    "mirostat_lr": (),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "response_format": ({"type": "text"},),
    "grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "custom_logit_processor": (),
    "logits_processors": (),
}
"""Request fields that move probability between tokens, and the values at which they do not."""

_TRUNCATING = frozenset(_NEUTRAL) - {
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "dry_multiplier",
    "dynatemp_range",
}
"""Those that take tokens out of the support, rather than only weigh them anew."""


def reshaped_by(params: SamplingParams) -> list[str]:
    """Every setting under which sampling logprobs differ from raw ones, as `name=value`; empty
    where the two are equal by definition."""
    settings = []
    if params.temperature != 1.0:
        settings.append(f"temperature={params.temperature:g}")
    return settings + _cuts(params) + _extra(params, frozenset(_NEUTRAL) - _TRUNCATING)


def plain(params: SamplingParams) -> SamplingParams:
    """The same without any of them: at temperature 1, from the model's own distribution."""
    extra = {name: value for name, value in params.extra.items() if name not in _NEUTRAL}
    return replace(params, temperature=1.0, top_p=1.0, top_k=0, extra=extra)


def support_truncated(params: SamplingParams) -> bool:
    """Whether some tokens could not be drawn at all. Greedy sampling is the extreme case."""
    return params.temperature == 0 or bool(_cuts(params))


def _cuts(params: SamplingParams) -> list[str]:
    cuts = []
    if params.top_p < 1.0:
        cuts.append(f"top_p={params.top_p:g}")
    if params.top_k > 0:
        cuts.append(f"top_k={params.top_k}")
    return cuts + _extra(params, _TRUNCATING)


def _extra(params: SamplingParams, names: frozenset[str]) -> list[str]:
    return [
        f"{name}={value!r}"
        for name, value in params.extra.items()
        if name in names and value not in _NEUTRAL[name]
    ]
