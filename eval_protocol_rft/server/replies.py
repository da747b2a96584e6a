"""What `/v1/completions` answers: whole replies and stream chunks in Fireworks' shape. Pure.

Invariant: ids and logprobs go out as the sampler gave them, the end-of-turn token included, and a
whole reply and a stream of the same completions carry the same data: both are made by `_choice`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from eval_protocol_rft.sampling.distribution import reshaped_by
from eval_protocol_rft.sampling.types import Completion, ContractError, SamplingParams
from eval_protocol_rft.server.protocol import CompletionRequest
from eval_protocol_rft.server.schema import (
    Choice,
    ContentLogprobs,
    LegacyLogprobs,
    RawOutput,
    Reply,
    TokenLogprob,
    Usage,
)
from eval_protocol_rft.server.spelling import Spelling


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of one reply repeats."""

    id: str
    created: int
    model: str


def whole_reply(
    head: Head, request: CompletionRequest, samples: Sequence[Sampled], metrics: dict[str, str]
) -> Reply:
    """All choices in one body. `samples` are ordered by choice index: prompt by prompt.

    Raises:
        ContractError: raw logprobs were asked for and the sampler has none.
    """
    return Reply(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[
            _choice(request, index, sampled, 0, len(sampled.completion.token_ids))
            for index, sampled in enumerate(samples)
        ],
        usage=_usage(request, samples),
        perf_metrics=metrics if request.perf_metrics_in_response else None,
    )


def chunks(
    head: Head, request: CompletionRequest, samples: Sequence[Sampled], metrics: dict[str, str]
) -> Iterator[Reply]:
    """The same reply in pieces of one token, choice after choice. The last chunk of each choice has
    its finish reason and raw output, the very last one usage and metrics. Where the sampler tells
    which weights drew a token, its chunk's model reads `name@version`."""
    final = len(samples) - 1
    for index, sampled in enumerate(samples):
        last = len(sampled.completion.token_ids) - 1
        for at in range(last + 1):
            done = index == final and at == last
            version = _version(sampled.completion, at)
            yield Reply(
                id=head.id,
                created=head.created,
                model=f"{head.model}@{version}" if version else head.model,
                choices=[_choice(request, index, sampled, at, at + 1)],
                usage=_usage(request, samples) if done else UNSET,
                perf_metrics=metrics if done and request.perf_metrics_in_response else UNSET,
            )


def _version(completion: Completion, at: int) -> str | None:
    """The weights that drew token `at`. Where they changed on the way, the first and the last
    token's are known, and not in between where."""
    if completion.first_policy_version is None or at == len(completion.token_ids) - 1:
        return completion.policy_version
    return completion.first_policy_version if at == 0 else None


def perf_metrics(
    samples: Sequence[Sampled], request: CompletionRequest, *, seconds: float, in_flight: int
) -> dict[str, str]:
    """Fireworks' metrics, as far as they are known here: nothing leaves before the last token is
    sampled, so the first token's time is the whole time; queues are not told apart."""
    return {
        "prompt-tokens": str(_usage(request, samples).prompt_tokens),
        "cached-prompt-tokens": "0",
        "num-concurrent-requests": str(in_flight),
        "server-time-to-first-token": f"{seconds:.6f}",
        "server-processing-time": f"{seconds:.6f}",
    }


def _choice(
    request: CompletionRequest, index: int, sampled: Sampled, start: int, stop: int
) -> Choice:
    """Tokens `start` to `stop` of choice `index`."""
    completion, spelling = sampled.completion, sampled.spelling
    first, last = start == 0, stop == len(completion.token_ids)
    return Choice(
        index=index,
        text=spelling.text[spelling.offsets[start] : spelling.offsets[stop]],
        finish_reason=completion.finish_reason if last else None,
        logprobs=_logprobs(request, sampled, start, stop),
        prompt_token_ids=(
            sampled.prompt.token_ids if request.return_token_ids and first else UNSET
        ),
        token_ids=completion.token_ids[start:stop] if request.return_token_ids else UNSET,
        raw_output=_raw_output(sampled) if request.raw_output and last else UNSET,
    )


def _logprobs(
    request: CompletionRequest, sampled: Sampled, start: int, stop: int
) -> ContentLogprobs | LegacyLogprobs | None:
    # 0 asks for the legacy format without alternatives; it is not False.
    if request.logprobs is None or request.logprobs is False:
        return None
    spelling = sampled.spelling
    ids = sampled.completion.token_ids[start:stop]
    raw = _raw_logprobs(sampled)[start:stop]
    tokens, offsets = spelling.tokens[start:stop], spelling.offsets[start:stop]
    if request.logprobs is not True:
        return LegacyLogprobs(
            tokens=tokens,
            token_logprobs=raw,
            token_ids=ids,
            text_offset=offsets,
            top_logprobs=[{token: value} for token, value in zip(tokens, raw, strict=True)],
        )
    drawn_with, utf8 = sampled.completion.logprobs[start:stop], spelling.bytes[start:stop]
    rows = zip(tokens, ids, raw, drawn_with, utf8, offsets, strict=True)
    return ContentLogprobs(
        content=[
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
    )


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


def _raw_output(sampled: Sampled) -> RawOutput:
    return RawOutput(
        prompt_fragments=[sampled.prompt.text],
        prompt_token_ids=sampled.prompt.token_ids,
        completion=sampled.spelling.raw_text,
        completion_token_ids=sampled.completion.token_ids,
    )


def _usage(request: CompletionRequest, samples: Sequence[Sampled]) -> Usage:
    prompt = sum(len(sampled.prompt.token_ids) for sampled in samples[:: request.n or 1])
    completion = sum(len(sampled.completion.token_ids) for sampled in samples)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
