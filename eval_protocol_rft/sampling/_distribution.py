"""What makes the distribution that a server samples from differ from the model's own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eval_protocol_rft.sampling._types import SamplingParams

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "top_a": (0,),
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
