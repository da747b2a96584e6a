"""All calls of one session as a tree: which earlier answer a call goes on from, and what its client
changed in the history that it sends back.

    place = tree.locate(messages, tools, kwargs, thinking_returns=...)
    place.prompt                                  # the ids to send
    tree.answered(place, turn, message)           # what the client was answered

Invariant: an earlier answer is recognised by what it says and calls, never by bytes: text or parts,
null or empty, outer white space, arguments written anew, reasoning left out, all mean the same.
Where the meaning is the same the ids stay those that were sampled. Where it is another the call is
a branch, from the last answer before it that came back unchanged, and what was changed is on
record. No answer is ever joined to a history that did not hold it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eval_protocol_rft import rollout
from eval_protocol_rft.episodes._rendering import EXCERPT, ChatText
from eval_protocol_rft.episodes._turns import OnRewrite, Prompt, Turn, begin, follow
from eval_protocol_rft.local import LoadedTokenizer

Message = dict[str, Any]
MOST_CHATS = 256
"""Renderers that are kept: agents whose tools are others in each session make one each time."""


class Node:
    """A message of a conversation: one that a client sent, or an answer that was sampled."""

    __slots__ = ("above", "children", "ids", "message", "turn")

    def __init__(self, above: Node | None, message: Message, turn: Turn | None = None) -> None:
        self.above = above
        self.message = message
        """As it was sent or answered, in the chat API's form."""
        self.turn = turn
        """None where no answer was sampled here."""
        self.ids = frozenset(call["id"] for call in message.get("tool_calls", ()) if call["id"])
        self.children: dict[tuple[Any, ...], list[Node]] = {}
        """By meaning, in the order in which they came. Answers that say the same are told apart by
        the ids of their calls."""

    def add(self, message: Message, turn: Turn | None = None) -> Node:
        node = Node(self, message, turn)
        self.children.setdefault(meaning(message), []).append(node)
        return node

    def find(self, message: Message, *, thinking_returns: bool) -> Node | None:
        """The child that a client means by `message`."""
        alike = [
            node
            for node in self.children.get(meaning(message), ())
            if _same_thought(node, message, thinking_returns=thinking_returns)
        ]
        ids = {call["id"] for call in message.get("tool_calls", ())}
        found = [node for node in alike if node.ids & ids] or alike
        return found[-1] if found else None

    def path(self) -> list[Node]:
        """The nodes from the first message to this one."""
        nodes = [self]
        while nodes[-1].above is not None:
            nodes.append(nodes[-1].above)
        return nodes[-2::-1]  # without the root, which is no message


