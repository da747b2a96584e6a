"""Whether completions that stop hold the token that stopped them, whether a server sampled from the
prompt that it was sent, and whether equal seeds draw the same and different ones do not. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from eval_protocol_rft.doctor._findings import (
    P_VALUE_BAR,
    Finding,
    Verdict,
    p_value_verdict,
    skipped,
)
from eval_protocol_rft.doctor._tokenizer_checks import first_difference
from eval_protocol_rft.sampling import Completion

END_OF_TURN = "end of turn"
PROMPT_ECHO = "prompt echo"


def end_of_turn(completions: Sequence[Completion], end_ids: Collection[int]) -> Finding:
    """The sampled end-of-turn token is there, last, and nowhere else.

    Args:
        end_ids: every id that may end a turn: those of the model, or all control tokens.
    """
    stopped = [c for c in completions if c.finish_reason == "stop"]
    ended = [c for c in stopped if c.token_ids[-1] in end_ids or c.stop_reason == c.token_ids[-1]]
    enders = {c.token_ids[-1] for c in ended}
    within = sum(not enders.isdisjoint(c.token_ids[:-1]) for c in completions)
    missing = len(stopped) - len(ended)
    numbers = {"completions": len(completions), "stopped": len(stopped)}
    numbers |= {"without_end": missing, "end_within": within}
    bar = "every completion that stops ends with it, and none goes on after it"
    if not stopped:
        return Finding(
            name=END_OF_TURN,
            verdict="warn",
            measured=f"none of {len(completions)} completions stopped",
            bar=bar,
            advice="All were cut off, so nothing is known: raise --max-tokens, and check that the "
            "chat template is the model's.",
            numbers=numbers,
        )
    measured = f"{len(ended)} of {len(stopped)} that stopped end with it"
    if within:
        measured += f"; {within} of {len(completions)} go on after it"
    advice = ""
    if missing:
        advice = (
            "The model's decision to stop is not in the data, so it cannot be trained: make the "
            "server return the end-of-turn token (no stop strings in its place), and check that "
            "the tokenizer is the server's."
        )
    elif within:
        advice = "The server samples past the end of the turn: check its ignore_eos and stop ids."
    verdict: Verdict = "fail" if missing or within else "pass"
    return Finding(
        name=END_OF_TURN,
        verdict=verdict,
        measured=measured,
        bar=bar,
        advice=advice,
        numbers=numbers,
    )


def prompt_echo(sent: Sequence[int], returned: Sequence[int] | None, count: int | None) -> Finding:
    """The prompt ids that the server used are those that were sent.

    Args:
        sent: [P]
        returned: ids of the prompt in the reply; None: there are none.
        count: `usage.prompt_tokens` of the reply; None: it has none.
    """
    numbers = {"sent": len(sent)} | ({} if returned is None else {"echoed": len(returned)})

    def finding(verdict: Verdict, measured: str, bar: str, advice: str) -> Finding:
        return Finding(
            name=PROMPT_ECHO,
            verdict=verdict,
            measured=measured,
            bar=bar,
            advice=advice,
            numbers=numbers,
        )

    others = (
        "The server did not sample from the ids that it was sent (it adds a token, or renders them "
        "again): its completions answer another prompt. Turn that off before training."
    )
    same = "the same ids"
    if returned is not None:
        at = first_difference(sent, returned)
        if at is None and len(returned) > len(sent):
            at = len(sent)
        if at is None:
            return finding("pass", f"{len(sent)} ids came back as sent", same, "")
        there = returned[at] if at < len(returned) else "nothing"
        here = sent[at] if at < len(sent) else "nothing"
        measured = (
            f"{len(sent)} ids were sent, {len(returned)} came back: index {at} is {here} "
            f"here and {there} there"
        )
        return finding("fail", measured, same, others)
    if count not in (None, len(sent)):
        measured = f"{len(sent)} ids were sent, the server counted {count}"
        return finding("fail", measured, "as many", others)
    how = "it counted as many" if count is not None else "nor counted"
    measured = f"{len(sent)} ids were not sent back ({how})"
    advice = "Nothing shows that the server used them: let it answer return_token_ids."
    return finding("warn", measured, same, advice)


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
