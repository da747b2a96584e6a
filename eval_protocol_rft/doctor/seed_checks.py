"""What seeds do: equal ones should draw the same, different ones must not. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eval_protocol_rft.doctor.findings import (
    P_VALUE_BAR,
    Finding,
    p_value_verdict,
    skipped,
)
from eval_protocol_rft.sampling.types import Completion

EQUAL_SEEDS = "equal seeds"
DIFFERENT_SEEDS = "different seeds"


def equal_seeds(pairs: Sequence[tuple[Completion, Completion]]) -> Finding:
    """Completions of the same prompt and seed, sampled beside others."""
    if not pairs:
        return skipped(EQUAL_SEEDS, "no pair of completions came back")
    same = sum(a.token_ids == b.token_ids for a, b in pairs)
    return Finding(
        name=EQUAL_SEEDS,
        verdict="pass" if same == len(pairs) else "warn",
        measured=f"{same} of {len(pairs)} pairs are the same completion",
        bar="all of them; never fails",
        advice=""
        if same == len(pairs)
        else "A run cannot be repeated on this server. Training does not need that: do not rely "
        "on seeds for anything else.",
        numbers={"pairs": len(pairs), "same": same},
    )


def repeats_p_value(groups: Sequence[Sequence[Completion]]) -> tuple[int, int, float]:
    """How many completions repeat their group's first one, of how many, and the probability that
    independent draws repeat it as often or more.

    Given the first draw y of a group, each of the M - 1 others is y with probability p(y), which
    its logprobs tell. The sum over groups of these binomials has a known distribution, so the test
    is exact (and conservative, being discrete).
    """
    distribution = np.ones(1)
    repeats = others = 0
    for first, *rest in groups:
        probability = min(1.0, math.exp(sum(first.logprobs)))
        repeats += sum(completion.token_ids == first.token_ids for completion in rest)
        others += len(rest)
        for _ in rest:
            distribution = np.convolve(distribution, [1.0 - probability, probability])
    return repeats, others, min(1.0, float(distribution[repeats:].sum()))


def different_seeds(groups: Sequence[Sequence[Completion]], *, seeded: bool) -> Finding:
    """Completions of one prompt under different seeds, or under none.

    Args:
        groups: completions of each prompt, all drawn at the distribution that their logprobs tell.
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return skipped(DIFFERENT_SEEDS, "no two completions of one prompt came back")
    repeats, others, p_value = repeats_p_value(groups)
    verdict = p_value_verdict(p_value)
    how = "different seeds" if seeded else "no seeds"
    return Finding(
        name=DIFFERENT_SEEDS,
        verdict=verdict,
        measured=f"{repeats} of {others} repeat their prompt's first completion, p = {p_value:.2g} "
        f"({how})",
        bar=P_VALUE_BAR,
        advice=""
        if verdict == "pass"
        else "The completions of a group are not independent draws, so its advantages mean "
        "nothing: look for a cache of replies, or a seed that is fixed on the server.",
        numbers={"repeats": repeats, "others": others, "p_value": p_value},
    )
