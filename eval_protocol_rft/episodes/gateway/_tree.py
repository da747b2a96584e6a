"""All calls of one session as a tree: which earlier answer a call goes on from, and what its client
changed in the history that it sends back.

    place = tree.locate(messages, tools, kwargs, thinking_returns=...)
    place.prompt                                  # the ids to send
    tree.answered(place, turn, message)           # what the client was answered

Invariant: an earlier answer is recognised by what it says and calls, never by bytes: text or parts,
null or empty, outer white space, arguments written anew, reasoning left out, all mean the same.
Where the meaning is the same the ids stay those that were sampled. Where it is another the call is
a branch, from the last answer before it that came back unchanged, and what was changed is on
record. No answer is ever joined to a history that did not hold it. A call without an answer leaves
the tree as it was.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eval_protocol_rft import rollout
from eval_protocol_rft.episodes._rendering import EXCERPT, ChatText, first_difference
from eval_protocol_rft.episodes._turns import OnRewrite, Prompt, Turn, begin, follow
from eval_protocol_rft.local import LoadedTokenizer

Message = dict[str, Any]
MOST_CHATS = 256
"""Renderers that are kept: agents whose tools are others in each session make one each time."""


class Node:
    """A message of a conversation: one that a client sent, or an answer that was sampled."""

    __slots__ = ("above", "answers", "children", "ids", "latest", "message", "turn")

    def __init__(self, above: Node | None, message: Message, turn: Turn | None = None) -> None:
        self.above = above
        self.message = message
        """As it was sent or answered, in the chat API's form; of a root the tools."""
        self.turn = turn
        """None where no answer was sampled here."""
        self.answers: int = (above.answers if above else 0) + (turn is not None)
        """That were sampled in this conversation so far."""
        self.ids = frozenset(call["id"] for call in message.get("tool_calls", ()) if call["id"])
        self.children: dict[tuple[Any, ...], list[Node]] = {}
        """By meaning, in the order in which they came. Answers that say the same are told apart by
        the ids of their calls."""
        self.latest: Node | None = None
        """The child that was answered behind, or is an answer, last."""

    def add(self, message: Message, turn: Turn | None = None) -> Node:
        node = Node(self, message, turn)
        self.children.setdefault(meaning(message), []).append(node)
        return node

    def alike(self, message: Message, *, thinking_returns: bool) -> list[Node]:
        """The children that a client may mean by `message`."""
        return [
            node
            for node in self.children.get(meaning(message), ())
            if same_thought(node, message, thinking_returns=thinking_returns)
        ]

    def path(self) -> list[Node]:
        """The nodes from the first message to this one."""
        nodes = [self]
        while nodes[-1].above is not None:
            nodes.append(nodes[-1].above)
        return nodes[-2::-1]  # without the root, which is no message

    def root(self) -> Node:
        node = self
        while node.above is not None:
            node = node.above
        return node

    def tip(self) -> Node:
        """The latest answer of the conversations that hold this message."""
        node = self
        while node.latest is not None:
            node = node.latest
        return node


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


def same_thought(node: Node, message: Message, *, thinking_returns: bool) -> bool:
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
    message: int | None
    """Place of the first message that is another than before; None: the tools are, or the
    arguments of the template."""
    before: str
    """What it was, around the first difference."""
    now: str


