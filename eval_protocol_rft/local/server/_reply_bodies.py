"""What `/v1/completions` answers: whole replies and stream chunks in Fireworks' shape. Pure.

Invariant: ids and logprobs go out as the sampler gave them, the end-of-turn token included, and a
whole reply and a stream of the same completions carry the same data: `choice_body` makes both.

Sampled ids to text, token by token: what each id adds, its bytes, and where it starts. Pure.

Invariant: text comes from ids. The deltas between offsets, joined, are exactly the completion's
text, whatever the tokenizer does with spaces, control tokens or half a character.

Source of the shape: the public types of fireworks-ai 1.2 (`CompletionCreateResponse`,
`CompletionChunk`). What was not asked for is absent, unless it is null there.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.local.server._protocol import CompletionRequest
from eval_protocol_rft.sampling import Completion, ContractError, SamplingParams, reshaped_by


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token, as `logprobs: true` asks for it. A class, as there is one per token: a
    dict would take three times the memory."""

    token: str
    token_id: int
    logprob: float
    """Raw: the model's own, temperature 1, full vocabulary."""
    sampling_logprob: float
    """What the sampler drew with."""
    bytes: list[int]
    text_offset: int
    top_logprobs: list[None] = []


_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of one character in UTF-8: no more tokens than that can be waiting for their end."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback name a single byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """One completion as text. T = number of sampled tokens."""

    text: str
    """Without the end-of-turn token and without a stop string."""
    raw_text: str
    """All of it, control tokens and stop string included."""
    tokens: list[str]
    """[T] each token's own text, control tokens included."""
    bytes: list[list[int]]
    """[T] UTF-8 of each token; joined they spell the text, also where a token is half a character.
    Empty for control tokens."""
    offsets: list[int]
    """[T+1] token i adds `text[offsets[i]:offsets[i + 1]]`: nothing when it only begins a
    character, or lies in a stop string."""


def spell(tokenizer: LoadedTokenizer, completion: Completion, params: SamplingParams) -> Spelling:
    """Spell a completion, with its own text where the sampler gave one."""
    ids = completion.token_ids
    text = completion.text
    if text is None:
        text = tokenizer.decode_completion(completion, params)
    raw_text = tokenizer.decode(ids)
    alone = {token: tokenizer.decode([token]) for token in set(ids)}
    added = [alone[token] for token in ids]
    if "".join(added) != raw_text:
        added = _added_in_place(tokenizer.decode, ids)
    tokens = [
        part if part.endswith(alone[token]) and _HALF_A_CHARACTER not in part else alone[token]
        for token, part in zip(ids, added, strict=True)
    ]
    ends = [min(end, len(text)) for end in accumulate(map(len, added))]
    return Spelling(
        text=text,
        raw_text=raw_text,
        tokens=tokens,
        bytes=[
            [] if token in tokenizer.special_ids else _bytes(tokenizer, token, part)
            for token, part in zip(ids, tokens, strict=True)
        ],
        offsets=[0, *ends[:-1], len(text)],
    )


