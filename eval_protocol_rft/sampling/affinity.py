"""Which requests have the same prompt, or are turns of one episode: what a router needs to send
them to the replica that has what they begin with in its cache. Pure.

Invariant: where the user says anything of affinity, in a header or in the body, we say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from eval_protocol_rft.sampling.types import SamplingParams, TokenIds

AFFINITY_HEADER = "x-session-affinity"
"""Known to Fireworks and to routers before several vLLM servers; others do not look at it."""
AFFINITY_FIELD = "prompt_cache_key"
"""Fireworks alone gets it: servers may refuse a field that they do not know."""
_OWN_HEADERS = frozenset({AFFINITY_HEADER, "x-multi-turn-session-id"})
_OWN_FIELDS = (AFFINITY_FIELD, "user")
"""Of the body. Fireworks routes by `user` where there is no `prompt_cache_key`."""


def has_own_affinity(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether the user's headers say where requests belong."""
    return any(name.lower() in _OWN_HEADERS for name, _ in headers)


def affinity_of(prompt: TokenIds, params: SamplingParams) -> str | None:
    """What to call the episode or else the prompt; None where the user turned that off or calls it
    something else."""
    if not params.prompt_cache_affinity:
        return None
    if params.extra and any(field in params.extra for field in _OWN_FIELDS):
        return None
    return params.session or prompt.affinity
