"""Whether a chat template only appends, told before the first episode.

Invariant: the report takes the very steps that an episode takes, on a `Conversation` that rejects
rewrites, with answers written as the template itself writes them.

Chat templates that rewrite history, and those made for training that take their place.

A table of names, by hash: a template that is not in it is unknown, not bad. Each entry was seen to
rewrite in `template_report`, and its replacement to rewrite in fewer cases or in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes._rendering import ChatText, HistoryRewrittenError, Rewrite
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import PromptError, chat_messages
from eval_protocol_rft.sampling import Completion

_QWEN3 = "qwen3_training.jinja"
_KNOWN = {
    "a55ee1b1660128b7": _QWEN3,
    "87a2728cb8dc9fe4": _QWEN3,  # an earlier wording of the same template
    "273d8e0e683b8850": "qwen3_5_nothink_training.jinja",
    "a4aee8afcf2e0711": "qwen3_5_think_training.jinja",
    "e84f32a23fdda276": "qwen3_6_training.jinja",
    "56a1447ad31926fd": "deepseek_r1_distill_training.jinja",
}
"""`LoadedTokenizer.chat_template_hash`, and a file in `trl/chat_templates` (trl 1.16)."""


def training_template(chat_template_hash: str | None) -> str | None:
    """Where a template is that does the same and keeps history, or None where none is known."""
    name = _KNOWN.get(chat_template_hash or "")
    return f"trl/chat_templates/{name}, in the package trl" if name else None


_QUESTION = {"role": "user", "content": "What is 12 + 8?"}
_MORE = {"role": "user", "content": "And 8 more?"}
_CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 12, "b": 8}'},
}
_RESULT = {"role": "tool", "tool_call_id": "call_0", "name": "add", "content": "20"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]
_PLAIN = {"role": "assistant", "content": "Twenty."}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_MARK = "answer-goes-here"
_THINKING = "Two and eight make ten."
_THOUGHT = f"<think>\n{_THINKING}\n</think>\n\n"


_Exchange = tuple[dict[str, Any], dict[str, Any], Sequence[Mapping[str, Any]] | None]
"""An answer, what is said after it, and the tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateCase:
    """One way in which a conversation goes on."""

    name: str
    append_only: bool | None
    """None: the template does not render it; `problem` says why."""
    rewrite: Rewrite | None = None
    """What becomes of what was sent and sampled, where it is rewritten."""
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateReport:
    """What to expect of a chat template over several turns."""

    name: str
    """The tokenizer's."""
    chat_template_hash: str | None
    cases: tuple[TemplateCase, ...]
    training_template: str | None
    """A template made for training that takes this one's place, and where it is; None where none
    is known, which does not mean that there is none."""

    @property
    def append_only(self) -> bool:
        """No case that the template renders is rewritten, and it renders some."""
        kinds = {case.append_only for case in self.cases}
        return True in kinds and False not in kinds


def template_report(
    tokenizer: LoadedTokenizer, template_kwargs: Mapping[str, Any] | None = None
) -> TemplateReport:
    """Take a conversation of each kind one turn further, and see what becomes of it.

    The kinds: `plain turns`; `tool calls, as text` (the sampled text is the message, the default of
    `Conversation.sampled`); `tool calls, as fields` (the message has `tool_calls`; canonical
    spacing, so that only arguments spelled otherwise are still rewritten); `thinking, then a tool
    result`; `thinking, then a question`. Costs about twenty short renderings.
    """
    kwargs = dict(template_kwargs or {})
    plain: _Exchange = (_PLAIN, _MORE, None)
    called: _Exchange = (_CALLING, _RESULT, _TOOLS)
    return TemplateReport(
        name=tokenizer.name,
        chat_template_hash=tokenizer.chat_template_hash,
        cases=(
            _case("plain turns", tokenizer, kwargs, plain),
            _case("tool calls, as text", tokenizer, kwargs, called),
            _case("tool calls, as fields", tokenizer, kwargs, called, as_fields=True),
            _case("thinking, then a tool result", tokenizer, kwargs, called, thought=_THOUGHT),
            _case("thinking, then a question", tokenizer, kwargs, plain, thought=_THOUGHT),
        ),
        training_template=training_template(tokenizer.chat_template_hash),
    )


def _case(
    name: str,
    tokenizer: LoadedTokenizer,
    kwargs: Mapping[str, Any],
    exchange: _Exchange,
    *,
    thought: str = "",
    as_fields: bool = False,
) -> TemplateCase:
    answer, more, tools = exchange
    try:
        talk = Conversation.start([_QUESTION], tools, tokenizer, kwargs, on_rewrite="reject")
        chat = ChatText(tokenizer, tools, kwargs)
        header, text, ender = _as_written(chat, answer, more)
        if chat.render([_QUESTION]).rstrip().endswith("<think>"):
            # such a model thinks before it says anything
            thought = (thought or _THOUGHT).removeprefix("<think>\n")
        ids = chat.ids_behind(talk.prompt_ids, (thought or header) + text)
        completion = _completion(ids, ender)
        thinking = {"reasoning_content": _THINKING} if thought else {}
        talk.sampled(completion, {**answer, **thinking} if as_fields else None)
        talk.append([more])
    except HistoryRewrittenError as error:
        return TemplateCase(name=name, append_only=False, rewrite=error.rewrite)
    except PromptError as error:
        return TemplateCase(name=name, append_only=None, problem=str(error))
    return TemplateCase(name=name, append_only=True)


def _as_written(
    chat: ChatText, answer: Mapping[str, Any], more: Mapping[str, Any]
) -> tuple[str, str, int | None]:
    """How the template keeps `answer` once `more` was said: what it puts between the prompt and
    the answer (an empty think block, say), the answer, and the control token that ends it, if one
    does. A model that writes so has the best chance to be kept."""
    (given,) = chat_messages([answer])
    marked = {"role": "assistant", "content": _MARK}
    last = chat.render([_QUESTION, marked], generation_prompt=False).partition(_MARK)
    before, mark, after = chat.render([_QUESTION, marked, more], generation_prompt=False).partition(
        _MARK
    )
    text = chat.render([_QUESTION, given, more], generation_prompt=False)
    if not (mark and text.startswith(before) and text.endswith(after)):
        raise PromptError(
            f"the chat template of {chat.tokenizer.name!r} writes an answer, or its tool calls, "
            "where the assistant's text does not stand"
        )
    prompt = chat.render([_QUESTION])
    header = before[len(prompt) :] if before.startswith(prompt) else ""
    first = chat.ids(last[2])[:1]
    ender = first[0] if first and first[0] in chat.tokenizer.special_ids else None
    return header, text[len(before) : len(text) - len(after)], ender


def _completion(ids: list[int], ender: int | None) -> Completion:
    ids = [*ids, ender] if ender is not None else ids
    return Completion(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop")