def meaning(message: Message) -> tuple[Any, ...]:
    """What a message says and calls; equal for all ways in which clients write the same."""
    role, content = message["role"], message["content"]
    if role != "assistant":
        return role, content, message.get("name") if role != "tool" else None
    calls = tuple(
        (call["function"]["name"], plain_arguments(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    )
    return role, content.strip(), calls


def plain_arguments(text: str) -> str:
    """Arguments of a call in one spelling: keys in order, no blanks, whole numbers without a point.
    What is no JSON stays as it is."""
    try:
        value = json.loads(text or "{}")
        return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _same_thought(node: Node, message: Message, *, thinking_returns: bool) -> bool:
    """Whether the thinking that comes back is what was thought. Clients of two protocols leave it
    out; in the third one (Anthropic's) it comes back unless the agent takes it away."""
    if message["role"] != "assistant":
        return True
    kept, sent = (one.get("reasoning_content") for one in (node.message, message))
    if not sent:
        return (node.turn is not None and not (kept and thinking_returns)) or not kept
    return str(kept or "").strip() == str(sent).strip()


class Edit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client changed in a history that it sent back."""

    call: int
    """Number of the call in its session, from 0."""
    message: int
    """Place of the first message that is another than before."""
    before: str | None
    """What it was, shortened; None where there was none."""
    now: str | None
    """What it is; None where it is left out."""


@dataclass(slots=True, kw_only=True)
class Place:
    """Where a call stands in the tree."""

    node: Node
    """The last message of the call."""
    prompt: Prompt
    edit: Edit | None
    notes: list[str] = field(default_factory=list)
    """What was rendered otherwise than it was sent."""


class CallTree:
    """The calls of one session.

    Args:
        tokenizer: its chat template renders.
        on_rewrite: as for `Conversation.start`.
        chats: renderers by tools and template arguments, which sessions share: each looks once what
            its template drops.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        *,
        on_rewrite: OnRewrite = "split",
        chats: dict[str, ChatText] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._on_rewrite = on_rewrite
        self._chats = {} if chats is None else chats
        self._roots: dict[str, tuple[Node, ChatText]] = {}
        """By tools and template arguments, which stand before or between all messages."""
        self._calls = 0
        self._by_id: dict[str, Node] = {}
        """Answers by the ids of their calls."""
        self.turns: list[tuple[Turn, Node]] = []
        """All answers, in the order in which they were sampled."""

    def locate(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        *,
        thinking_returns: bool,
    ) -> Place:
        """Where a call stands, and what to send for it. A call that raises changes nothing.

        Args:
            messages: in the chat API's form.
            tools: likewise.
            kwargs: for the chat template.
            thinking_returns: whether this protocol's clients send thinking back.

        Raises:
            PromptError: what it holds cannot be rendered exactly.
            HistoryRewrittenError: the template rewrites history, and the policy is `reject`.
        """
        chat_messages, notes = self._chat(messages)
        key = msgspec.json.encode((tools, kwargs), order="deterministic").decode()
        root, chat = self._roots.get(key) or (Node(None, {}), self._chat_text(key, tools, kwargs))
        node, matched, answer, behind = root, 0, None, 0
        for number, message in enumerate(chat_messages, start=1):
            child = node.find(message, thinking_returns=thinking_returns)
            if child is None:
                break
            node, matched = child, number
            if child.turn is not None:
                answer, behind = child.turn, number
        prompt = (
            begin(chat, chat_messages)
            if answer is None
            else follow(answer, chat_messages[behind:], on_rewrite=self._on_rewrite)
        )
        edit = self._edit(chat_messages, node, matched, is_new=answer is None)
        self._roots[key] = root, chat
        self._calls += 1
        for message in chat_messages[matched:]:
            node = node.add(message)
        return Place(node=node, prompt=prompt, edit=edit, notes=notes)

    def answered(self, place: Place, turn: Turn, message: Message) -> Node:
        """A turn was sampled at `place`, and its client was answered with `message`."""
        node = place.node.add(message, turn)
        self._by_id.update(dict.fromkeys(node.ids, node))
        self.turns.append((turn, node))
        return node

    def _chat_text(
        self, key: str, tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> ChatText:
        if len(self._chats) > MOST_CHATS:
            self._chats.clear()
        if key not in self._chats:
            self._chats[key] = ChatText(self._tokenizer, tools, dict(kwargs))
        return self._chats[key]

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[str]]:
        """Messages as the template is given them, and what of them is written otherwise."""
        filled = [one if "content" in one else {"content": "", **one} for one in messages]
        chat = rollout.chat_messages(filled, self._tokenizer)
        notes = rollout.rendered_otherwise(filled, self._tokenizer)
        for index, message in enumerate(chat[1:], start=1):
            if message["role"] == "system" and not rollout.knows_later_system(self._tokenizer):
                message["role"] = "user"
                notes.append(f"messages[{index}]: a later system message as the user's")
        return chat, notes

    def _edit(
        self, messages: Sequence[Message], node: Node, matched: int, *, is_new: bool
    ) -> Edit | None:
        """What changed, where `messages` go another way than a conversation that they are of. One
        that holds no answer changes none: a sub-agent's, or one that begins anew."""
        if matched == len(messages) or (matched and not node.children):
            return None
        if is_new and all(message["role"] != "assistant" for message in messages):
            return None
        other = self._meant(messages, node, matched)
        if other is None:
            return None
        before = [one.message for one in other.path()]
        first = next(
            (
                index
                for index, (old, new) in enumerate(zip(before, messages, strict=False))
                if meaning(old) != meaning(new) or _thoughts_differ(old, new)
            ),
            min(len(before), len(messages)),
        )
        old, new = (_shown(one, first) for one in (before, messages))
        return None if old == new else Edit(call=self._calls, message=first, before=old, now=new)

    def _meant(self, messages: Sequence[Message], node: Node, matched: int) -> Node | None:
        """The answer whose conversation this one was: by the ids of calls that it holds, by what it
        begins with, or by a message of the latest one."""
        for message in reversed(messages[matched:]):
            for call in message.get("tool_calls", ()):
                if call["id"] in self._by_id:
                    return self._by_id[call["id"]]
        if matched:
            return _latest_under(node)
        if not self.turns:
            return None
        latest = self.turns[-1][1]
        said = {meaning(one.message) for one in latest.path() if one.message["role"] != "system"}
        return latest if any(meaning(message) in said for message in messages) else None


def _latest_under(node: Node) -> Node:
    while node.children:
        node = list(node.children.values())[-1][-1]
    return node


def _thoughts_differ(old: Message, new: Message) -> bool:
    return bool(old.get("reasoning_content")) and not new.get("reasoning_content")


def _shown(messages: Sequence[Message], index: int) -> str | None:
    if index >= len(messages):
        return None
    message = messages[index]
    parts = [message["role"], str(message["content"])]
    if message.get("reasoning_content"):
        parts.append(f"<think>{message['reasoning_content']}</think>")
    parts += [f"{c['function']['name']}({c['function']['arguments']})" for c in
              message.get("tool_calls", ())]  # fmt: skip
    text = ": ".join(part for part in parts if part)
    return text if len(text) <= 2 * EXCERPT else f"{text[: 2 * EXCERPT]}..."
