"""Agents that call a model in every way that was seen of real ones, and families of models whose
chat templates append or rewrite: what random tests of a session are made of.

A conversation is kept as an agent keeps it, in the chat API's form with every field there; `Style`
says how a client writes it down for one call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from eval_protocol_rft.episodes.gateway import _chat_api, _messages_api, _responses_api
from eval_protocol_rft.episodes.gateway._call import Protocol, Reply
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, RefusedError, SamplingParams
from tests.episodes import templates
from tests.episodes.test_harmony import TEMPLATE as HARMONY
from tests.parity.families import FAMILIES as PARITY
from tests.parity.servers import tokenizer_of as byte_tokenizer

Message = dict[str, Any]
STOP = "STOP"
APIS = {"chat": _chat_api, "responses": _responses_api, "messages": _messages_api}

QWEN3 = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools %}<|im_start|>system
{{ first }}
<tools>{{ tools | tojson }}</tools><tool_call></tool_call><|im_end|>
{% elif first %}<|im_start|>system
{{ first }}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}\
{% endif %}{% endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == 'assistant' -%}
{%- set content, thought = message.content, message.reasoning_content or '' -%}
{%- if not thought and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last and thought -%}
<think>
{{ thought.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif -%}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
"""Drops what was thought before the last question, as the real one does."""

LLAMA3 = """\
{%- if messages[0].role == 'system' -%}
{%- set system, rest = messages[0].content | trim, messages[1:] -%}
{%- else %}{% set system, rest = '', messages %}{% endif -%}
<|start_header_id|>system<|end_header_id|>

Today: {{ system }}{% if tools %}{{ tools | tojson }}{% endif %}<|eot_id|>
{%- for message in rest -%}
{%- if message.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
{%- set call = message.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}"""
"""Trims what is said, and knows one call a turn, as the real one does."""


@dataclass(frozen=True)
class Family:
    """How a model writes."""

    make: Callable[[], LoadedTokenizer | None]
    end: str
    call: str
    """Of a name and the arguments' text."""
    thought: str = ""
    said: str = "{text}"
    parallel: bool = True
    only_appends: bool = False


def small(name: str, template: str) -> Callable[[], LoadedTokenizer]:
    """One token a byte, and the control tokens."""

    def make() -> LoadedTokenizer:
        tokenizer = byte_tokenizer(PARITY[name])
        tokenizer.chat_template = template
        return LoadedTokenizer.wrap(tokenizer, name)

    return make


_HERMES = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
_THINK = "<think>\n{text}\n</think>\n\n"
_QWEN = Family(lambda: None, "<|im_end|>", _HERMES, _THINK)
_LLAMA = Family(
    lambda: None, "<|eot_id|>", '{{"name": "{name}", "parameters": {arguments}}}', parallel=False
)
_GPT_OSS = Family(
    lambda: None,
    "<|return|>",
    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
    "<|channel|>analysis<|message|>{text}<|end|><|start|>assistant",
    "<|channel|>final<|message|>{text}",
    parallel=False,
)
FAMILIES = {
    "appends": replace(_QWEN, make=small("Qwen3", templates.APPENDS + "{# <tool_call> #}"),
                       only_appends=True),
    "qwen3": replace(_QWEN, make=small("Qwen3", QWEN3)),
    "llama3_1": replace(_LLAMA, make=small("Llama 3.1", LLAMA3)),
    "gpt-oss": replace(_GPT_OSS, make=small("gpt-oss", HARMONY)),
}  # fmt: skip
REAL = {
    "real qwen3": replace(_QWEN, make=lambda: templates.real("qwen3")),
    "real llama3_1": replace(_LLAMA, make=lambda: templates.real("llama3_1")),
    "real gpt-oss": replace(_GPT_OSS, make=lambda: templates.real("gptoss")),
}
EVERY = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.real_tokenizers) for name in REAL)]


@cache
def tokenizer_of(name: str) -> LoadedTokenizer:
    tokenizer = {**FAMILIES, **REAL}[name].make()
    if tokenizer is None:
        pytest.skip("EP_RFT_TOKENIZERS names no folder with it (CONTRIBUTING.md)")
    return tokenizer


# --- the model


