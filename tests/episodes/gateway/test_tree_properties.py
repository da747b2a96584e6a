"""Whatever agents do in a session, its calls are kept as a tree that brute force builds too, and
each sampled token is trained as often as the session says, behind the ids it was sampled behind.

The reference keeps plain lists of messages and answers. It compares a call with each earlier
conversation, message by message, and builds the segments from what went over the wire.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import msgspec
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval_protocol_rft.episodes.gateway._call import CallError
from eval_protocol_rft.episodes.gateway._server import Gateway
from eval_protocol_rft.episodes.gateway._session import Session
from eval_protocol_rft.episodes.gateway._settings import SessionSettings
from eval_protocol_rft.sampling import Completion, SamplingParams
from tests.episodes.gateway.random_agents import (
    APIS,
    EVERY,
    FAMILIES,
    REAL,
    STOP,
    Answer,
    BytesPolicy,
    Family,
    Message,
    Style,
    answers,
    answers_in,
    as_sent,
    body_of,
    read_chat,
    styles,
    tokenizer_of,
    told,
)
from tests.waiting import PATIENCE

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOLS = ((), (ADD,), (ADD, LOOK))


# --- the reference


@dataclass(eq=False)
class Sampled:
    """An answer, and what it stands behind."""

    number: int
    behind: Sampled | None
    sent: list[int]
    completion: Completion

    @property
    def opens_segment(self) -> bool:
        before = self.behind
        kept = [] if before is None else [*before.sent, *before.completion.token_ids]
        return not kept or self.sent[: len(kept)] != kept

    def path(self) -> list[Sampled]:
        return [*(self.behind.path() if self.behind else []), self]


@dataclass(frozen=True)
class Entry:
    """A message of an earlier conversation; `sampled` where it was an answer."""

    message: Message
    sampled: Sampled | None = None


@dataclass
class Reference:
    """All that was said in a session, conversation by conversation."""

    conversations: list[tuple[Any, list[Entry]]] = field(default_factory=list)
    answers: list[Sampled] = field(default_factory=list)

    def matches(self, tools: Any, sent: Sequence[Message], protocol: str) -> list[list[Entry]]:
        """The beginnings of earlier conversations that hold most of what is sent."""
        alive = [entries for known, entries in self.conversations if known == tools]
        depth = 0
        for message in sent:
            ids = {call["id"] for call in message.get("tool_calls", ())}
            going = [
                entries
                for entries in alive
                if len(entries) > depth and same(entries[depth], message, protocol)
            ]
            named = [
                entries
                for entries in going
                if ids & {call["id"] for call in entries[depth].message.get("tool_calls", ())}
            ]
            if not going:
                break
            alive, depth = named or going, depth + 1
        return [entries[:depth] for entries in alive] if depth else []

    def segments(self, shared: str) -> list[tuple[list[int], list[float], list[int]]]:
        """Tokens, logprobs and mask of each segment."""
        followed = {id(one.behind) for one in self.answers}
        branches = [one.path() for one in self.answers if id(one) not in followed]
        branches.sort(key=lambda path: [one.number for one in path])
        if shared == "longest" and branches:
            sizes = [sum(len(one.completion.token_ids) for one in path) for path in branches]
            branches = [branches[sizes.index(max(sizes))]]
        segments, done = [], set()
        for path in branches:
            runs: list[list[Sampled]] = []
            for one in path:
                if one.opens_segment:
                    runs.append([])
                runs[-1].append(one)
            for run in runs:
                new = [one for one in run if shared == "each" or one.number not in done]
                if not new:
                    continue
                tokens = [*new[-1].sent, *new[-1].completion.token_ids]
                logprobs, mask = [0.0] * len(tokens), [0] * len(tokens)
                for one in new:
                    for i, logprob in enumerate(one.completion.logprobs, start=len(one.sent)):
                        logprobs[i], mask[i] = logprob, 1
                segments.append((tokens, logprobs, mask))
            done.update(one.number for one in path)
        return segments


def same(entry: Entry, message: Message, protocol: str) -> bool:
    """Whether a client says by `message` what stands in the conversation."""
    kept = entry.message
    if said(kept) != said(message):
        return False
    was, now = (one.get("reasoning_content", "").strip() for one in (kept, message))
    if now:
        return was == now
    return not was or (entry.sampled is not None and protocol != "messages")


def said(message: Message) -> Any:
    if message["role"] != "assistant":
        return message["role"], message["content"]
    calls = [(call["name"], plain(json.loads(call["arguments"]))) for call in message["tool_calls"]]
    return "assistant", message["content"].strip(), calls


def plain(value: Any) -> Any:
    """JSON in which 1 is 1.0 and is not true."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return (type(value) is bool, value)


