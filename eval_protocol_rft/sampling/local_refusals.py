"""What the in-process sampler does not do, said before it starts. Pure.

Invariant: a request that passes is honoured to the letter; nothing in it is clipped or ignored,
except fields that change neither tokens nor logprobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval_protocol_rft.sampling.types import RefusedError, SamplingParams

HONOURED_EXTRA = frozenset({"ignore_eos"})

HARMLESS_EXTRA = frozenset(
    {
        # who asks, and how a fleet routes and caches: there is one model and it is here
        "user", "metadata", "prompt_cache_key", "prompt_cache_isolation_key", "service_tier",
        "session_id", "priority", "request_id",
        # what the reply shows: a Completion always holds ids and both logprobs, nothing else
        "logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "raw_output",
        "perf_metrics_in_response",
        # a prompt that is too long is always an error here, as with the value "error"
        "context_length_exceeded_behavior",
    }
)  # fmt: skip
"""Request fields that change neither tokens nor logprobs of an in-process completion."""


LOWEST_TEMPERATURE = 1e-5
"""Below it float32 cannot hold logits divided by it apart, and their logprobs are noise; vLLM takes
the same bound for greedy."""


def completion_limit(prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """Most tokens to draw: `max_tokens`, or all that the context has left.

    Raises:
        RefusedError: prompt and completion would not fit.
    """
    left = context_length - prompt_tokens
    if left < (max_tokens or 1):
        raise RefusedError(
            f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} do not fit the context of "
            f"{context_length} tokens: {max(left, 0)} are left; lower max_tokens or shorten the "
            "prompt"
        )
    return max_tokens or left


def check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RefusedError unless the prompt is one or more ids of the vocabulary."""
    if not prompt_ids:
        raise RefusedError("the prompt has no tokens")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        index = next(i for i, token in enumerate(prompt_ids) if not 0 <= token < vocab_size)
        raise RefusedError(
            f"prompt_ids[{index}] is {prompt_ids[index]}, outside the vocabulary of {vocab_size}: "
            "was the prompt rendered with this model's tokenizer?"
        )


def check_params(params: SamplingParams) -> None:
    """Raise RefusedError, naming the field, for a value without a meaning or a field that is not
    implemented here."""
    problem = _problem(params)
    if problem:
        raise RefusedError(problem)


def _problem(params: SamplingParams) -> str | None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"temperature is {params.temperature}, must be finite and at least 0"
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        return (
            f"temperature is {params.temperature}, must be 0 (the best token) or at least "
            f"{LOWEST_TEMPERATURE}"
        )
    if not 0 < params.top_p <= 1:
        return f"top_p is {params.top_p}, must be above 0 and at most 1"
    if params.top_k < -1:
        return f"top_k is {params.top_k}, must be above 0, or 0 or -1 for off"
    if params.max_tokens is not None and params.max_tokens < 1:
        return f"max_tokens is {params.max_tokens}, must be at least 1"
    if "" in params.stop:
        return "stop has an empty string, which would end every completion"
    return _extra_problem(params.extra)


def _extra_problem(extra: Mapping[str, Any]) -> str | None:
    unknown = sorted(extra.keys() - HONOURED_EXTRA - HARMLESS_EXTRA)
    if unknown:
        return (
            f"the in-process sampler does not implement {', '.join(unknown)}: remove what is not "
            "needed, or sample over HTTP from a server that has it"
        )
    ignore_eos = extra.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        return f"ignore_eos is {ignore_eos!r}, must be true or false"
    return None