@dataclass(frozen=True)
class Answer:
    """What is sampled for one prompt."""

    thought: str
    text: str
    calls: tuple[tuple[str, str], ...]
    ending: str
    """`end`, `length` or `stop`."""
    odd: bytes
    fails: bool


TEXTS = ["4", "4", " I will add.\n", "xé😀", ""]
ARGUMENTS = [
    '{"a":2,  "b": 40}',
    '{"b": 1, "a":1.0}',
    '{"a": {"y": [1, 2.0, true], "x": null}, "b": "é\\u00e9"}',
    "{}",
]
ALIKE = [
    Answer("", "4", (), "end", b"", fails=False),
    Answer("", "", (("add", ARGUMENTS[0]),), "end", b"", fails=False),
]
"""Answers that come again and again."""
answers = st.sampled_from(ALIKE) | st.builds(
    Answer,
    thought=st.sampled_from(["", "", "Add them.", "No: \nadd."]),
    text=st.sampled_from(TEXTS),
    calls=st.lists(
        st.tuples(st.sampled_from(["add", "look"]), st.sampled_from(ARGUMENTS)), max_size=2
    ).map(tuple),
    ending=st.sampled_from(["end", "end", "end", "end", "length", "stop"]),
    odd=st.one_of(st.just(b""), st.just(b""), st.binary(min_size=1, max_size=3)),
    fails=st.sampled_from([False] * 12 + [True]),
)


class BytesPolicy:
    """Samples what the test wants next, one token a byte, with logprobs that no two tokens share;
    keeps what it was sent and what it answered."""

    def __init__(self, family: Family, tokenizer: LoadedTokenizer) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.answers: list[Answer] = []
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.wire: list[tuple[list[int], Completion]] = []
        self.drawn = 0
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        """Holds every answer back until it is set."""
        self.gate.set()
        self.bytes = {bytes([i]): encode_byte(tokenizer, i) for i in range(256)}

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        answer = self.answers.pop(0)
        self.asked.append((list(prompt_ids), params))
        self.began.set()
        await self.gate.wait()
        if answer.fails:
            raise RefusedError("the engine does not like it")
        ids = self.ids_of(answer)
        logprobs = [-(self.drawn + i) / 2**16 for i in range(1, len(ids) + 1)]
        self.drawn += len(ids)
        is_length = answer.ending == "length"
        completion = Completion(
            token_ids=ids,
            logprobs=logprobs,
            finish_reason="length" if is_length else "stop",
            stop_reason=STOP if answer.ending == "stop" else None,
        )
        self.wire.append((list(prompt_ids), completion))
        return completion

    async def aclose(self) -> None:
        pass

    def ids_of(self, answer: Answer) -> list[int]:
        family, encode = self.family, self.tokenizer.tokenizer.convert_tokens_to_ids
        calls = answer.calls if family.parallel else answer.calls[:1]
        text = family.thought.format(text=answer.thought) if answer.thought else ""
        if answer.text or not calls:
            text += family.said.format(text=answer.text)
        if calls and family.said != "{text}":  # a call is a message of its own
            text = family.thought.format(text=answer.thought) if answer.thought else ""
        text += "\n".join(family.call.format(name=n, arguments=a) for n, a in calls)
        ids = self.tokens(text)
        ids += [self.bytes[bytes([byte])] for byte in answer.odd]
        if answer.ending == "length":
            return ids[: max(1, len(ids) - 1)] or [self.bytes[b"x"]]
        if answer.ending == "stop":
            return [*ids, *self.tokens(STOP)]
        ender = "<|call|>" if calls and family.end == "<|return|>" else family.end
        return [*ids, encode(ender)]

    def tokens(self, text: str) -> list[int]:
        """One token a byte, but for control tokens."""
        ids: list[int] = []
        while text:
            mark = next((m for m in self.tokenizer.special_texts if text.startswith(m)), None)
            if mark:
                ids.append(self.tokenizer.tokenizer.convert_tokens_to_ids(mark))
            else:
                ids += [self.bytes[bytes([byte])] for byte in text[0].encode()]
            text = text[len(mark or " ") :]
        return ids


