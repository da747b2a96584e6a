"""gpt-oss's answers: messages in channels (OpenAI's harmony format).

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}
    <|start|>assistant<|channel|>final<|message|>...

Invariant: every message is in one channel, and no text is lost: what has no header that can be
read is content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft.rollout._call_formats import as_calls
from eval_protocol_rft.rollout._call_parts import Call, CallProblemError, json_arguments

_MESSAGE = "<|message|>"
_ENDS = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|(?:start|channel)\|>)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


@dataclass(frozen=True, slots=True)
class _Message:
    channel: str
    recipient: str | None
    body: str
    raw: str
    """With its header."""


@dataclass(frozen=True, slots=True)
class Channels:
    """An answer, by channel."""

    messages: Sequence[_Message]

    @property
    def reasoning(self) -> str | None:
        """What was said in `analysis`; None where nothing was."""
        thoughts = [m.body for m in self.messages if m.channel == "analysis" and not m.recipient]
        return "\n".join(thoughts) if thoughts else None

    @property
    def content(self) -> str:
        """What a user is shown: `final`, and `commentary` to nobody."""
        return "\n".join(m.body for m in self.messages if m.recipient is None and _is_shown(m))

    @property
    def unread(self) -> str:
        """All but the reasoning, as it was sampled."""
        return "".join(m.raw for m in self.messages if m.recipient or _is_shown(m))

    @property
    def has_calls(self) -> bool:
        """Whether anything is said to a tool."""
        return any(m.recipient for m in self.messages)

    def calls(self) -> list[Call]:
        """The calls of functions.

        Raises:
            CallProblemError: arguments that are no JSON object, or a call of something else.
        """
        calls: list[Call] = []
        for message in self.messages:
            if message.recipient is None:
                continue
            where = f"Tool call {len(calls) + 1}"
            if not message.recipient.startswith(_FUNCTIONS):
                raise CallProblemError(
                    "shape",
                    f"{where} is to {message.recipient[:80]!r}: tools are called as "
                    "to=functions.NAME.",
                )
            arguments = json_arguments(message.body, where)
            calls.append((message.recipient.removeprefix(_FUNCTIONS), arguments))
        return calls

    def for_template(self) -> dict[str, Any]:
        """The answer as gpt-oss's chat template takes it: with calls as fields, no control tokens
        in any text, and beside calls either thinking or content. What is no call that can be read
        is content."""
        content, thinking = self.content, self.reasoning
        message: dict[str, Any] = {"role": "assistant"}
        try:
            calls = self.calls()
        except CallProblemError:
            calls = []
            content = "\n".join(m.body for m in self.messages if m.recipient or _is_shown(m))
        if calls:
            message["tool_calls"] = as_calls(calls, "harmony")
            content = "" if thinking else content
        if thinking:
            message["reasoning_content"] = thinking
        return {**message, "content": content}


def _is_shown(message: _Message) -> bool:
    return message.channel != "analysis"


def read_harmony(text: str) -> Channels:
    """An answer that was sampled behind `<|start|>assistant`, without the token that ended it."""
    messages: list[_Message] = []
    at = 0
    while at < len(text):
        opened = text.find(_MESSAGE, at)
        if opened < 0:
            messages.append(_Message("final", None, text[at:], text[at:]))
            break
        header = text[at:opened]
        body_at = opened + len(_MESSAGE)
        end = _ENDS.search(text, body_at)
        stop, after = (end.start(), end.end()) if end else (len(text), len(text))
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        messages.append(
            _Message(
                channel.group(1) if channel else "final",
                recipient.group(1) if recipient else None,
                text[body_at:stop],
                text[at:after],
            )
        )
        at = after
    return Channels(messages)
