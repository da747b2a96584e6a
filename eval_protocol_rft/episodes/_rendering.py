"""A conversation as the text that its chat template renders, and the ids of what is new in it.

Invariant: text comes from the template with the whole conversation in view, never from one message
alone; what the template would drop in silence is an error.

Cost: ids are made of new text only. A rendering is linear in the conversation, for a template runs
over all messages: 7 to 25 microseconds a message, one rendering a turn. Eight turns of an episode
take 3 ms in all; the four-hundredth takes 10 to 20 ms.

What can keep a conversation from going on as it was.

Invariant: a conversation that raised one of these is as it was before the call; what was sampled
until then stays usable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import SEVERAL_CALLS, PromptError, as_template_reads, with_one_call

_CONTEXT = 4
"""Tokens before a text that settle how it is decoded: no character takes more."""
_ANCHORS = ("a", ".", "0", "\n")
"""What a text is read behind where the token before it would merge with it."""


class ChatText:
    """Renders conversations that begin with the same tools and template arguments."""

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.tools, self.template_kwargs = tokenizer, tools, template_kwargs
        self._rendered: set[str] = set()
        """Roles, and `tool_calls`, that the template is known not to drop."""
        self._texts: dict[int, str] = {}
        """Of control tokens."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> str:
        """Text of `messages`, as `rollout.chat_messages` gives them, and of the assistant's header
        behind them.

        Raises:
            PromptError: the template fails, or arguments of a tool call are not JSON.
        """
        chat: Any = as_template_reads(messages, self.tools, self.tokenizer)
        try:
            text = self.tokenizer.tokenizer.apply_chat_template(
                chat,
                tools=[dict(tool) for tool in self.tools] if self.tools else None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        # A template is a program: besides its own errors it raises what its expressions raise.
        except Exception as error:
            raise PromptError(
                f"the chat template of {self.tokenizer.name!r} failed on {len(chat)} messages: "
                f"{type(error).__name__}: {error}"
            ) from error
        return str(text)

    def check_seen(self, messages: Sequence[Mapping[str, Any]], new: int, text: str) -> None:
        """See that `text`, the rendering of `messages`, shows the last `new` of them. A role is
        looked at once, and so are tool calls.

        Raises:
            PromptError: it is the same text without them.
        """
        for index in range(len(messages) - new, len(messages)):
            message = messages[index]
            without = [*messages[:index], *messages[index + 1 :]]
            self._check_shown(f"the role {message['role']!r}", without, text)
            if "tool_calls" in message:
                silent = {k: v for k, v in message.items() if k != "tool_calls"}
                without = [*messages[:index], silent, *messages[index + 1 :]]
                self._check_shown("tool calls", without, text)
                if len(message["tool_calls"]) > 1:
                    without = [*messages[:index], with_one_call(message), *messages[index + 1 :]]
                    self._check_shown(SEVERAL_CALLS, without, text)

    def _check_shown(self, what: str, without: list[Mapping[str, Any]], text: str) -> None:
        if what in self._rendered:
            return
        try:
            dropped = self.render(without) == text
        except PromptError:
            dropped = False  # a template that insists on it does render it
        if dropped:
            raise PromptError(
                f"the chat template of {self.tokenizer.name!r} does not render {what}: the model "
                "would never see what was appended"
            )
        self._rendered.add(what)

    def ids(self, text: str) -> list[int]:
        """Ids of a whole rendering, as `apply_chat_template` makes them.

        Raises:
            PromptError: it is no text (half a surrogate pair).
        """
        try:
            return self.tokenizer.encode(text)
        except (TypeError, ValueError) as error:
            raise PromptError(
                f"tokenizer {self.tokenizer.name!r} cannot read what was appended: {error}"
            ) from error

    def text_of(self, control: int) -> str:
        """Of a control token; a conversation meets the same one at every turn."""
        if control not in self._texts:
            self._texts[control] = self.tokenizer.decode([control])
        return self._texts[control]

    def ids_behind(self, before: Sequence[int], text: str) -> list[int]:
        """Ids of `text` where it follows the text of `before`, which keeps its own.

        A tokenizer may begin every text with a blank of its own (SentencePiece); then it is read
        behind something else, which is cut off again.
        """
        tokenizer, context = self.tokenizer, before[-_CONTEXT:]
        alone = self.ids(text)
        if tokenizer.decode_after(context, alone) == text:
            return alone
        for anchor in (tokenizer.decode(list(before[-1:])), *_ANCHORS):
            head, both = self.ids(anchor), self.ids(anchor + text)
            ids = both[len(head) :]
            if both[: len(head)] == head and tokenizer.decode_after(context, ids) == text:
                return ids
        return alone  # a tokenizer that reads texts otherwise than they are

    def ids_after(self, ender: int, text: str) -> list[int]:
        """Ids of `text` where it follows the control token `ender`.

        They are read together: a tokenizer may treat the start of a text in its own way, and a
        control token may swallow the blanks around it.

        Raises:
            PromptError: the tokenizer does not read the control token's own text as that token.
        """
        shown = self.text_of(ender)
        ids = self.ids(shown + text)
        if ids[:1] != [ender]:
            raise PromptError(
                f"tokenizer {self.tokenizer.name!r} reads {shown!r}, the text of its control token "
                f"{ender}, as {ids[:4]}: what follows a turn cannot be joined to it exactly"
            )
        return ids[1:]


EXCERPT = 60
"""Characters shown of each side, from a little before they part."""
_BEFORE = 20


class ConversationError(EvalProtocolRftError, RuntimeError):
    """A conversation cannot take this step. A RuntimeError, as a `SamplingError` is: Eval Protocol
    does not resample on those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """Where a template no longer renders what was sent and sampled before."""

    turn: int
    """Assistant turns sampled before the messages that brought it about."""
    index: int
    """First character, in the text of all that was sent and sampled, that differs."""
    kept: str
    """A short excerpt of what was sent and sampled, around `index`."""
    rendered: str
    """The same place as the template now renders it."""


class HistoryRewrittenError(ConversationError):
    """The template writes earlier tokens anew, and the policy is `reject`."""

    def __init__(self, name: str, rewrite: Rewrite) -> None:
        super().__init__(
            f"the chat template of {name!r} rewrites history after turn {rewrite.turn}: at "
            f"character {rewrite.index}, {rewrite.kept!r} became {rewrite.rendered!r}. Use a "
            'template that only appends (see template_report), or on_rewrite="split"'
        )
        self.rewrite = rewrite


def first_difference(kept: str, rendered: str, turn: int) -> Rewrite:
    """Where `rendered` leaves `kept`, which it does not begin with."""
    low, high = 0, min(len(kept), len(rendered))
    # Slices compare at the speed of memory: the texts are long, and differ once.
    while low < high:
        middle = (low + high + 1) // 2
        if kept[low:middle] == rendered[low:middle]:
            low = middle
        else:
            high = middle - 1
    start = max(0, low - _BEFORE)
    return Rewrite(
        turn=turn,
        index=low,
        kept=kept[start : start + EXCERPT],
        rendered=rendered[start : start + EXCERPT],
    )