@cache
def encode_byte(tokenizer: LoadedTokenizer, byte: int) -> int:
    """The token of a byte. Byte-level tokenizers write a byte as itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [other for other in range(256) if other not in seen]
    letter = chr(byte if byte in seen else 256 + hidden.index(byte))
    return int(tokenizer.tokenizer.convert_tokens_to_ids(letter))


# --- the clients


@dataclass(frozen=True)
class Style:
    """How a client writes a history down."""

    protocol: Protocol
    parts: bool
    nothing: str
    """A content without text: `null`, `""` or no field."""
    spelling: int
    """Of arguments: as they came, compact, with blanks, keys sorted, whole numbers as floats."""
    thinks: bool
    """Whether thinking is sent back."""
    strips: bool
    keeps_ids: bool


styles = st.builds(
    Style,
    protocol=st.sampled_from(["chat", "chat", "responses", "messages"]),
    parts=st.booleans(),
    nothing=st.sampled_from(["null", "empty", "absent"]),
    spelling=st.integers(0, 4),
    thinks=st.booleans(),
    strips=st.booleans(),
    keeps_ids=st.sampled_from([True, True, True, False]),
)


def respelled(text: str, spelling: int) -> str:
    """The same arguments written anew."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    match spelling:
        case 1:
            return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        case 2:
            return json.dumps(value, indent=1)
        case 3:
            return json.dumps(value, sort_keys=True)
        case 4:
            return json.dumps(_as_floats(value))
    return text


def _as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_floats(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_floats(one) for one in value]
    return float(value) if type(value) is int else value


def as_sent(messages: Sequence[Message], style: Style) -> list[Message]:
    """What the client says of a history, in full chat form: the truth of what is sent."""
    sent = []
    for message in messages:
        one = dict(message)
        if one["role"] == "assistant":
            if style.strips:
                one["content"] = one["content"].strip()
            if not style.thinks:
                one["reasoning_content"] = ""
            one["tool_calls"] = [
                {
                    "id": call["id"] if style.keeps_ids else f"own_{call['id'][-8:]}",
                    "name": call["name"],
                    "arguments": respelled(call["arguments"], style.spelling),
                }
                for call in one["tool_calls"]
            ]
        elif one["role"] == "tool" and not style.keeps_ids:
            one["tool_call_id"] = f"own_{one['tool_call_id'][-8:]}"
        sent.append(one)
    return sent


def parts_of(text: str, kind: str, *, joined_by_lines: bool) -> list[dict[str, str]]:
    """The text in several parts, which mean the same together."""
    texts = text.split("\n") if joined_by_lines else [text[:1], text[1:]]
    return [{"type": kind, "text": one} for one in texts]


def body_of(
    sent: Sequence[Message], tools: Sequence[Mapping[str, Any]], style: Style, **settings: Any
) -> bytes:
    """A request of the style's protocol."""
    write = {"chat": _chat_body, "responses": _responses_body, "messages": _messages_body}
    return msgspec.json.encode(
        {"model": "m", **write[style.protocol](sent, tools, style), **settings}
    )


def _chat_body(sent: Sequence[Message], tools: Sequence[Any], style: Style) -> dict[str, Any]:
    messages = []
    for one in sent:
        message: Message = {"role": one["role"], "content": one["content"]}
        if style.parts and one["content"]:
            message["content"] = parts_of(one["content"], "text", joined_by_lines=True)
        if one["role"] == "tool":
            message["tool_call_id"] = one["tool_call_id"]
        if one["role"] == "assistant":
            if one["reasoning_content"]:
                message["reasoning_content"] = one["reasoning_content"]
            if one["tool_calls"]:
                message["tool_calls"] = [
                    {
                        "id": call["id"],
                        "type": "function",
                        "function": {"name": call["name"], "arguments": call["arguments"]},
                    }
                    for call in one["tool_calls"]
                ]
            if not one["content"] and style.nothing != "empty":
                message["content"] = None
                if style.nothing == "absent":
                    del message["content"]
        messages.append(message)
    described = [{"type": "function", "function": tool} for tool in tools]
    return {"messages": messages, **({"tools": described} if tools else {})}


