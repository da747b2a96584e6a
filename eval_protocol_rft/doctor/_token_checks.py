"""Checks of tokens. Pure.

Whether the tokenizer keeps text, whether it is the server's, and whether a growing conversation
only ever appends to its token ids: a multi-turn rollout is one sequence only where the next prompt
begins with the prompt before it and the completion that was sampled; where a template writes the
past anew, the trained tokens were never seen in that context.

Whether completions that stop hold the token that stopped them, whether a server sampled from the
prompt that it was sent, and whether equal seeds draw the same and different ones do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from eval_protocol_rft.doctor._findings import Finding, Verdict, p_value_finding, skipped
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import PromptError, RolloutRequest, render_chat
from eval_protocol_rft.sampling import Completion, SamplingParams

ROUND_TRIP = "tokenizer round trip"
SAME_TOKENIZER = "tokenizer is the server's"

_PLAIN_TEXTS = (
    "What is 17 + 25?",
    "The quick brown fox jumps over the lazy dog.",
    "if x == 0:\n    return {'a': [1, 2.5]}\n",
    "Two  spaces, a\ttab, and two\n\nlines.",
)
"""ASCII: a tokenizer that changes it shows the model another prompt than the data set holds."""

_FURTHER_TEXTS = (
    "Où est la bibliothèque ? Straße, ñandú.",
    "二加二等于四。",
    "∀x ∈ ℝ: x² ≥ 0",
    "🙂👩‍👩‍👧 done",
)

_THOUGHT = "<think>\nTen and ten is twenty.\n</think>\n\n"


def round_trip(tokenizer: LoadedTokenizer) -> Finding:
    """Text to ids and back. Prompts are made of text, so what is lost here the model never sees."""
    plain, further = (_changed(tokenizer, texts) for texts in (_PLAIN_TEXTS, _FURTHER_TEXTS))
    total = len(_PLAIN_TEXTS) + len(_FURTHER_TEXTS)
    changed = plain + further
    verdict: Verdict = "fail" if plain else "warn" if further else "pass"
    return Finding(
        name=ROUND_TRIP,
        verdict=verdict,
        measured=f"{total - len(changed)} of {total} texts come back"
        + (f"; {changed[0][0]!r} comes back as {changed[0][1]!r}" if changed else ""),
        bar="all of them; fails where one of plain ASCII does not",
        advice="The model sees another text than the data set holds: check the tokenizer's files "
        "(normalizer, added prefix space), or use the model's own tokenizer."
        if changed
        else "",
        numbers={"texts": total, "changed": len(changed)},
    )


def _changed(tokenizer: LoadedTokenizer, texts: Sequence[str]) -> list[tuple[str, str]]:
    changed = []
    for text in texts:
        ids: list[int] = list(tokenizer.tokenizer.encode(text, add_special_tokens=False))
        back = tokenizer.decode(ids)
        if back != text:
            changed.append((text, back))
    return changed


def same_tokenizer(
    tokenizer: LoadedTokenizer, completions: Sequence[Completion], params: SamplingParams
) -> Finding:
    """Sampled ids decoded here, against the text that the server decoded from them."""
    with_text = [completion for completion in completions if completion.text is not None]
    if not with_text:
        return skipped(SAME_TOKENIZER, "the server sent no text")
    size = len(tokenizer.tokenizer)
    highest = max(max(completion.token_ids) for completion in with_text)
    differ = [c for c in with_text if highest < size and not _same_text(tokenizer, c, params)]
    verdict: Verdict = "warn" if differ else "pass"
    if highest >= size or 2 * len(differ) > len(with_text):
        verdict = "fail"
    if highest >= size:
        measured = f"id {highest} was sampled, and {tokenizer.name!r} ends at {size - 1}"
    else:
        same = len(with_text) - len(differ)
        measured = f"{same} of {len(with_text)} completions decode to the same text"
    if differ:
        ours = tokenizer.decode_completion(differ[0], params)
        measured += f"; {ours[:40]!r} here, {(differ[0].text or '')[:40]!r} there"
    return Finding(
        name=SAME_TOKENIZER,
        verdict=verdict,
        measured=measured,
        bar="all of them; fails where most differ, or an id is none of ours",
        advice="Name the tokenizer of the model that the server runs, with --tokenizer."
        if verdict != "pass"
        else "",
        numbers={"completions": len(with_text), "differ": len(differ), "highest_id": highest},
    )


def _same_text(tokenizer: LoadedTokenizer, completion: Completion, params: SamplingParams) -> bool:
    """Servers leave out control tokens, all or the last; and half a character at the end."""
    without = tokenizer.tokenizer.decode(
        completion.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ours = {
        tokenizer.decode_completion(completion, params),
        tokenizer.decode(completion.token_ids),
        without if isinstance(without, str) else "".join(without),
    }
    return (completion.text or "").rstrip("\ufffd") in {text.rstrip("\ufffd") for text in ours}


HISTORY = "chat template: history"
NEXT_TURN = "chat template: next turn"
_MULTI_TURN = (
    "Single-turn evaluators are not touched. For several turns use a template that keeps history "
    "as it was, or train each turn as a segment of its own."
)


def template_checks(tokenizer: LoadedTokenizer, request: RolloutRequest) -> list[Finding]:
    """Render a conversation at every length, and compare."""
    kwargs = request.chat_template_kwargs
    if request.raw:
        return [skipped(name, "prompts are raw text (--raw)") for name in (HISTORY, NEXT_TURN)]
    try:
        return [_history(tokenizer, kwargs), _next_turn(tokenizer, kwargs)]
    except PromptError as error:
        failed = Finding(
            name=HISTORY,
            verdict="fail",
            measured=str(error),
            bar="a conversation of three turns renders",
            advice="Use the tokenizer of a chat model, name a template (--chat-template), or send "
            "raw text (--raw).",
        )
        return [failed, skipped(NEXT_TURN, "the template renders no conversation")]


def first_difference(shorter: Sequence[int], longer: Sequence[int]) -> int | None:
    """Where `longer` leaves `shorter`, or None if it begins with it."""
    for index, token in enumerate(shorter):
        if index >= len(longer) or longer[index] != token:
            return index
    return None


def _history(tokenizer: LoadedTokenizer, kwargs: Mapping[str, Any]) -> Finding:
    """What is said stays as it was, whatever is said after it."""
    messages = _conversation()
    render_chat(messages, None, tokenizer, kwargs)  # says what is wrong with a template, or args
    rendered = [
        _rendered(tokenizer, messages[:count], kwargs) for count in range(1, len(messages) + 1)
    ]
    bar = "the ids of a conversation begin with those of each shorter one"
    for count, (shorter, longer) in enumerate(pairwise(rendered), 1):
        at = first_difference(shorter, longer)
        if at is not None:
            return Finding(
                name=HISTORY,
                verdict="fail",
                measured=f"message {count + 1} changes what stood before it: at id {at} of "
                f"{len(shorter)}, {_around(tokenizer, shorter, at)} became "
                f"{_around(tokenizer, longer, at)}",
                bar=bar,
                advice=f"The template rewrites history. {_MULTI_TURN}",
                numbers={"messages": count, "index": at},
            )
    return Finding(
        name=HISTORY,
        verdict="pass",
        measured=f"{len(messages)} messages, {len(rendered[-1])} ids, appended only",
        bar=bar,
        numbers={"messages": len(messages), "ids": len(rendered[-1])},
    )


def _next_turn(tokenizer: LoadedTokenizer, kwargs: Mapping[str, Any]) -> Finding:
    """The next prompt is the last one, the answer to it, and what comes after."""
    bar = "the next prompt begins with the prompt and the answer, thinking included"
    for what, answer in (("an answer", "Twenty."), ("its thinking", f"{_THOUGHT}Twenty.")):
        messages = _conversation(answer)
        asked, then = (render_chat(messages[:count], None, tokenizer, kwargs) for count in (1, 3))
        at = first_difference(asked, then)
        if at is not None:
            measured = (
                f"the prompt's id {at} of {len(asked)} does not come back: "
                f"{_around(tokenizer, asked, at)} became {_around(tokenizer, then, at)}"
            )
        elif not tokenizer.decode(list(then[len(asked) :])).startswith(answer):
            measured = f"{what} comes back as {_around(tokenizer, then, len(asked))}"
        else:
            continue
        return Finding(
            name=NEXT_TURN,
            verdict="warn",
            measured=measured,
            bar=bar,
            advice=f"Turns after the first do not continue what was sampled. {_MULTI_TURN}",
        )
    return Finding(
        name=NEXT_TURN, verdict="pass", measured="prompt, answer and thinking come back", bar=bar
    )


def _rendered(
    tokenizer: LoadedTokenizer, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]
) -> list[int]:
    try:
        ids: Any = tokenizer.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=False,
            **kwargs,
        )
        return [int(token) for token in ids]
    # A template is a program: besides its own errors it raises what its expressions raise.
    except Exception as error:
        raise PromptError(
            f"the chat template of {tokenizer.name!r} failed on {len(messages)} messages: "
            f"{type(error).__name__}: {error}"
        ) from error


def _around(tokenizer: LoadedTokenizer, ids: Sequence[int], at: int) -> str:
    return repr(tokenizer.decode(list(ids[at : at + 8]))) if at < len(ids) else "nothing"


def _conversation(answer: str = "Twenty.") -> list[dict[str, Any]]:
    """Three turns; `answer` is the first one's."""
    return [
        {"role": "user", "content": "What is 10 plus 10?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And 20 plus 2?"},
        {"role": "assistant", "content": "Twenty-two."},
        {"role": "user", "content": "And 3 more?"},
    ]


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
    return Finding(
        name=END_OF_TURN,
        verdict="fail" if missing or within else "pass",
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
    finding = functools.partial(Finding, name=PROMPT_ECHO, numbers=numbers)
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
            return finding(verdict="pass", measured=f"{len(sent)} ids came back as sent", bar=same)
        there = returned[at] if at < len(returned) else "nothing"
        here = sent[at] if at < len(sent) else "nothing"
        measured = (
            f"{len(sent)} ids were sent, {len(returned)} came back: index {at} is {here} "
            f"here and {there} there"
        )
        return finding(verdict="fail", measured=measured, bar=same, advice=others)
    if count not in (None, len(sent)):
        measured = f"{len(sent)} ids were sent, the server counted {count}"
        return finding(verdict="fail", measured=measured, bar="as many", advice=others)
    how = "it counted as many" if count is not None else "nor counted"
    measured = f"{len(sent)} ids were not sent back ({how})"
    advice = "Nothing shows that the server used them: let it answer return_token_ids."
    return finding(verdict="warn", measured=measured, bar=same, advice=advice)


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
    how = "different seeds" if seeded else "no seeds"
    return p_value_finding(
        DIFFERENT_SEEDS,
        p_value,
        measured=f"{repeats} of {others} repeat their prompt's first completion, p = {p_value:.2g} "
        f"({how})",
        advice="The completions of a group are not independent draws, so its advantages mean "
        "nothing: look for a cache of replies, or a seed that is fixed on the server.",
        numbers={"repeats": repeats, "others": others, "p_value": p_value},
    )
