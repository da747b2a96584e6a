"""Tool calls out of sampled text.

Invariant: a call is what the model wrote, or a `ParseProblem` that says what is wrong with it; see
`call_formats`.

Parsers of general libraries close what was left open and lose the good calls beside a bad one, or
raise; that is right for an answer to a user, and wrong for what a policy is rewarded for.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

from eval_protocol_rft.conversation.call_formats import (
    OPEN,
    READERS,
    CallProblemError,
    ParseProblem,
    ToolFormat,
    Tools,
    as_calls,
    json_call,
)
from eval_protocol_rft.conversation.harmony import read_harmony
from eval_protocol_rft.prompts import PromptError
from eval_protocol_rft.tokenizer import LoadedTokenizer

_THOUGHT_CLOSE = "</think>"
_MARKS: tuple[tuple[str, ToolFormat | None], ...] = (
    ("<|channel|>", "harmony"),
    ("<arg_key>", "glm"),
    ("<parameter=", "qwen3_coder"),
    ("<function=", None),  # calls inside <tool_call>, but in no form that is known here
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁call▁begin｜>", "deepseek"),
    (OPEN, "hermes"),
    ("<|im_start|>", "hermes"),
    ("<|start_header_id|>", "llama3_json"),
)
"""What a chat template has in it, and what that says. The first one counts."""
_THINK_IN_TAGS = frozenset({"hermes", "qwen3_coder", "glm", "deepseek"})


def tool_format(tokenizer: LoadedTokenizer) -> ToolFormat | None:
    """How the model of this tokenizer writes tool calls, as far as its chat template tells: the
    form that it shows; Hermes where it is ChatML and shows none, Llama 3's JSON where it is Llama
    3; else None."""
    return _format_of(str(getattr(tokenizer.tokenizer, "chat_template", None) or ""))


def unknown_format(name: str) -> str:
    """What to say where `tool_format` is None."""
    return (
        f"cannot tell how the model of {name!r} writes tool calls from its chat template: parse "
        'them yourself, with parse_tool_calls(..., format="hermes") or any other form'
    )


@lru_cache(maxsize=16)
def _format_of(template: str) -> ToolFormat | None:
    return next((known for mark, known in _MARKS if mark in template), None)


def parse_tool_calls(
    text: str,
    tokenizer: LoadedTokenizer,
    *,
    format: ToolFormat | None = None,  # noqa: A002 - the word for it
    id_prefix: str = "call",
    tools: Tools = None,
) -> tuple[str, list[dict[str, Any]] | ParseProblem]:
    """Split an answer into what it says and what it calls.

    Args:
        text: the sampled text, without the token that ended it.
        tokenizer: its chat template tells the format.
        format: `hermes` (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number,
            anywhere after a closed `<think>` block), `llama3_json`
            (`{"name": ..., "parameters": {...}}` or a list of them at the end of the answer,
            several separated by `;`), `qwen3_coder` and `glm` (arguments in tags), `mistral`
            (`[TOOL_CALLS]`), `deepseek`, `harmony` (gpt-oss); None: as `tool_format` says.
        id_prefix: calls get the ids `{id_prefix}_0`, `{id_prefix}_1`, ...; those of Mistral, whose
            templates want nine letters or digits, `call00000`, ...
        tools: in the chat API's form; say of which type arguments are that stand in tags.

    Returns:
        Content (all of `text` where nothing is called or there is a problem), and the calls in the
        chat API's form, their arguments as the JSON text that was sampled.

    Raises:
        PromptError: the format cannot be told. Malformed calls are a `ParseProblem`.
    """
    known = format or tool_format(tokenizer)
    if known is None:
        raise PromptError(unknown_format(tokenizer.name))
    began = _thought_end(text) if known in _THINK_IN_TAGS else 0
    if began is None:
        return text, []  # still thinking: what it writes there calls nothing
    content, called = read_calls(text[began:], known, tools, id_prefix=id_prefix)
    if isinstance(called, ParseProblem) or not called:
        return text, called
    return text[:began] + content, called


def read_calls(
    answer: str, known: ToolFormat, tools: Tools, *, id_prefix: str = "call"
) -> tuple[str, list[dict[str, Any]] | ParseProblem]:
    """`parse_tool_calls` of an answer that has no thinking in front of it."""
    try:
        if known == "harmony":
            channels = read_harmony(answer)
            content, calls = channels.content, channels.calls()
            if not calls:
                return answer, []
        else:
            content, calls = READERS[known](answer, tools)
    except CallProblemError as found:
        return answer, found.problem
    return content, as_calls(calls, known, id_prefix)


def _thought_end(text: str) -> int | None:
    """Where the answer begins behind a think block, opened in the text or by the prompt; 0 where
    there is none, None where it was not closed. A tag inside a call's JSON closes nothing, unless
    the call stands in a block itself."""
    closed = text.find(_THOUGHT_CLOSE)
    if text.lstrip().startswith("<think>"):
        return closed + len(_THOUGHT_CLOSE) if closed >= 0 else None
    at = 0
    while closed >= 0:
        opened = text.find(OPEN, at)
        if not 0 <= opened < closed:
            return closed + len(_THOUGHT_CLOSE)
        at = opened + len(OPEN)
        with contextlib.suppress(CallProblemError):  # no call: the answer's own parse says what
            at = json_call(text, at, 0)[2]
        if at > closed:
            closed = text.find(_THOUGHT_CLOSE, at)
    return 0
