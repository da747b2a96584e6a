"""One episode's conversation with a model, exact to the token.

    talk = Conversation.start(messages, tools, tokenizer)
    talk.sampled(await sampler.sample(talk.prompt_ids, params))
    talk.append([{"role": "tool", "content": "3"}])        # the next talk.prompt_ids
    ...
    talk.segments()

Invariant: sampled ids are kept as they came. Between them stands only what the chat template
renders, with the whole conversation in view, behind what was sent and sampled before; that it does
render all of that unchanged is checked, character by character, at every step. Where it does not,
a new segment begins or an error is raised: ids are never aligned, and never made anew.

What was sent and sampled, as ids: segments to train on, turns as they went over the wire.

Invariant: every sampled id is in exactly one segment, once, with `loss_mask` 1 and its own logprob;
every other id has 0 and 0.0. A segment begins with what was sent and ends with what was sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from eval_protocol_rft import rollout
from eval_protocol_rft._segments import Segment as Segment
from eval_protocol_rft._segments import turn_trace
from eval_protocol_rft.episodes import _rendering as rendering
from eval_protocol_rft.episodes._rendering import ConversationError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, TokenIds


class OpenSegment:
    """A segment that turns are added to. It holds each id once, however many turns sent it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.turns: list[tuple[int, Completion]] = []
        """Where each turn's sampled ids begin, and the completion they are of."""

    def add(self, new_ids: Sequence[int], completion: Completion) -> None:
        """A turn: ids sent that were not yet there, then what was sampled."""
        self.ids.extend(new_ids)
        self.turns.append((len(self.ids), completion))
        self.ids.extend(completion.token_ids)

    def close(self) -> Segment:
        """The segment so far."""
        logprobs = np.zeros(len(self.ids), dtype=np.float32)
        mask = np.zeros(len(self.ids), dtype=np.float32)
        for start, completion in self.turns:
            sampled = slice(start, start + len(completion.token_ids))
            logprobs[sampled] = completion.logprobs
            mask[sampled] = 1.0
        return Segment(tokens=np.array(self.ids, dtype=np.int64), logprobs=logprobs, loss_mask=mask)

    def traces(self) -> Iterator[dict[str, Any]]:
        """Its turns, each with the whole prompt that was sent."""
        for start, completion in self.turns:
            ids, logprobs = list(completion.token_ids), list(completion.logprobs)
            yield turn_trace(self.ids[:start], ids, logprobs, completion.finish_reason)


OnRewrite = Literal["split", "reject"]