# --- the agents


@dataclass(frozen=True)
class Op:
    """What an agent does next."""

    kind: str
    at: int
    """Which conversation, and where in it, modulo what there is."""
    style: Style
    text: str
    answers: tuple[Answer, ...]
    fate: str
    """Of the reply: `had`, `lost` (and asked for again), `again` (as a retry after it was had)."""


KINDS = (
    *(
        "new",
        "extend",
        "extend",
        "extend",
        "extend",
        "branch",
        "compact",
        "cut",
        "repeat",
        "repeat",
        "repeat",
    ),
    *("system", "arguments", "answer", "result", "thinking", "tools", "bad", "full", "named"),
)
ops = st.builds(
    Op,
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 1000),
    style=styles,
    text=st.sampled_from(["What is 2 + 2?", "Go on.", "  sure?\n"]),
    answers=st.lists(answers, min_size=1, max_size=3).map(tuple),
    fate=st.sampled_from(["had", "had", "had", "lost", "again"]),
)


@dataclass
class View:
    """A conversation as an agent has it: the last message is an answer."""

    messages: list[Message]
    tools: tuple[Any, ...]
    reply_id: str = ""
    answer: Sampled | None = None
    """The last message, where the next request names it in place of the history."""
    is_instructed: bool = False
    """Whether the system prompt was sent as the request's instructions."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def replies_to(answer: Message, text: str) -> list[Message]:
    """What an agent says behind an answer: the results of its calls, or something else."""
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"{text.strip()} {index}"}
        for index, call in enumerate(answer["tool_calls"])
    ]
    return results or [user(text)]


def edited(op: Op, view: View) -> View | None:
    """The conversation as the agent goes on with it; None where it cannot do that here."""
    messages, tools = [dict(one) for one in view.messages], view.tools
    spoken = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
    at = spoken[op.at % len(spoken)]
    match op.kind:
        case "extend":
            at = len(messages) - 1
        case "branch":
            messages = messages[: at + 1]
        case "compact":
            head = messages[: messages[0]["role"] == "system"]
            messages = [*head, user(f"So far: {op.text}"), *messages[at:]]
        case "cut":
            messages = messages[at:] if at else messages
            messages = [user(op.text), *messages]
        case "system":
            rest = messages[messages[0]["role"] == "system" :]
            messages = [{"role": "system", "content": f"Now {op.text}"}, *rest]
        case "arguments":
            calling = [i for i in spoken if messages[i]["tool_calls"]]
            if not calling:
                return None
            at = calling[op.at % len(calling)]
            first, *others = messages[at]["tool_calls"]
            broken = {**first, "arguments": json.dumps({"INVALID_JSON": first["arguments"]})}
            messages[at]["tool_calls"] = [broken, *others]
        case "answer":
            messages[at]["content"] += " changed"
        case "result":
            results = [i for i, one in enumerate(messages) if one["role"] == "tool"]
            if not results:
                return None
            at = results[op.at % len(results)]
            messages[at]["content"] = "x" * 300 + op.text
        case "thinking":
            for i in spoken:
                messages[i]["reasoning_content"] = ""
        case "tools":
            tools = TOOLS[(TOOLS.index(tools) + 1) % len(TOOLS)]
    answer = view.answer if op.kind == "named" and op.style.protocol == "responses" else None
    new = [*messages, *replies_to(messages[-1], op.text)]
    return replace(view, messages=new, tools=tools, answer=answer)


class Driver:
    """Plays agents against one session, and looks at each answer."""

    def __init__(self, name: str) -> None:
        self.family: Family = {**FAMILIES, **REAL}[name]
        self.tokenizer = tokenizer_of(name)
        self.policy = BytesPolicy(self.family, self.tokenizer)
        params = SamplingParams(model="m", max_tokens=64)
        settings = SessionSettings(params=params, context_length=5_000)
        self.gateway = Gateway(self.policy, self.tokenizer, settings=settings)
        self.session: Session = self.gateway.session()
        self.reference = Reference()
        self.views: list[View] = []
        self.edits = 0

    async def play(self, op: Op) -> None:
        style, limits = op.style, {}
        view: View | None = None
        if op.kind not in ("new", "repeat", "bad", "full") and self.views:
            view = edited(op, self.views[op.at % len(self.views)])
        elif op.kind == "repeat" and self.views:
            known = self.views[op.at % len(self.views)]
            view = View(known.messages[:-1], known.tools)
        if view is None:
            tools = TOOLS[op.at % len(TOOLS)]
            systems = [{"role": "system", "content": word} for word in ("A", "B")]
            view = View([*systems[op.at % 5 : op.at % 5 + 1], user(op.text)], tools)
        sent = as_sent(view.messages, style)
        if op.kind == "thinking":
            sent = [{**one, "reasoning_content": ""} if "tool_calls" in one else one
                    for one in sent]  # fmt: skip
        if op.kind == "full":
            sent = [*sent[:-1], user("x" * 6000)]
        if style.protocol == "chat" and len(op.answers) > 1:
            limits["n"] = len(op.answers)
        if any(answer.ending == "stop" for answer in op.answers) and style.protocol == "chat":
            limits["stop"] = [STOP]
        if op.kind == "bad":
            limits["temperature"] = -1.0
        await self.call(op, view, sent, limits)

    def naming(self, op: Op, view: View, sent: list[Message]) -> tuple[list[Message], bytes]:
        """A request that names the answer that it goes on from, and what it means."""
        history = next(
            [entry.message for entry in entries]
            for _, entries in self.reference.conversations
            if entries[-1].sampled is view.answer
        )
        last = max(i for i, one in enumerate(sent) if one["role"] == "assistant")
        first = history[: view.is_instructed]
        style = replace(op.style, parts=False)  # the system prompt as instructions
        body = json.loads(body_of([*first, *sent[last + 1 :]], view.tools, style))
        body["previous_response_id"] = f"resp_{view.reply_id}"
        return [*history, *sent[last + 1 :]], msgspec.json.encode(body)

    async def call(self, op: Op, view: View, sent: list[Message], limits: dict[str, Any]) -> None:
        style, wire = op.style, self.policy.wire
        body = body_of(sent, view.tools, style, **limits)
        if view.answer is not None:
            sent, body = self.naming(op, view, sent)
        answers = op.answers[: limits.get("n", 1)]
        self.policy.answers = [
            replace(one, ending="end" if one.ending == "stop" and "stop" not in limits else
                    one.ending) for one in answers
        ]  # fmt: skip
        before, asked, old = self.trace(), len(self.policy.asked), len(wire)
        try:
            reply = await self.fetch(op, body)
        except CallError as error:
            reached_engine = len(self.policy.asked) > asked
            assert reached_engine or (error.status == 400 and self.trace() == before)  # noqa: PT017
            self.keep(view, sent, style, wire[old:])
            return
        nodes = self.keep(view, sent, style, wire[old:])
        if op.fate == "again":
            assert await self.fetch(op, body, is_retry=True) == reply
        assert len(wire) == old + len(nodes)
        messages, reply_id = answers_in(reply), re.split("[-_]", reply["id"])[1]
        kept = [entries[-1].message for _, entries in self.reference.conversations[-len(nodes) :]]
        assert [said(message) for message in messages] == [said(message) for message in kept]
        is_instructed = style.protocol == "responses" and bool(json.loads(body).get("instructions"))
        for message, node in zip(messages, nodes, strict=True):
            talk = [*view.messages, message]
            # Of several choices the first has the reply's id.
            answer = node if node is nodes[0] else None
            self.views.append(View(talk, view.tools, reply_id, answer, is_instructed))

    async def fetch(self, op: Op, body: bytes, *, is_retry: bool = False) -> Any:
        """The answer, as its client decodes it."""
        api = APIS[op.style.protocol]
        self.session.arrived(len(body))
        call, digest = api.read_call(body), api.__name__.encode() + body
        pending = self.session.call(call, digest, is_retry=is_retry)
        if op.fate == "lost" and not is_retry:
            await asyncio.wait([pending.task])
            if not pending.task.exception():
                pending = self.session.call(call, digest, is_retry=bool(op.at % 2))
        with pending.fetched():
            reply = await asyncio.shield(pending.task)
            pending.is_answered = True
        return told(op.style.protocol, body, reply)

    def trace(self) -> Any:
        """What a call that fails leaves as it was."""
        record = self.session.record()
        tree = self.session._tree
        return (
            [segment.to_json() for segment in record.segments],
            {name: value for name, value in record.record.metrics.items() if name != "calls"},
            record.record.messages,
            [self.nodes(root) for root, _ in tree._roots.values() if root.children],
        )

    def nodes(self, node: Any) -> Any:
        return [self.nodes(one) for alike in node.children.values() for one in alike]

    def keep(
        self,
        view: View,
        sent: list[Message],
        style: Style,
        wire: list[tuple[list[int], Completion]],
    ) -> list[Sampled]:
        """Put what was sampled for a call into the reference, and compare where it stands."""
        reference = self.reference
        if not wire:
            return []
        matches = reference.matches(view.tools, sent, style.protocol)
        turns = self.session._tree.turns[len(reference.answers) :]
        assert len(turns) == len(wire)
        by_turn = dict(zip((id(turn) for turn, _ in self.session._tree.turns), reference.answers,
                           strict=False))  # fmt: skip
        behind = by_turn.get(id(turns[0][0].prompt.behind))
        # Answers that mean the same, and that no id tells apart, are one as good as another.
        counts = [sum(one.sampled is not None for one in entries) for entries in matches]
        possible = [
            next((one.sampled for one in reversed(entries) if one.sampled), None)
            for entries, count in zip(matches, counts, strict=True)
            if count == max(counts)
        ] or [None]
        assert behind in ([view.answer] if view.answer else possible)
        entries = next(
            (
                entries
                for entries in matches
                if behind is next((one.sampled for one in reversed(entries) if one.sampled), None)
            ),
            [],
        )
        conversation = [*entries, *(Entry(one) for one in sent[len(entries) :])]
        self.check_edits(view, sent, style, matches)
        sampled = []
        for (prompt, completion), (turn, node) in zip(wire, turns, strict=True):
            assert turn.completion.token_ids == completion.token_ids
            one = Sampled(len(reference.answers), behind, prompt, completion)
            assert turn.prompt.opens_segment == one.opens_segment
            if self.family.only_appends:
                assert one.opens_segment == (behind is None)
                # What no answer stands behind is sent as the client writes it now.
                kept = max((i + 1 for i, one in enumerate(entries) if one.sampled), default=0)
                self.check_text(prompt, [*entries[:kept], *map(Entry, sent[kept:])])
            reference.answers.append(one)
            answer = read_chat(node.message)
            reference.conversations.append((view.tools, [*conversation, Entry(answer, one)]))
            sampled.append(one)
        return sampled

    def check_text(self, prompt: list[int], conversation: list[Entry]) -> None:
        """What was sent says what the conversation says, its answers as they were sampled."""
        text = self.tokenizer.decode(prompt)
        assert text.startswith(("<|im_start|>", "<tools>"))
        rest = text[text.index("<|im_start|>") :]
        for entry in conversation:
            message = entry.message
            rest = rest.removeprefix(f"<|im_start|>{message['role']}\n")
            if entry.sampled is not None:
                shown = self.tokenizer.decode_body(entry.sampled.completion)
            else:
                shown = message["content"]
                for call in message.get("tool_calls", ()):
                    function = {"name": call["name"], "arguments": json.loads(call["arguments"])}
                    shown += "<tool_call>" + json.dumps(function, ensure_ascii=False)
                    shown += "</tool_call>"
            assert rest.startswith(shown)
            rest = rest[len(shown) :].removeprefix("<|im_end|>\n")
        assert rest == "<|im_start|>assistant\n"

    def check_edits(
        self, view: View, sent: list[Message], style: Style, matches: list[list[Entry]]
    ) -> None:
        """What the client changed is on record, and nothing else."""
        edits, self.edits = self.session._log._edits[self.edits :], len(self.session._log._edits)
        depth = len(matches[0]) if matches else 0
        holds_answer = any(one["role"] == "assistant" for one in sent)
        tips = [
            entries
            for tools, entries in self.reference.conversations
            if tools == view.tools and entries[:depth] in matches
        ]
        goes_on = depth and any(len(entries) == depth for entries in tips)
        recognised = any(one.sampled for entries in matches for one in entries)
        if depth == len(sent) or not (holds_answer or recognised):
            assert not edits
        if goes_on and len(tips) == 1:
            assert not edits
        known = {
            call["id"]
            for _, entries in self.reference.conversations
            for entry in entries
            if entry.sampled
            for call in entry.message["tool_calls"]
        }
        names = {call["id"] for one in sent[depth:] for call in one.get("tool_calls", ())}
        # Who goes on from a whole conversation may say another one's call again: nothing changed.
        if depth < len(sent) and not goes_on and (names & known or recognised):
            assert edits
        for edit in edits:
            assert edit.before != edit.now
            if edit.message is None:
                continue
            assert any(
                all(
                    same(entry, one, style.protocol)
                    for entry, one in zip(entries[: edit.message], sent, strict=False)
                )
                and (
                    edit.now is None
                    or len(entries) <= edit.message
                    or not same(entries[edit.message], sent[edit.message], style.protocol)
                )
                for _, entries in self.reference.conversations
            )

    def check(self) -> None:
        """The trajectory, under each way to share."""
        session = self.session
        for shared in ("first", "each", "longest"):
            session.settings = replace(session.settings, shared=shared)
            segments = session.record().segments
            expected = self.reference.segments(shared)
            assert len(segments) == len(expected)
            for segment, (tokens, logprobs, mask) in zip(segments, expected, strict=True):
                assert segment.tokens.tolist() == tokens
                assert segment.loss_mask.tolist() == mask
                assert np.array_equal(segment.logprobs, np.float32(logprobs))
            trained = [
                float(logprob)
                for segment in segments
                for logprob in segment.logprobs[segment.loss_mask == 1]
            ]
            if shared == "first":
                sampled = [
                    float(np.float32(logprob))
                    for one in self.reference.answers
                    for logprob in one.completion.logprobs
                ]
                assert sorted(trained) == sorted(sampled)


class HttpDriver(Driver):
    """The same, through the clients of the packages."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.clients: tuple[Any, ...] = ()

    async def __aenter__(self) -> HttpDriver:
        await self.gateway.start()
        self.session = self.gateway.session()
        clients = self.session.openai(), self.session.anthropic()
        self.clients = (
            clients[0].with_options(max_retries=0),
            clients[1].with_options(max_retries=0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.close()
        await self.gateway.aclose()

    async def fetch(self, op: Op, body: bytes, *, is_retry: bool = False) -> Any:
        headers = {"x-stainless-retry-count": "1"} if is_retry else {}
        if op.fate == "lost" and not any(answer.fails for answer in self.policy.answers):
            await self.leave(op, body)
        return await self.post(op, body, headers)

    async def leave(self, op: Op, body: bytes) -> None:
        """Ask, and go away before the answer is there."""
        self.policy.gate.clear()
        self.policy.began.clear()
        asking = asyncio.ensure_future(self.post(op, body, {}))
        began = asyncio.ensure_future(self.policy.began.wait())
        await asyncio.wait({asking, began}, return_when=asyncio.FIRST_COMPLETED)
        began.cancel()
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(PATIENCE):
            while any(one.clients for one in self.session._pending.all()):  # noqa: ASYNC110
                await asyncio.sleep(0)
        self.policy.gate.set()

    async def post(self, op: Op, body: bytes, headers: dict[str, str]) -> Any:
        apis = {
            "chat": self.clients[0].chat.completions,
            "responses": self.clients[0].responses,
            "messages": self.clients[1].messages,
        }
        create = apis[op.style.protocol].create
        known = inspect.signature(create).parameters
        fields = json.loads(body)
        more = {name: fields.pop(name) for name in list(fields) if name not in known}
        try:
            reply = await apis[op.style.protocol].with_raw_response.create(
                **fields, extra_body=more, extra_headers=headers
            )
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            raise CallError(str(error), status=error.status_code) from error
        return json.loads(await reply.http_response.aread())


@pytest.mark.parametrize("name", EVERY)
@settings(suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(played=st.lists(ops, min_size=1, max_size=12))
def test_a_session_is_the_tree_that_brute_force_builds(name, played):
    async def play() -> None:
        driver = Driver(name)
        for op in played:
            await driver.play(op)
        driver.check()

    asyncio.run(play())


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
@settings(
    max_examples=max(3, settings.default.max_examples // 10),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
@given(played=st.lists(ops, min_size=6, max_size=12))
def test_so_it_is_for_real_clients_over_http(name, played):
    async def play() -> None:
        async with HttpDriver(name) as driver:
            for op in played:
                await driver.play(op)
            driver.check()

    asyncio.run(play())