def _added_in_place(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """[T] what each token adds to the decoded text, where that is not what it spells alone: the
    space that begins a text may be stripped, a character may take several tokens. So each is
    decoded after the ones before it; only the last few of them, to stay linear."""
    added: list[str] = []
    start = done = 0
    shown = ""
    for end in range(1, len(ids) + 1):
        seen = decode(ids[start:end])
        waiting = end - done < _LONGEST_CHARACTER and end < len(ids)
        if waiting and seen.endswith(_HALF_A_CHARACTER):
            added.append("")
            continue
        added.append(seen[len(shown) :])
        start, done = done, end
        shown = decode(ids[start:done])
    return added


def _bytes(tokenizer: LoadedTokenizer, token: int, text: str) -> list[int]:
    if _HALF_A_CHARACTER not in text:
        return list(text.encode())
    name = str(tokenizer.tokenizer.convert_ids_to_tokens(token))
    if byte := _BYTE_TOKEN.fullmatch(name):
        return [int(byte[1], 16)]
    if all(letter in _BYTE_OF_LETTER for letter in name):
        return [_BYTE_OF_LETTER[letter] for letter in name]
    return list(text.encode())


def _byte_level_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE vocabularies write bytes with (Radford et al. 2019, GPT-2):
    printable Latin-1 stands for itself, the other bytes follow from U+0100 in order."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in itself)
    return {chr(byte): byte for byte in itself} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_level_alphabet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One finished completion and where it belongs."""

    prompt: Prompt
    completion: Completion
    spelling: Spelling


Json = dict[str, Any]
"""A JSON object, its fields in the order of Fireworks'."""


def head(model: str) -> Json:
    """What a reply, and every chunk of one, begins with."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def whole_reply(
    head: Json, request: CompletionRequest, samples: Sequence[Sampled], metrics: dict[str, str]
) -> Json:
    """All choices in one body. `samples` are ordered by choice index: prompt by prompt.

    Raises:
        ContractError: raw logprobs were asked for and the sampler has none.
    """
    return {
        **head,
        "choices": [
            choice_body(request, index, sampled, 0, len(sampled.completion.token_ids))
            for index, sampled in enumerate(samples)
        ],
        "usage": usage(request, samples),
        "perf_metrics": metrics if request.perf_metrics_in_response else None,
    }


def chunks(
    head: Json, request: CompletionRequest, samples: Sequence[Sampled], metrics: dict[str, str]
) -> Iterator[Json]:
    """The same reply in pieces of `stream_interval` tokens (one), choice after choice. The last
    chunk of each choice has its finish reason and raw output, the very last one usage and metrics.
    Where the sampler tells which weights drew a token, its chunk's model reads `name@version`, and
    a chunk has no tokens of two."""
    final = len(samples) - 1
    for index, sampled in enumerate(samples):
        length = len(sampled.completion.token_ids)
        models = [model_of_token(head["model"], sampled.completion, at) for at in range(length)]
        for start, stop in _pieces(models, request.stream_interval or 1):
            chunk = {
                **head,
                "model": models[start],
                "choices": [choice_body(request, index, sampled, start, stop)],
            }
            if index == final and stop == length:
                chunk["usage"] = usage(request, samples)
                if request.perf_metrics_in_response:
                    chunk["perf_metrics"] = metrics
            yield chunk


def _pieces(models: list[str], longest: int) -> Iterator[tuple[int, int]]:
    """Where each piece of consecutive tokens of one model begins and ends."""
    start = 0
    for at in range(1, len(models) + 1):
        if at == len(models) or at - start == longest or models[at] != models[start]:
            yield start, at
            start = at


def model_of_token(name: str, completion: Completion, at: int) -> str:
    """`name`, with the version of the weights that drew token `at`, where that is known. Where they
    changed on the way, the first and the last token's are known, and not in between where."""
    version = completion.policy_version
    if completion.first_policy_version is not None and at < len(completion.token_ids) - 1:
        version = completion.first_policy_version if at == 0 else None
    return f"{name}@{version}" if version else name


def perf_metrics(
    samples: Sequence[Sampled], request: CompletionRequest, *, seconds: float, in_flight: int
) -> dict[str, str]:
    """Fireworks' metrics, as far as they are known here: nothing leaves before the last token is
    sampled, so the first token's time is the whole time; queues are not told apart."""
    return {
        "prompt-tokens": str(usage(request, samples)["prompt_tokens"]),
        "cached-prompt-tokens": "0",
        "num-concurrent-requests": str(in_flight),
        "server-time-to-first-token": f"{seconds:.6f}",
        "server-processing-time": f"{seconds:.6f}",
    }


def choice_body(
    request: CompletionRequest, index: int, sampled: Sampled, start: int, stop: int
) -> Json:
    """Tokens `start` to `stop` of choice `index`."""
    completion, spelling = sampled.completion, sampled.spelling
    first, last = start == 0, stop == len(completion.token_ids)
    choice: Json = {
        "index": index,
        "text": spelling.text[spelling.offsets[start] : spelling.offsets[stop]],
        "finish_reason": completion.finish_reason if last else None,
        "logprobs": _logprobs(request, sampled, start, stop),
    }
    if request.return_token_ids and first:
        choice["prompt_token_ids"] = sampled.prompt.token_ids
    if request.return_token_ids:
        choice["token_ids"] = completion.token_ids[start:stop]
    if request.raw_output and last:
        choice["raw_output"] = _raw_output(sampled)
    return choice


def _logprobs(request: CompletionRequest, sampled: Sampled, start: int, stop: int) -> Json | None:
    """True asks for `content`, an integer for the legacy format, which holds raw ones alone."""
    # 0 asks for the legacy format without alternatives; it is not False.
    if request.logprobs is None or request.logprobs is False:
        return None
    spelling = sampled.spelling
    ids = sampled.completion.token_ids[start:stop]
    raw = _raw_logprobs(sampled)[start:stop]
    tokens, offsets = spelling.tokens[start:stop], spelling.offsets[start:stop]
    if request.return_tokens_as_token_ids:
        tokens = [f"token_id:{token}" for token in ids]
    if request.logprobs is not True:
        return {
            "tokens": tokens,
            "token_logprobs": raw,
            "token_ids": ids,
            "text_offset": offsets,
            "top_logprobs": [{token: value} for token, value in zip(tokens, raw, strict=True)],
        }
    drawn_with, utf8 = sampled.completion.logprobs[start:stop], spelling.bytes[start:stop]
    rows = zip(tokens, ids, raw, drawn_with, utf8, offsets, strict=True)
    return {
        "content": [
            TokenLogprob(
                token=token,
                token_id=token_id,
                logprob=logprob,
                sampling_logprob=sampling_logprob,
                bytes=token_bytes,
                text_offset=offset,
            )
            for token, token_id, logprob, sampling_logprob, token_bytes, offset in rows
        ]
    }


def _raw_logprobs(sampled: Sampled) -> list[float]:
    """The model's own logprobs; the sampling ones where the two are equal by definition."""
    raw = sampled.completion.raw_logprobs
    if raw is not None:
        return raw
    reshaped = reshaped_by(sampled.prompt.params)
    if reshaped:
        raise ContractError(
            "the sampler behind this server gives no raw logprobs, and with "
            f"{', '.join(reshaped)} they are not the sampling ones: leave logprobs out, or sample "
            "the full distribution (temperature 1, top_p 1, top_k 0)"
        )
    return sampled.completion.logprobs


def _raw_output(sampled: Sampled) -> Json:
    """What the model saw and wrote, control tokens and stop string included."""
    return {
        "prompt_fragments": [sampled.prompt.text],
        "prompt_token_ids": sampled.prompt.token_ids,
        "completion": sampled.spelling.raw_text,
        "completion_token_ids": sampled.completion.token_ids,
        "completion_logprobs": None,
        "grammar": None,
        "images": None,
    }


def usage(request: CompletionRequest, samples: Sequence[Sampled]) -> Json:
    """Token counts; a prompt sampled n times counts once. Cached ones are not told apart."""
    prompt = sum(len(sampled.prompt.token_ids) for sampled in samples[:: request.n or 1])
    completion = sum(len(sampled.completion.token_ids) for sampled in samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