def _responses_body(sent: Sequence[Message], tools: Sequence[Any], style: Style) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    body: dict[str, Any] = {"input": items}
    for index, one in enumerate(sent):
        if one["role"] == "system" and index == 0 and not style.parts:
            body["instructions"] = one["content"]
        elif one["role"] == "tool":
            items.append(
                {
                    "type": "function_call_output",
                    "call_id": one["tool_call_id"],
                    "output": one["content"],
                }
            )
        elif one["role"] == "assistant":
            if one["reasoning_content"]:
                summary = [{"type": "summary_text", "text": one["reasoning_content"]}]
                items.append({"type": "reasoning", "summary": summary})
            if one["content"] or not one["tool_calls"]:
                content = one["content"]
                if style.parts:
                    content = parts_of(content, "output_text", joined_by_lines=False)
                items.append({"type": "message", "role": "assistant", "content": content})
            items += [
                {
                    "type": "function_call",
                    "call_id": call["id"],
                    "name": call["name"],
                    "arguments": call["arguments"],
                }
                for call in one["tool_calls"]
            ]
        else:
            content = one["content"]
            if style.parts:
                content = parts_of(content, "input_text", joined_by_lines=True)
            items.append({"role": one["role"], "content": content})
    if tools:
        body["tools"] = [{"type": "function", **tool} for tool in tools]
    return body


def _messages_body(sent: Sequence[Message], tools: Sequence[Any], style: Style) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": 4096, "messages": []}
    messages: list[dict[str, Any]] = body["messages"]
    for index, one in enumerate(sent):
        content: Any = one["content"]
        if one["role"] == "system" and index == 0:
            body["system"] = (
                parts_of(content, "text", joined_by_lines=True) if style.parts else content
            )
        elif one["role"] == "tool":
            if style.parts:
                content = parts_of(content, "text", joined_by_lines=True)
            block = {"type": "tool_result", "tool_use_id": one["tool_call_id"], "content": content}
            if messages[-1]["role"] == "user" and isinstance(messages[-1]["content"], list):
                messages[-1]["content"].append(block)
            else:
                messages.append({"role": "user", "content": [block]})
        elif one["role"] == "assistant":
            blocks: list[dict[str, Any]] = []
            if one["reasoning_content"]:
                thinking = one["reasoning_content"]
                blocks.append({"type": "thinking", "thinking": thinking, "signature": "s"})
            if content or not one["tool_calls"]:
                texts = [content] if not style.parts else [content[:1], content[1:]]
                blocks += [{"type": "text", "text": text} for text in texts]
            blocks += [
                {
                    "type": "tool_use",
                    "id": call["id"],
                    "name": call["name"],
                    "input": msgspec.Raw(call["arguments"].encode()),
                }
                for call in one["tool_calls"]
            ]
            messages.append({"role": "assistant", "content": blocks})
        else:
            messages.append({"role": one["role"], "content": content})
    if tools:
        body["tools"] = [
            {"name": tool["name"], "input_schema": tool["parameters"]} for tool in tools
        ]
    return body


def answers_in(body: Mapping[str, Any]) -> list[Message]:
    """What an agent reads in the answer of any of the protocols, one message for each choice."""
    if "choices" in body:
        return [read_chat(choice["message"]) for choice in body["choices"]]
    message: Message = {
        "role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [],
    }  # fmt: skip
    for item in body.get("output", body.get("content")):
        match item["type"]:
            case "reasoning":
                message["reasoning_content"] += item["summary"][0]["text"]
            case "thinking":
                message["reasoning_content"] += item["thinking"]
            case "message":
                message["content"] += item["content"][0]["text"]
            case "text":
                message["content"] += item["text"]
            case "function_call":
                call = {"id": item["call_id"], "name": item["name"]}
                message["tool_calls"].append({**call, "arguments": item["arguments"]})
            case "tool_use":
                call = {"id": item["id"], "name": item["name"]}
                message["tool_calls"].append({**call, "arguments": json.dumps(item["input"])})
    return [message]


def read_chat(message: Mapping[str, Any]) -> Message:
    """An answer in the chat API's form, with every field."""
    return {
        "role": "assistant",
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content") or "",
        "tool_calls": [
            {"id": call["id"], **call["function"]} for call in message.get("tool_calls") or []
        ],
    }


def told(protocol: Protocol, body: bytes, reply: Reply) -> Mapping[str, Any]:
    """A reply as its client decodes it."""
    api = APIS[protocol]
    decoded: Mapping[str, Any] = json.loads(
        msgspec.json.encode(api.reply_body(api.read_call(body), reply))
    )
    return decoded