class Conversation:
    """What was sent to a model and sampled from it. Make one with `start`, then take turns:
    `sampled`, `append`, `sampled`, ... An error leaves it as it was."""

    def __init__(
        self,
        chat: rendering.ChatText,
        messages: Sequence[dict[str, Any]],
        prompt_ids: TokenIds,
        *,
        on_rewrite: OnRewrite = "split",
    ) -> None:
        """`start` makes one: `prompt_ids` are those of `messages`, which are as
        `rollout.chat_messages` gives them."""
        if on_rewrite not in ("split", "reject"):
            raise ValueError(f"on_rewrite must be 'split' or 'reject', not {on_rewrite!r}")
        self._chat = chat
        self._messages = list(messages)
        self._on_rewrite = on_rewrite
        self._text = chat.render(messages)
        """The template's rendering of all that was sent; what was sampled last is not yet in it."""
        self._last: Completion | None = None
        """A sampled turn that nothing was appended to yet."""
        self._kept = ""
        """All that was sent, and `_last` as it stands behind it: where it begins a text, a
        tokenizer may leave out its first blank."""
        self._again: dict[str, Any] | None = None
        """The message that holds `_last` as it was kept, where its text is another and the message
        was made of that."""
        self._prompt_ids = prompt_ids
        self._new_ids: Sequence[int] = prompt_ids
        """What of `prompt_ids` is not yet in the last segment."""
        self._segments: list[OpenSegment] = []
        self._opens_segment = True
        self._rewrites: list[rendering.Rewrite] = []

    @classmethod
    def start(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        tokenizer: LoadedTokenizer,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        on_rewrite: OnRewrite = "split",
    ) -> Conversation:
        """A conversation whose `prompt_ids` are to be answered.

        Args:
            messages: what stands before the first sampled turn, in the chat API's form.
            tools: in the chat API's form; the same for the whole conversation.
            tokenizer: its chat template is what renders.
            template_kwargs: passed to the template.
            on_rewrite: what to do where the template renders earlier turns differently once more
                is appended (thinking stripped, arguments written anew, a system message moved):
                `split` begins a new segment whose prompt is what the template renders then, and
                records it in `rewrites`; `reject` raises `HistoryRewrittenError`.

        Raises:
            PromptError: as `rollout.render_chat`.
        """
        kwargs = dict(template_kwargs or {})
        given = rollout.chat_messages(messages, tokenizer)
        ids = rollout.render_chat(given, tools, tokenizer, kwargs)
        return cls(rendering.ChatText(tokenizer, tools, kwargs), given, ids, on_rewrite=on_rewrite)

    def begun_again(self) -> Conversation:
        """Another one with the same beginning, which is not rendered again. Nothing was sampled in
        this one yet."""
        other = copy.copy(self)
        other._messages, other._segments, other._rewrites = list(self._messages), [], []
        return other

    @property
    def prompt_ids(self) -> TokenIds:
        """The ids to send next; after `sampled`, those that were sent last."""
        return self._prompt_ids

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the template is given it."""
        return list(self._messages)

    @property
    def sent_tokens(self) -> int:
        """Tokens of all requests that were answered, each with its whole prompt."""
        return sum(start for segment in self._segments for start, _ in segment.turns)

    @property
    def rewrites(self) -> tuple[rendering.Rewrite, ...]:
        """Where the template rewrote history, one for each split."""
        return tuple(self._rewrites)

    def sampled(
        self, completion: Completion, message: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Take the model's answer to `prompt_ids`; its ids and logprobs are kept as they are.

        Args:
            completion: what the sampler returned.
            message: the answer as the template shall be given it. Without one it is the sampled
                text, tool calls in it as the model wrote them, and thinking too unless the template
                reads `reasoning_content`; the channels of gpt-oss are fields. With one, whose tool
                calls are fields, the template writes their arguments in its own way: where the
                model wrote them in another, that is a rewrite.

        Returns:
            The message that the template is given.

        Raises:
            ConversationError: the last answer has had no reply yet.
            PromptError: `message` holds what no template renders.
        """
        if self._last is not None:
            raise ConversationError("two turns in a row: append what came between them first")
        tokenizer = self._chat.tokenizer
        ender, body = tokenizer.ender(completion), tokenizer.decode_body(completion)
        ids = completion.token_ids
        # Four tokens settle how the next is decoded: no character takes more.
        kept = tokenizer.decode_after(self._prompt_ids[-4:], ids if ender is None else ids[:-1])
        again = None
        if message is None:
            message = _as_sampled(body, self._text, tokenizer)
            again = None if kept == body else _as_sampled(kept, self._text, tokenizer)
        (given,) = rollout.chat_messages([message], tokenizer)
        if given["role"] != "assistant":
            raise ConversationError(f"an answer is the assistant's, not {given['role']!r}'s")
        if self._opens_segment:
            self._segments.append(OpenSegment())
            self._opens_segment = False
        self._segments[-1].add(self._new_ids, completion)
        self._messages.append(given)
        self._last, self._again = completion, again
        self._kept = self._text + kept + ("" if ender is None else self._chat.text_of(ender))
        self._new_ids = ()
        return dict(given)

    def append(self, messages: Sequence[Mapping[str, Any]]) -> TokenIds:
        """Say more: tool results, feedback, a question. Returns the next `prompt_ids`.

        They are those sent before, those sampled, and the ids of what the template renders behind
        them: where the turn was ended by a token, what stands after that token; where it was ended
        by a stop string, the template's own end of turn, which is context and was not sampled.

        Raises:
            ConversationError: the last turn was cut off at its token limit.
            HistoryRewrittenError: the template rewrites history and the policy is `reject`.
            ConversationError: there is no answer to append to, or nothing to append.
            PromptError: the template cannot render the messages, or drops them.
        """
        if self._last is None:
            raise ConversationError("nothing was sampled since the last append: call sampled first")
        if not messages:
            raise ConversationError("no messages to append")
        if self._last.truncated:
            raise ConversationError(
                f"turn {self._turns} was cut off at its token limit: nothing can be said after a "
                "turn that has no end. End the episode, or allow more tokens per turn"
            )
        new = rollout.chat_messages(messages, self._chat.tokenizer)
        chat = [*self._messages, *new]
        text = self._chat.render(chat)
        self._chat.check_seen(chat, len(new) + 1, text)
        kept, ender = self._kept, self._chat.tokenizer.ender(self._last)
        if self._again is not None and not text.startswith(kept):
            blank = [*self._messages[:-1], self._again, *new]
            if (other := self._chat.render(blank)).startswith(kept):
                chat, text = blank, other
        if text.startswith(kept):
            more, sampled = text[len(kept) :], self._segments[-1].ids
            new_ids = (
                self._chat.ids_behind(sampled, more)
                if ender is None
                else self._chat.ids_after(ender, more)
            )
            prompt_ids = TokenIds((*self._segments[-1].ids, *new_ids))
        else:
            rewrite = rendering.first_difference(kept, text, self._turns)
            if self._on_rewrite == "reject":
                raise rendering.HistoryRewrittenError(self._chat.tokenizer.name, rewrite)
            new_ids = self._chat.ids(text)
            prompt_ids = TokenIds(new_ids)
            self._rewrites.append(rewrite)
            self._opens_segment = True
        self._messages, self._text, self._last = chat, text, None
        self._new_ids, self._prompt_ids = new_ids, prompt_ids
        return prompt_ids

    def segments(self) -> list[Segment]:
        """What to train on, in order. What was appended and not answered is not in it."""
        return [segment.close() for segment in self._segments]

    def turns(self) -> list[dict[str, Any]]:
        """Every request and its answer, in order, as entries of `token_turn_traces`: `prompt_ids`,
        `completion_ids`, `completion_logprobs` (nats, of sampling) and `finish_reason`."""
        return [trace for segment in self._segments for trace in segment.traces()]

    @property
    def _turns(self) -> int:
        return sum(len(segment.turns) for segment in self._segments)


def _as_sampled(text: str, prompt: str, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """The sampled text as a message that a template is most likely to render as it was."""
    if rollout.tool_format(tokenizer) == "harmony":
        return rollout.read_harmony(text).for_template()
    bare = prompt.rstrip()
    opened = prompt[len(bare) - len("<think>") :] if bare.endswith("<think>") else ""
    thinks = opened or text.lstrip().startswith("<think>")
    template = str(tokenizer.tokenizer.chat_template)
    if thinks and "reasoning_content" in rollout.fields_read(template):
        fields = rollout.answer_fields(text, split_reasoning=True)
        if "reasoning_content" in fields:
            return fields
    # A think tag that the prompt opened is a part of the answer to those templates that keep it.
    return {"role": "assistant", "content": opened + text}