@dataclass(slots=True, kw_only=True)
class Place:
    """Where a call stands in the tree."""

    node: Node
    """The last of its messages that the tree has."""
    new: list[Message]
    """Those behind it."""
    prompt: Prompt
    edits: list[Edit]
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
        self._said: dict[tuple[Any, ...], Node] = {}
        """Messages by what they mean: the last answer, the first of others."""
        self.turns: list[tuple[Turn, Node]] = []
        """All answers, in the order in which they were sampled."""

    def locate(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        *,
        thinking_returns: bool,
        named: Collection[Node] = (),
    ) -> Place:
        """Where a call stands, and what to send for it. A call that raises changes nothing.

        Args:
            messages: in the chat API's form.
            tools: likewise.
            kwargs: for the chat template.
            thinking_returns: whether this protocol's clients send thinking back.
            named: messages that the client names; of those that mean the same these are meant.

        Raises:
            PromptError: what it holds cannot be rendered exactly.
            HistoryRewrittenError: the template rewrites history, and the policy is `reject`.
        """
        chat_messages, notes = self._chat(messages)
        key = msgspec.json.encode((tools, kwargs), order="deterministic").decode()
        root, chat = self._roots.get(key) or (
            Node(None, {"tools": key}),
            self._chat_text(key, tools, kwargs),
        )
        path = _longest(root, chat_messages, named, thinking_returns=thinking_returns)
        answer, behind = next(
            ((path[at].turn, at + 1) for at in reversed(range(len(path))) if path[at].turn),
            (None, 0),
        )
        prompt = (
            begin(chat, chat_messages)
            if answer is None
            else follow(answer, chat_messages[behind:], on_rewrite=self._on_rewrite)
        )
        edits = self._edits(chat_messages, path, root, thinking_returns=thinking_returns)
        self._roots[key] = root, chat
        self._calls += 1
        node = path[-1] if path else root
        return Place(
            node=node, new=chat_messages[len(path) :], prompt=prompt, edits=edits, notes=notes
        )

    def answered(self, place: Place, turn: Turn, message: Message) -> Node:
        """A turn was sampled at `place`, and its client was answered with `message`."""
        node = place.node
        for sent in place.new:
            # A call that was sampled meanwhile may have brought the same.
            known = node.alike(sent, thinking_returns=True)
            node = next((one for one in known if one.turn is None), None) or node.add(sent)
            self._said.setdefault(meaning(sent), node)
        place.node, place.new = node, []
        node = node.add(message, turn)
        self._by_id.update(dict.fromkeys(node.ids, node))
        self._said[meaning(message)] = node
        self.turns.append((turn, node))
        below = node
        while below.above is not None:
            below.above.latest = below
            below = below.above
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

    def _edits(
        self,
        messages: Sequence[Message],
        path: Sequence[Node],
        root: Node,
        *,
        thinking_returns: bool,
    ) -> list[Edit]:
        """What changed, where `messages` go another way than a conversation that they are of. One
        that holds no answer changes none: a sub-agent's, or one that begins anew."""
        if len(path) == len(messages) or (path and path[-1].latest is None):
            return []
        if all(message["role"] != "assistant" for message in messages):
            return []
        other = self._meant(messages, path)
        if other is None:
            return []
        before = other.path()
        first = next(
            (
                index
                for index, (node, message) in enumerate(zip(before, messages, strict=False))
                if meaning(node.message) != meaning(message)
                or not same_thought(node, message, thinking_returns=thinking_returns)
            ),
            None,
        )
        edits = []
        if other.root() is not root:
            was, now = _shown(other.root().message["tools"], root.message["tools"])
            edits.append(Edit(call=self._calls, message=None, before=was, now=now))
        if first is not None:
            was, now = _shown(_written(before[first].message), _written(messages[first]))
            edits.append(Edit(call=self._calls, message=first, before=was, now=now))
        return edits

    def _meant(self, messages: Sequence[Message], path: Sequence[Node]) -> Node | None:
        """The answer whose conversation this one was: by the ids of calls that it holds, by what it
        begins with, or by the last answer or other message in it that was there before."""
        for message in reversed(messages[len(path) :]):
            for call in message.get("tool_calls", ()):
                if call["id"] in self._by_id:
                    return self._by_id[call["id"]].tip()
        if path:
            return path[-1].tip()
        said = [message for message in reversed(messages) if message["role"] != "system"]
        said.sort(key=lambda message: message["role"] != "assistant")
        known = (self._said.get(meaning(message)) for message in said)
        return next((node.tip() for node in known if node is not None), None)


def _longest(
    root: Node, messages: Sequence[Message], named: Collection[Node], *, thinking_returns: bool
) -> list[Node]:
    """The nodes of the conversation that holds most of `messages`, from their first on.

    Answers that say the same are told apart by the ids of their calls, or their own; without ids by
    what stands behind them; and if that is the same too, it is the last one.
    """
    ends = [root]
    for message in messages:
        further = [
            child
            for node in ends
            for child in node.alike(message, thinking_returns=thinking_returns)
        ]
        if not further:
            break
        ids = {call["id"] for call in message.get("tool_calls", ())}
        ends = (
            [node for node in further if node in named]
            or [node for node in further if node.ids & ids]
            or further
        )
    return max(reversed(ends), key=lambda node: node.answers).path()


def _written(message: Message) -> str:
    parts = [message["role"], message.get("name"), str(message["content"])]
    if message.get("reasoning_content"):
        parts.append(f"<think>{message['reasoning_content']}</think>")
    parts += [
        f"{call['function']['name']}({call['function']['arguments']})"
        for call in message.get("tool_calls", ())
    ]
    return ": ".join(part for part in parts if part)


def _shown(before: str, now: str) -> tuple[str, str]:
    """Both, from a little before the place where they part."""
    same = first_difference(before, now, 0).index
    start = 0 if same < EXCERPT else same - EXCERPT // 3
    return _excerpt(before, start), _excerpt(now, start)


def _excerpt(text: str, start: int) -> str:
    end = start + 2 * EXCERPT
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
