"""A sampled turn as the assistant's message: thinking, content and tool calls, each in its field.

Invariant: no text is lost, and the same turn gives the same message wherever it is read (single
turns, episodes, scores of stored rollouts). What was not opened, by the text or by the prompt, is
not closed: the tag is text then. A call is what the model wrote, or a `ParseProblem` that says what
is wrong with it (see `_json_calls`); where calls are malformed there are none, and all is
content.

A chat server reads answers so when it is started with the parsers of its model: docs/parity.md
compares them. Parsers of general libraries close what was left open and lose the good calls beside
a bad one, or raise; that is right for an answer to a user, and wrong for what a policy is rewarded
for.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import _json_calls
from eval_protocol_rft.rollout._json_calls import OPEN, CallProblemError, ParseProblem, Tools
from eval_protocol_rft.rollout._prompts import PromptError
from eval_protocol_rft.rollout._tagged_calls import READERS, ToolFormat, as_calls, read_harmony

if TYPE_CHECKING:
    from eval_protocol.models import Message

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
    shown = next((mark for mark in _MARKS if mark[0] in template), None)
    if shown is None or (shown in _GUESSES and _CALL_TAG.search(template)):
        return None
    return shown[1]


_GUESSES = frozenset(_MARKS[-2:])
"""Those that tell how turns are written, not how calls are."""
_CALL_TAG = re.compile(
    r"[<\[][|｜/]?[\w:]*?(?:tool_?calls?|function_?calls?|tool_list|action|plugin)\w*[|｜]?[>\]]",
    re.IGNORECASE,
)
"""A tag of another form of calls than those that are known here."""


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
            at = _json_calls.json_call(text, at, 0)[2]
        if at > closed:
            closed = text.find(_THOUGHT_CLOSE, at)
    return 0


_LOG = logging.getLogger(__name__)
_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_PROMPT_TAIL = 16
"""Tokens that the end of a prompt is read of: an opened think tag and the blanks behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a sampled turn."""

    message: dict[str, Any]
    """In the chat API's form: role and content, and where there are any, `reasoning_content` and
    `tool_calls`."""
    problem: ParseProblem | None = None
    """Why what was written as tool calls is none."""


class AnswerReader:
    """Reads the answers to one prompt.

    Args:
        prompt_ids: what was answered; they say whether it begins inside a think block.
        tokenizer: its chat template tells how the model writes calls.
        tools: those that the prompt offered. Without any, nothing is a call.
        split_reasoning: put thinking into `reasoning_content`; else it stays in the content.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        tokenizer: LoadedTokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        split_reasoning: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._split = split_reasoning
        self._format = tool_format(tokenizer)
        self._opened = opens_thought(prompt_ids, tokenizer)

    def read(self, text: str) -> Answer:
        """The turn as a message.

        Args:
            text: what was sampled, as `LoadedTokenizer.read` gives it.

        Raises:
            PromptError: there are tools, and how the model calls them cannot be told.
        """
        if self._tools and self._format is None:
            raise PromptError(unknown_format(self._tokenizer.name))
        return self._read(text, self._tools)

    def read_to_record(self, text: str) -> dict[str, Any] | None:
        """The message as a record holds it: None where it is what `answer_fields` reads out of the
        text alone. Where it cannot be told how the model writes calls, they stay text, as with a
        chat server that was started without a parser for them; that is logged, once."""
        tools = self._tools
        if tools and self._format is None:
            _log_unknown(self._tokenizer.name)
            tools = None
        message = self._read(text, tools).message
        return None if message == answer_fields(text, split_reasoning=self._split) else message

    def _read(self, text: str, tools: Sequence[Mapping[str, Any]] | None) -> Answer:
        if self._format == "harmony":
            return _harmony(text, tools=tools, split_reasoning=self._split)
        thought, reasoning, answer = split_thought(text, opened=self._opened)
        if tools and self._format == "qwen3_coder" and reasoning is not None and not answer:
            thought, reasoning, answer = _ended_by_call(thought, reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if reasoning is not None and self._split:
            message["reasoning_content"] = reasoning
        elif thought:
            message["content"] = text
        if not tools or self._format is None:
            return Answer(message=message)
        content, called = read_calls(answer, self._format, tools)
        if isinstance(called, ParseProblem):
            return Answer(message=message, problem=called)
        if called:
            message["content"] = content if self._split else thought + content
            message["tool_calls"] = called
        return Answer(message=message)


@lru_cache
def _log_unknown(name: str) -> None:
    _LOG.warning("%s: evaluators see what the model calls as text. %s", name, unknown_format(name))


def opens_thought(prompt_ids: Sequence[int], tokenizer: LoadedTokenizer) -> bool:
    """Whether the prompt ends inside a think block, so that the turn begins with thinking."""
    tail = tokenizer.decode(list(prompt_ids[-_PROMPT_TAIL:])).rstrip()
    return tail.endswith(tuple(opening for opening, _ in _TAGS))


_CALL_BEGINS = re.compile(r"<tool_call>\s*<function=")


def _ended_by_call(thought: str, reasoning: str) -> tuple[str, str, str]:
    """`split_thought` of a text that is all thought: models that write calls in tags begin one
    without closing the block. A tag that is only spoken of is followed by no function."""
    begun, ends = _CALL_BEGINS.search(thought), _CALL_BEGINS.search(reasoning)
    if not begun or not ends or "</think>" in thought[begun.start() :]:
        return thought, reasoning, ""
    inside = reasoning[: ends.start()].strip("\n")
    return thought[: begun.start()], inside, thought[begun.start() :]


def split_thought(text: str, *, opened: bool) -> tuple[str, str | None, str]:
    """A text in two: its think block as it stands there, and the answer, without the line breaks in
    front of it. Between them what the block holds, None where there is no block. One that is not
    closed goes on to the end."""
    bare = text.lstrip()
    begun = next((tags for tags in _TAGS if bare.startswith(tags[0])), None)
    if begun is None and not opened:
        return "", None, text
    inside = len(text) - len(bare) + len(begun[0]) if begun else 0
    closing = begun[1] if begun else next((c for _, c in _TAGS if c in text), _TAGS[0][1])
    end = text.find(closing, inside)
    if end < 0:
        return text, text[inside:].strip("\n"), ""
    after = end + len(closing)
    return text[:after], text[inside:end].strip("\n"), text[after:].lstrip("\n")


def _harmony(
    text: str, *, tools: Sequence[Mapping[str, Any]] | None, split_reasoning: bool
) -> Answer:
    channels = read_harmony(text)
    reasoning = channels.reasoning
    message: dict[str, Any] = {"role": "assistant", "content": channels.content}
    if not split_reasoning and reasoning is not None:
        message["content"] = text
    elif reasoning is not None:
        message["reasoning_content"] = reasoning
    if not channels.has_calls:
        return Answer(message=message)
    if not tools:
        return Answer(message={**message, "content": channels.unread})
    try:
        message["tool_calls"] = as_calls(channels.calls(), "harmony")
    except CallProblemError as found:
        return Answer(message={**message, "content": channels.unread}, problem=found.problem)
    return Answer(message=message)


def recorded_answers(
    texts: Sequence[str],
    messages: Sequence[Mapping[str, Any] | None] | None,
    *,
    split_reasoning: bool,
) -> list[dict[str, Any]]:
    """The assistant's message of each completion of a record: its own where it has one
    (`completion_messages`), else what `answer_fields` reads out of its text."""
    return [
        dict(message)
        if message is not None
        else answer_fields(text, split_reasoning=split_reasoning)
        for text, message in zip(texts, messages or [None] * len(texts), strict=True)
    ]


def assistant_message(text: str, *, split_reasoning: bool) -> Message:
    """`answer_fields` as an Eval Protocol message."""
    return as_message(answer_fields(text, split_reasoning=split_reasoning))


def as_message(fields: Mapping[str, Any]) -> Message:
    """An assistant's message in the chat API's form as Eval Protocol's."""
    from eval_protocol.models import Message

    return Message(**{"content": "", **fields})


def is_same_answer(message: Message, other: Message) -> bool:
    """Whether two messages say and call the same."""
    return _statement(message) == _statement(other)


def _statement(message: Message) -> tuple[Any, ...]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.role, message.content or "", message.reasoning_content, calls


def chat_finish_reason(finish_reason: str, tool_calls: Sequence[Any] | None) -> str:
    """As a chat server says it: `tool_calls` where the model stopped to have tools called. What
    was cut off stays `length`, whatever was called before."""
    return "tool_calls" if tool_calls and finish_reason == "stop" else finish_reason


def answer_fields(text: str, *, split_reasoning: bool) -> dict[str, Any]:
    """An assistant message of the completion's text alone, where nothing is known of its prompt.
    With `split_reasoning` a closed `<think>...</think>` block at its start (opened in the text, or
    by the prompt as some templates do) goes to `reasoning_content`; a block that was never closed
    stays in the content. `AnswerReader` knows more.
    """
    if split_reasoning:
        before, closed, after = text.partition("</think>")
        opened, thought = _opened(before)
        if closed and opened:
            return {
                "role": "assistant",
                "content": after.lstrip("\n"),
                "reasoning_content": thought.strip("\n"),
            }
    return {"role": "assistant", "content": text}


def _opened(before: str) -> tuple[bool, str]:
    """Whether `before` is the inside of a think block that is then closed, and that inside."""
    stripped = before.lstrip()
    if stripped.startswith("<think>"):
        return True, stripped.removeprefix("<think>")
    return "<think>" not in before, before
