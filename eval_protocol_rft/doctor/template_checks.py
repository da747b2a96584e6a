"""Whether a growing conversation only ever appends to its token ids. Pure.

A multi-turn rollout is one sequence only where the next prompt begins with the prompt before it
and the completion that was sampled; where a template writes the past anew, the trained tokens were
never seen in that context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from eval_protocol_rft.doctor.findings import Finding, skipped
from eval_protocol_rft.doctor.texts import THOUGHT, conversation
from eval_protocol_rft.prompts import PromptError, render_chat
from eval_protocol_rft.tokenizer import LoadedTokenizer

HISTORY = "chat template: history"
NEXT_TURN = "chat template: next turn"
_MULTI_TURN = (
    "Single-turn evaluators are not touched. For several turns use a template that keeps history "
    "as it was, or train each turn as a segment of its own."
)


def template_checks(tokenizer: LoadedTokenizer, kwargs: Mapping[str, Any]) -> list[Finding]:
    """Render a conversation at every length, and compare."""
    try:
        return [_history(tokenizer, kwargs), _next_turn(tokenizer, kwargs)]
    except PromptError as error:
        failed = Finding(
            name=HISTORY,
            verdict="fail",
            measured=str(error),
            bar="a conversation of three turns renders",
            advice="Use the tokenizer of a chat model, or set tokenizer.chat_template.",
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
    messages = conversation()
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
    for what, answer in (("an answer", "Twenty."), ("its thinking", f"{THOUGHT}Twenty.")):
        messages = conversation(answer)
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
