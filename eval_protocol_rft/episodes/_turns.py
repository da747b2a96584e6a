"""Prompts and turns as a chain that never changes: a prompt stands behind a turn, a turn behind a
prompt. Whoever keeps a turn can say more behind it, once or many times; so conversations branch.

Invariant: sampled ids are kept as they came. Between them stands only what the chat template
renders, with the whole conversation in view, behind what was sent and sampled before; that it does
render all of that unchanged is checked, character by character, at every step. Where it does not,
a new segment begins or an error is raised: ids are never aligned, and never made anew.

Each id is held once, by the prompt that first sent it or the turn that sampled it. The text and the
ids of a whole prompt are made again from the chain where an old turn gets another branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np

from eval_protocol_rft import rollout
from eval_protocol_rft._segments import Segment
from eval_protocol_rft.episodes import _rendering as rendering
from eval_protocol_rft.episodes._rendering import ConversationError
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, TokenIds

OnRewrite = Literal["split", "reject"]


class Prompt:
    """What is sent to be answered. Make one with `begin`, or with `follow` behind a turn."""

    __slots__ = ("_ids", "_text", "behind", "behind_message", "chat", "messages", "new_ids",
                 "rewrite", "size")  # fmt: skip

    def __init__(
        self,
        chat: rendering.ChatText,
        messages: Sequence[dict[str, Any]],
        text: str,
        ids: TokenIds,
        *,
        behind: Turn | None = None,
        behind_message: dict[str, Any] | None = None,
        new_ids: Sequence[int] | None = None,
        rewrite: rendering.Rewrite | None = None,
    ) -> None:
        self.chat = chat
        self.behind = behind
        self.behind_message = behind_message
        """The turn's message as the template was given it here."""
        self.messages = tuple(messages)
        """What is said behind the turn, as `rollout.chat_messages` gives it."""
        self.new_ids: Sequence[int] = ids if new_ids is None else new_ids
        """What the segment does not have from `behind`; all ids where a segment begins."""
        self.rewrite = rewrite
        """Where the template renders what stood before otherwise, so that a segment begins."""
        self.size = len(ids)
        self._text: str | None = text
        self._ids: TokenIds | None = ids

    @property
    def opens_segment(self) -> bool:
        return self.behind is None or self.rewrite is not None

    @property
    def text(self) -> str:
        """The template's rendering of all that is sent."""
        if self._text is None:
            self._text = self.chat.render(self.conversation())
        return self._text

    @property
    def ids(self) -> TokenIds:
        """All that is sent: the segment so far, and what is new."""
        if self._ids is None:
            parts: list[Sequence[int]] = []
            prompt = self
            while prompt._ids is None and prompt.behind is not None and not prompt.opens_segment:
                parts += prompt.new_ids, prompt.behind.completion.token_ids
                prompt = prompt.behind.prompt
            parts.append(prompt.new_ids if prompt._ids is None else prompt._ids)
            self._ids = TokenIds(chain.from_iterable(reversed(parts)))
        return self._ids

    def conversation(self) -> list[dict[str, Any]]:
        """All messages, as the template is given them."""
        parts: list[Sequence[dict[str, Any]]] = []
        prompt = self
        while prompt.behind is not None and prompt.behind_message is not None:
            parts += prompt.messages, (prompt.behind_message,)
            prompt = prompt.behind.prompt
        parts.append(prompt.messages)
        return [message for part in reversed(parts) for message in part]

    def forget_texts(self) -> None:
        """Hold what is new alone. The rest is made again where it is asked for."""
        self._text = None
        if not self.opens_segment:
            self._ids = None


class Turn:
    """An answer that was sampled, exactly as it was. Make one with `answered`."""

    __slots__ = ("again", "completion", "message", "number", "prompt", "tail")

    def __init__(
        self,
        prompt: Prompt,
        completion: Completion,
        message: dict[str, Any],
        *,
        tail: str,
        again: dict[str, Any] | None,
    ) -> None:
        self.prompt, self.completion = prompt, completion
        self.message = message
        """The answer as the template is given it."""
        self.tail = tail
        """The answer as it stands in the text behind the prompt, with the token that ended it:
        where it begins a text, a tokenizer may leave out its first blank."""
        self.again = again
        """The message of `tail`, where its text is another and `message` was made of that."""
        self.number: int = 1 + (prompt.behind.number if prompt.behind else 0)
        """Turns of this conversation so far, this one included."""

    @property
    def kept(self) -> str:
        """The text of all that was sent and sampled."""
        return self.prompt.text + self.tail

    def path(self) -> list[Turn]:
        """The turns of this conversation, in order; this one is the last."""
        turns, turn = [self], self
        while turn.prompt.behind is not None:
            turn = turn.prompt.behind
            turns.append(turn)
        return turns[::-1]


