"""Families of models: how they write, and what a chat server makes of it.

`served` is what vLLM's parsers return, worked out by hand from their sources (tool parsers hermes,
qwen3_coder, llama3_json, openai, mistral, deepseek_v3, glm45; reasoning parsers deepseek_r1, glm45
and the first form of qwen3), not by code of this package. Content None is a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCENARIOS = (
    "plain",
    "thinking",
    "one call",
    "several calls",
    "call after text",
    "broken call",
    "call cut off",
    "thinking cut off",
    "stray close tag",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            },
        },
    }
]
CALL = ("add", '{"a": 2, "b": 3}')
OTHER = ("add", '{"a": 4, "b": 5}')
PLAIN, THOUGHT, SAID = "The answer is 5.", "Two and three.", "Let me add."
STRAY = "First try: 4</think>5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A message of a chat server."""

    content: str | None = None
    reasoning: str | None = None
    calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What was sampled, and what is served of it."""

    text: str
    served: Reply
    finish_reason: str = "stop"
    ender: str | None = None
    """The control token that ended it, where it is not the family's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's control tokens, its template (the real one's marks and generation prompt, with
    messages and tools as JSON) and its cases by scenario."""

    ender: str
    control: tuple[str, ...]
    header: str
    marks: str
    """What of the real template tells the form of the calls."""
    cases: Mapping[str, Case] = field(default_factory=dict)

    @property
    def template(self) -> str:
        return (
            "{%- if tools %}"
            + "{{ tools | tojson }}{{ "
            + repr(self.marks)
            + " }}{% endif -%}{%- for message in messages %}{{ message | tojson }}{% endfor -%}"
            + "{%- if add_generation_prompt %}{{ "
            + repr(self.header)
            + " }}{% endif -%}"
        )


def _plain(text: str = PLAIN, **served: Any) -> Case:
    return Case(text=text, served=Reply(**{"content": text, **served}))


def _called(text: str, *calls: tuple[str, str], content: str | None = None, **more: Any) -> Case:
    served = Reply(content=content, calls=calls, finish_reason="tool_calls")
    return Case(text=text, served=served, **more)


def _cut(text: str, served: Reply | None = None) -> Case:
    served = served or Reply(content=text, finish_reason="length")
    return Case(text=text, served=served, finish_reason="length")


_THINKS = {
    "thinking": Case(
        text=f"<think>\n{THOUGHT}\n</think>\n\n{PLAIN}",
        served=Reply(content=f"\n\n{PLAIN}", reasoning=f"\n{THOUGHT}\n"),
    ),
    "thinking cut off": _cut(f"<think>\n{THOUGHT}"),
    "stray close tag": _plain(STRAY),
}
_THINKS_NOT = {
    # A server has no reasoning parser for a model that does not think.
    "thinking": _plain(f"<think>\n{THOUGHT}\n</think>\n\n{PLAIN}"),
    "thinking cut off": _cut(f"<think>\n{THOUGHT}"),
    "stray close tag": _plain(STRAY),
}


def _json(call: tuple[str, str], key: str = "arguments") -> str:
    return f'{{"name": "{call[0]}", "{key}": {call[1]}}}'


def _hermes(call: tuple[str, str]) -> str:
    return f"<tool_call>\n{_json(call)}\n</tool_call>"


_HERMES = {
    "plain": _plain(),
    "one call": _called(_hermes(CALL), CALL),
    "several calls": _called(f"{_hermes(CALL)}\n{_hermes(OTHER)}", CALL, OTHER),
    "call after text": _called(f"{SAID}\n{_hermes(CALL)}", CALL, content=f"{SAID}\n"),
    "broken call": _plain(
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": }}\n</tool_call>'
    ),
    "call cut off": _cut('<tool_call>\n{"name": "add", "arguments": {"a": 2, "b"'),
}


def _xml(call: str = "<parameter=a>\n2\n</parameter>\n<parameter=b>\n3\n</parameter>\n") -> str:
    return f"<tool_call>\n<function=add>\n{call}</function>\n</tool_call>"


_XML_OTHER = _xml("<parameter=a>\n4\n</parameter>\n<parameter=b>\n5\n</parameter>\n")
_XML = {
    "plain": _plain(),
    "one call": _called(_xml(), CALL),
    "several calls": _called(f"{_xml()}\n{_XML_OTHER}", CALL, OTHER),
    "call after text": _called(f"{SAID}\n{_xml()}", CALL, content=f"{SAID}\n"),
    "broken call": _called(
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</tool_call>",
        ("add", '{"a": 2}'),
    ),
    "call cut off": _cut(
        "<tool_call>\n<function=add>\n<parameter=a>\n2",
        Reply(calls=(("add", '{"a": 2}'),), finish_reason="tool_calls"),
    ),
}


def _llama(call: tuple[str, str]) -> str:
    return _json(call, "parameters")


_LLAMA = {
    "plain": _plain(),
    "one call": _called(_llama(CALL), CALL),
    "several calls": _called(f"{_llama(CALL)}; {_llama(OTHER)}", CALL, OTHER),
    "call after text": _called(f"{SAID}\n{_llama(CALL)}", CALL),
    "broken call": _plain('{"name": "add", "parameters": {"a": 2, "b": }}'),
    "call cut off": _cut('{"name": "add", "parameters": {"a": 2, "b"'),
    **_THINKS_NOT,
}


def _commentary(arguments: str) -> str:
    return f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{arguments}"


_START, _END = "<|start|>assistant", "<|end|>"
_HARMONY = {
    "plain": Case(text=f"<|channel|>final<|message|>{PLAIN}", served=Reply(content=PLAIN)),
    "thinking": Case(
        text=f"<|channel|>analysis<|message|>{THOUGHT}{_END}{_START}<|channel|>final<|message|>"
        f"{PLAIN}",
        served=Reply(content=PLAIN, reasoning=THOUGHT),
    ),
    "one call": _called(_commentary(CALL[1]), CALL, ender="<|call|>"),
    "several calls": _called(
        f"{_commentary(CALL[1])}<|call|>{_START}{_commentary(OTHER[1])}",
        CALL,
        OTHER,
        ender="<|call|>",
    ),
    "call after text": _called(
        f"<|channel|>commentary<|message|>{SAID}{_END}{_START}{_commentary(CALL[1])}",
        CALL,
        content=SAID,
        ender="<|call|>",
    ),
    "broken call": _called(
        _commentary('{"a": 2, "b": }'), ("add", '{"a": 2, "b": }'), ender="<|call|>"
    ),
    "call cut off": _cut(_commentary('{"a": 2, "b"'), Reply(finish_reason="length")),
    "thinking cut off": _cut(
        f"<|channel|>analysis<|message|>{THOUGHT}",
        Reply(reasoning=THOUGHT, finish_reason="length"),
    ),
    "stray close tag": Case(
        text=f"<|channel|>final<|message|>{STRAY}", served=Reply(content=STRAY)
    ),
}


_BROKEN_LIST = '[{"name": "add", "arguments": {"a": 2, "b": }}]'
_CUT_LIST = '[{"name": "add", "arguments": {"a": 2, "b"'
_MISTRAL = {
    "plain": _plain(),
    "one call": _called(f"[TOOL_CALLS] [{_json(CALL)}]", CALL),
    "several calls": _called(f"[TOOL_CALLS] [{_json(CALL)}, {_json(OTHER)}]", CALL, OTHER),
    "call after text": _called(f"{SAID}[TOOL_CALLS] [{_json(CALL)}]", CALL, content=SAID),
    "broken call": Case(text=f"[TOOL_CALLS] {_BROKEN_LIST}", served=Reply(content=_BROKEN_LIST)),
    "call cut off": _cut(
        f"[TOOL_CALLS] {_CUT_LIST}", Reply(content=_CUT_LIST, finish_reason="length")
    ),
    **_THINKS_NOT,
}


def _deepseek(arguments: str, *, last: bool = True) -> str:
    begin = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    return f"{begin}{arguments}\n```<｜tool▁call▁end｜>" + (
        "<｜tool▁calls▁end｜>" if last else "\n"
    )


_CALLS = "<｜tool▁calls▁begin｜>"
_CLOSED = "</think>\n\n"
_DEEPSEEK = {
    "plain": Case(text=f"\n{_CLOSED}{PLAIN}", served=Reply(content=f"\n\n{PLAIN}", reasoning="\n")),
    "thinking": Case(
        text=f"{THOUGHT}\n{_CLOSED}{PLAIN}",
        served=Reply(content=f"\n\n{PLAIN}", reasoning=f"{THOUGHT}\n"),
    ),
    "one call": Case(
        text=f"{THOUGHT}\n</think>{_CALLS}{_deepseek(CALL[1])}",
        served=Reply(reasoning=f"{THOUGHT}\n", calls=(CALL,), finish_reason="tool_calls"),
    ),
    "several calls": Case(
        text=f"{THOUGHT}\n</think>{_CALLS}{_deepseek(CALL[1], last=False)}{_deepseek(OTHER[1])}",
        served=Reply(reasoning=f"{THOUGHT}\n", calls=(CALL, OTHER), finish_reason="tool_calls"),
    ),
    "call after text": Case(
        text=f"{THOUGHT}\n{_CLOSED}{SAID}{_CALLS}{_deepseek(CALL[1])}",
        served=Reply(
            content=f"\n\n{SAID}",
            reasoning=f"{THOUGHT}\n",
            calls=(CALL,),
            finish_reason="tool_calls",
        ),
    ),
    "broken call": Case(
        text=f"{THOUGHT}\n</think>{_CALLS}" + _deepseek('{"a": 2, "b": }'),
        served=Reply(
            reasoning=f"{THOUGHT}\n",
            calls=(("add", '{"a": 2, "b": }'),),
            finish_reason="tool_calls",
        ),
    ),
    "call cut off": _cut(
        f"{THOUGHT}\n</think>{_CALLS}<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 2',
        Reply(reasoning=f"{THOUGHT}\n", finish_reason="tool_calls"),
    ),
    "thinking cut off": _cut(THOUGHT, Reply(reasoning=THOUGHT, finish_reason="length")),
    "stray close tag": Case(text=STRAY, served=Reply(content="5", reasoning="First try: 4")),
}


def _glm(a: int, b: int) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in (("a", a), ("b", b))
    )
    return f"<tool_call>add\n{pairs}</tool_call>"


_GLM = {
    "plain": _plain(),
    "one call": _called(_glm(2, 3), CALL),
    "several calls": _called(f"{_glm(2, 3)}\n{_glm(4, 5)}", CALL, OTHER),
    "call after text": _called(f"{SAID}\n{_glm(2, 3)}", CALL, content=f"{SAID}\n"),
    "broken call": _called(
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2\n</tool_call>", ("add", "{}")
    ),
    "call cut off": _cut("<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2"),
    **_THINKS,
}

_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CHATML_HEADER = "<|im_start|>assistant\n"
_HARMONY_CONTROL = (
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>",
)  # fmt: skip
_LLAMA_CONTROL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
_LLAMA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"

FAMILIES: Mapping[str, Family] = {
    "Qwen2.5": Family(
        ender="<|im_end|>",
        control=_CHATML,
        header=_CHATML_HEADER,
        marks="<tool_call></tool_call>",
        cases={**_HERMES, **_THINKS_NOT},
    ),
    "Qwen3": Family(
        ender="<|im_end|>",
        control=_CHATML,
        header=_CHATML_HEADER,
        marks="<tool_call></tool_call>",
        cases={**_HERMES, **_THINKS},
    ),
    "Qwen3-Coder": Family(
        ender="<|im_end|>",
        control=_CHATML,
        header=_CHATML_HEADER,
        marks="<tool_call><function=name><parameter=key>",
        cases={**_XML, **_THINKS_NOT},
    ),
    "Llama 3.1": Family(
        ender="<|eot_id|>",
        control=_LLAMA_CONTROL,
        header=_LLAMA_HEADER,
        marks="<|start_header_id|>",
        cases=_LLAMA,
    ),
    "Llama 3.2": Family(
        ender="<|eot_id|>",
        control=_LLAMA_CONTROL,
        header=_LLAMA_HEADER,
        marks="<|start_header_id|>",
        cases={
            **_LLAMA,
            # As this one is often seen to write.
            "one call": _called(f'{{"type": "function", {_llama(CALL)[1:]}', CALL),
            "several calls": _called(f"[{_llama(CALL)}, {_llama(OTHER)}]", CALL, OTHER),
        },
    ),
    "gpt-oss": Family(
        ender="<|return|>",
        control=_HARMONY_CONTROL,
        header="<|start|>assistant",
        marks="<|channel|>",
        cases=_HARMONY,
    ),
    "Mistral": Family(
        ender="</s>",
        control=("</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        header="[/INST]",
        marks="[TOOL_CALLS]",
        cases=_MISTRAL,
    ),
    "DeepSeek-R1": Family(
        ender="<｜end▁of▁sentence｜>",
        control=("<｜end▁of▁sentence｜>", "<｜Assistant｜>"),
        header="<｜Assistant｜><think>\n",
        marks="<｜tool▁call▁begin｜>",
        cases=_DEEPSEEK,
    ),
    "GLM-4.5": Family(
        ender="<|user|>",
        control=("<|user|>", "<|assistant|>", "<|observation|>"),
        header="<|assistant|>",
        marks="<arg_key>",
        cases=_GLM,
    ),
}
