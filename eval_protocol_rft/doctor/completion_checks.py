"""Whether completions that stop hold the token that stopped them, and whether a server sampled from
the prompt that it was sent. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eval_protocol_rft.doctor.findings import Finding, Verdict
from eval_protocol_rft.doctor.template_checks import first_difference
from eval_protocol_rft.sampling.types import Completion

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


@dataclass(frozen=True, slots=True)
class Echo:
    """What a reply says of the prompt."""

    prompt_ids: list[int] | None
    """As they came back, None where they did not."""
    counted: int | None
    """`usage.prompt_tokens`."""


def prompt_echo(sent: Sequence[int], echo: Echo) -> Finding:
    """The prompt ids that the server used are those that were sent."""
    numbers = {"sent": len(sent)}
    advice = (
        "The server did not sample from the ids that it was sent (it adds a token, or renders them "
        "again): its completions answer another prompt. Turn that off before training."
    )
    if echo.prompt_ids is not None:
        numbers["echoed"] = len(echo.prompt_ids)
        at = first_difference(sent, echo.prompt_ids)
        if at is None and len(echo.prompt_ids) > len(sent):
            at = len(sent)
        if at is None:
            return Finding(
                name=PROMPT_ECHO,
                verdict="pass",
                measured=f"{len(sent)} ids came back as sent",
                bar="the same ids",
                numbers=numbers,
            )
        there = echo.prompt_ids[at] if at < len(echo.prompt_ids) else "nothing"
        here = sent[at] if at < len(sent) else "nothing"
        measured = (
            f"{len(sent)} ids were sent, {len(echo.prompt_ids)} came back: index {at} is {here} "
            f"here and {there} there"
        )
        return Finding(
            name=PROMPT_ECHO,
            verdict="fail",
            measured=measured,
            bar="the same ids",
            advice=advice,
            numbers=numbers,
        )
    if echo.counted not in (None, len(sent)):
        return Finding(
            name=PROMPT_ECHO,
            verdict="fail",
            measured=f"{len(sent)} ids were sent, the server counted {echo.counted}",
            bar="as many",
            advice=advice,
            numbers=numbers,
        )
    counted = "it counted as many" if echo.counted is not None else "nor counted"
    return Finding(
        name=PROMPT_ECHO,
        verdict="warn",
        measured=f"{len(sent)} ids were not sent back ({counted})",
        bar="the same ids",
        advice="Nothing shows that the server used them: let it answer return_token_ids.",
        numbers=numbers,
    )