def begin(chat: rendering.ChatText, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """The first prompt of a conversation.

    Raises:
        PromptError: as `rollout.render_chat`.
    """
    given = rollout.chat_messages(messages, chat.tokenizer)
    ids = rollout.render_chat(given, chat.tools, chat.tokenizer, chat.template_kwargs)
    return Prompt(chat, given, chat.render(given), ids)


def answered(
    prompt: Prompt, completion: Completion, message: Mapping[str, Any] | None = None
) -> Turn:
    """The model's answer to `prompt`; its ids and logprobs are kept as they are.

    Args:
        prompt: what was sent.
        completion: what the sampler returned.
        message: the answer as the template shall be given it. Without one it is the sampled text,
            tool calls in it as the model wrote them, and thinking too unless the template reads
            `reasoning_content`; the channels of gpt-oss are fields. With one, whose tool calls are
            fields, the template writes their arguments in its own way: where the model wrote them
            in another, that is a rewrite.

    Raises:
        ConversationError: `message` is not the assistant's.
        PromptError: it holds what no template renders.
    """
    chat, tokenizer = prompt.chat, prompt.chat.tokenizer
    ender, body = tokenizer.ender(completion), tokenizer.decode_body(completion)
    ids = completion.token_ids
    # Four tokens settle how the next is decoded: no character takes more.
    kept = tokenizer.decode_after(prompt.ids[-4:], ids if ender is None else ids[:-1])
    again = None
    if message is None:
        message = _as_sampled(body, prompt.text, tokenizer)
        again = None if kept == body else _as_sampled(kept, prompt.text, tokenizer)
    (given,) = rollout.chat_messages([message], tokenizer)
    if given["role"] != "assistant":
        raise ConversationError(f"an answer is the assistant's, not {given['role']!r}'s")
    tail = kept + ("" if ender is None else chat.text_of(ender))
    turn = Turn(prompt, completion, given, tail=tail, again=again)
    if prompt.behind is not None:
        prompt.behind.prompt.forget_texts()
    return turn


def follow(
    turn: Turn, messages: Sequence[Mapping[str, Any]], *, on_rewrite: OnRewrite = "split"
) -> Prompt:
    """What is sent where `messages` are said behind a turn.

    Its ids are those sent before, those sampled, and the ids of what the template renders behind
    them: where the turn was ended by a token, what stands after that token; where it was ended by a
    stop string or cut off, the template's own end of turn, which is context and was not sampled.

    Raises:
        HistoryRewrittenError: the template rewrites history and the policy is `reject`.
        PromptError: the template cannot render the messages, or drops them.
    """
    chat, tokenizer = turn.prompt.chat, turn.prompt.chat.tokenizer
    new = rollout.chat_messages(messages, tokenizer)
    before, message = turn.prompt.conversation(), turn.message
    conversation = [*before, message, *new]
    text = chat.render(conversation)
    chat.check_seen(conversation, len(new) + 1, text)
    kept, ender = turn.kept, tokenizer.ender(turn.completion)
    if turn.again is not None and not text.startswith(kept):
        other = chat.render([*before, turn.again, *new])
        if other.startswith(kept):
            message, text = turn.again, other
    rewrite = None
    if text.startswith(kept):
        more, segment = text[len(kept) :], (*turn.prompt.ids, *turn.completion.token_ids)
        new_ids = chat.ids_behind(segment, more) if ender is None else chat.ids_after(ender, more)
        ids = TokenIds((*segment, *new_ids))
    else:
        rewrite = rendering.first_difference(kept, text, turn.number)
        if on_rewrite == "reject":
            raise rendering.HistoryRewrittenError(tokenizer.name, rewrite)
        new_ids = chat.ids(text)
        ids = TokenIds(new_ids)
    return Prompt(
        chat, new, text, ids, behind=turn, behind_message=message, new_ids=new_ids, rewrite=rewrite
    )


def segments_of(
    path: Sequence[Turn], is_trained: Callable[[Turn], bool] = lambda turn: True
) -> list[Segment]:
    """The segments of a conversation: what to train on, in order.

    Args:
        path: its turns, as `Turn.path` gives them.
        is_trained: turns for which it says no are context: their loss mask is 0. A segment without
            a trained turn is left out.
    """
    segments: list[Segment] = []
    for number, turn in enumerate(path):
        if number + 1 < len(path) and not path[number + 1].prompt.opens_segment:
            continue
        run = [turn]
        while not run[-1].prompt.opens_segment:
            run.append(path[number - len(run)])
        trained = [one for one in reversed(run) if is_trained(one)]
        if trained:
            segments.append(_segment(trained, trained[-1], run))
    return segments


def _segment(trained: Sequence[Turn], last: Turn, run: Sequence[Turn]) -> Segment:
    """`last`'s prompt and answer, in which those turns are trained; `run` has all their turns."""
    tokens = np.array((*last.prompt.ids, *last.completion.token_ids), dtype=np.int64)
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    mask = np.zeros(len(tokens), dtype=np.float32)
    for turn in trained:
        start = turn.prompt.size
        sampled = slice(start, start + len(turn.completion.token_ids))
        logprobs[sampled] = turn.completion.logprobs
        mask[sampled] = 1.0
    return Segment(
        tokens=tokens,
        logprobs=logprobs,
        loss_mask=mask,
        routing_matrices=_routing(run, len(tokens)),
    )


def _routing(run: Sequence[Turn], size: int) -> list[str] | None:
    """[size] of the answers, where the sampler told it; None where it did not."""
    routing = [""] * size
    for turn in run:
        start, matrices = turn.prompt.size, turn.completion.routing_matrices
        if matrices is not None and start < size:
            routing[start : start + len(matrices)] = matrices
    return routing if any(routing) else None


def with_versions(completions: Sequence[Completion]) -> Completion:
    """The first turn's, with the versions of the weights that sampled all turns."""
    last = completions[-1].policy_version
    every = [v for c in completions for v in (c.first_policy_version, c.policy_version)]
    first = next((version for version in every if version not in (None, last)), None)
    return replace(completions[0], policy_version=last, first_policy_version=first)


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
