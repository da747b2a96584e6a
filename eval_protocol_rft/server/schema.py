"""The shape of `/v1/completions` replies: what is in the JSON, and what may be left out. Pure.

Source: the public types of fireworks-ai 1.2 (`CompletionCreateResponse`, `CompletionChunk`). A
field that is UNSET is absent; one that is None is null.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token, as `logprobs: true` asks for it."""

    token: str
    token_id: int
    logprob: float
    """Raw: the model's own, temperature 1, full vocabulary."""
    sampling_logprob: float
    """What the sampler drew with."""
    bytes: list[int]
    text_offset: int
    top_logprobs: list[None] = []


class ContentLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The format of `logprobs: true`."""

    content: list[TokenLogprob]


class LegacyLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The format of `logprobs: <int>`. `token_logprobs` are raw: it has no place for others."""

    tokens: list[str]
    token_logprobs: list[float]
    token_ids: list[int]
    text_offset: list[int]
    top_logprobs: list[dict[str, float]]


class RawOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What the model saw and wrote, control tokens and stop string included."""

    prompt_fragments: list[str]
    prompt_token_ids: list[int]
    completion: str
    completion_token_ids: list[int]
    completion_logprobs: None = None
    grammar: None = None
    images: None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or the part of it that one chunk carries."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: ContentLogprobs | LegacyLogprobs | None
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    raw_output: RawOutput | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Cached prompt tokens; 0, as a `Sampler` does not tell."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts; a prompt sampled n times counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole reply, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType = UNSET
    perf_metrics: dict[str, str] | UnsetType | None = UNSET
