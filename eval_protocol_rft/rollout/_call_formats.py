"""How models write tool calls, and how each of these forms is read.

Invariant: a call is what the model wrote, or a `CallProblemError` that says what is wrong with it.
Nothing is closed, unquoted or completed for the model, and no call is left out. Where a form holds
arguments as JSON they stay the very text that was sampled; where it holds them in tags, they become
a JSON object whose values are what was sampled, as the tool's schema types them.

What is not the form's own way to write a call, but plainly means one, is a problem: it must not
pass for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from eval_protocol_rft.rollout._call_parts import (
    DECODER,
    SHOWN,
    Call,
    CallProblemError,
    Tools,
    json_call,
    json_object,
    json_of_tags,
    parameter_schema,
    skip_blanks,
    typed,
)

ToolFormat = Literal[
    "hermes", "llama3_json", "qwen3_coder", "glm", "mistral", "deepseek", "harmony"
]
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def hermes(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, anywhere."""
    spoken: list[str] = []
    calls: list[Call] = []
    at = 0
    while (opened := text.find(OPEN, at)) >= 0:
        spoken.append(text[at:opened])
        name, arguments, at = json_call(text, opened + len(OPEN), len(calls))
        at = _closed(text, at, len(calls), "its JSON object")
        calls.append((name, arguments))
    return _spoken(text, [*spoken, text[at:]], calls)


def _closed(text: str, at: int, index: int, what: str) -> int:
    """Where `</tool_call>` ends, which must come next."""
    at = skip_blanks(text, at)
    if not text.startswith(CLOSE, at):
        behind = text[at : at + SHOWN]
        raise CallProblemError(
            "stray" if behind else "unclosed",
            f"Tool call {index + 1} must end with {CLOSE} after {what}, not with {behind!r}.",
        )
    return at + len(CLOSE)


_LLAMA_MARK = re.compile(r'<\|python_tag\|>|\{(?=\s*")|\[(?=\s*\{)|<function=')
_LLAMA_BEGUN = re.compile(r'\{\s*"name"\s*:')
_LLAMA_BROKEN = re.compile(
    r'\[?\s*\{(?=\s*"(?:name|type|function|parameters|arguments)"\s*:)'
    r'(?=.*"(?:name|function)"\s*:)(?=.*"(?:parameters|arguments)"\s*:)',
    re.DOTALL,
)
"""What is no JSON, and is a call that went wrong rather than text with a brace in it."""
_MOST_BRACES = 100
"""Of text that begins like JSON and is none, before nothing more is expected of it: each costs a
look at all that follows."""
_PYTHONIC = re.compile(r"\[\s*\w+\((?:\s*|\s*\w+\s*=.*)\)\s*\]", re.DOTALL)
_LLAMA_EXPECTED = 'Write {"name": "...", "parameters": {...}}.'


def llama3_json(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`{"name": ..., "parameters": {...}}` behind any text, or a list of them; several separated
    by `;`. Keys in any order, others beside them. Other JSON is an answer."""
    begun = _llama_start(text)
    if begun is None:
        return text, []
    start, at = begun
    calls: list[Call] = []
    while True:
        at = skip_blanks(text, at)
        if text.startswith("[", at):
            at = _llama_list(text, at, calls)
        else:
            name, arguments, at = json_call(text, at, len(calls), "parameters")
            calls.append((name, arguments))
        rest = text[at:].strip()
        if not rest:
            return _spoken(text, [text[:start]], calls)
        if not rest.startswith(";"):
            raise CallProblemError(
                "stray",
                f"After tool call {len(calls)} nothing may follow but ';' and another call, not "
                f"{rest[:SHOWN]!r}.",
            )
        at = text.index(";", at) + 1


def _llama_start(text: str) -> tuple[int, int] | None:
    """Where what belongs to calls begins, and where the first call does; None where none does.

    Raises:
        CallProblemError: a call that is written in no way that can be read.
    """
    if _PYTHONIC.fullmatch(text.strip()):
        raise CallProblemError("shape", f"Tool calls are JSON, not Python. {_LLAMA_EXPECTED}")
    at = broken = 0
    while broken < _MOST_BRACES and (mark := _LLAMA_MARK.search(text, at)):
        start = mark.start()
        if mark.group() == "<|python_tag|>":
            return start, mark.end()
        if mark.group() == "<function=":
            raise CallProblemError(
                "shape", f"Tool calls are JSON, not <function=...>. {_LLAMA_EXPECTED}"
            )
        first = not text[:start].strip()
        if first and _LLAMA_BEGUN.match(text, start):
            return start, start
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            if _LLAMA_BROKEN.match(text, start):
                return start, start
            at, broken = start + 1, broken + 1
            continue
        if _means_call(value):
            return start, start
        at = end
    return None


def _means_call(value: Any) -> bool:
    """Whether a JSON value is meant as a call or a list of calls, readable or not."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, dict) and _means_call(item) for item in value)
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("function"), dict):
        return _means_call(value["function"])
    named = isinstance(value.get("name", value.get("function")), str)
    return named and ("parameters" in value or "arguments" in value)


def _llama_list(text: str, at: int, calls: list[Call]) -> int:
    """Add the calls of a JSON list that begins at `at`; where it ends."""
    at += 1
    while True:
        name, arguments, at = json_call(text, at, len(calls), "parameters")
        calls.append((name, arguments))
        at = skip_blanks(text, at)
        if text.startswith("]", at):
            return at + 1
        if not text.startswith(",", at):
            behind = text[at : at + SHOWN]
            raise CallProblemError(
                "stray" if behind else "unclosed",
                f"After tool call {len(calls)} the list must go on with ',' or end with ']', not "
                f"with {behind!r}.",
            )
        at += 1


_NAME = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>))", re.DOTALL
)
_FUNCTION_END = re.compile(r"\s*</function>")
_QWEN_EXPECTED = (
    "Write <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n"
    "</tool_call>."
)


def qwen3_coder(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`; the
    outer tags may be missing. What a schema does not say to be something else is a string."""
    spoken: list[str] = []
    calls: list[Call] = []
    at = 0
    while marks := [m for m in (text.find(OPEN, at), text.find("<function=", at)) if m >= 0]:
        opened = min(marks)
        spoken.append(text[at:opened])
        wrapped = text.startswith(OPEN, opened)
        where = f"Tool call {len(calls) + 1}"
        named = _NAME.match(text, opened + len(OPEN) if wrapped else opened)
        if not named:
            raise CallProblemError("shape", f"{where} names no function. {_QWEN_EXPECTED}")
        name, at = named.group(1).strip(), named.end()
        values: dict[str, str] = {}
        while parameter := _PARAMETER.match(text, at):
            key, at = parameter.group(1).strip(), parameter.end()
            if key in values:
                raise CallProblemError("shape", f"{where} gives {key!r} twice.")
            values[key] = typed(
                parameter.group(2), parameter_schema(tools, name, key), unknown="string"
            )
        end = _FUNCTION_END.match(text, at)
        if not end:
            behind = text[at:].strip()[:SHOWN]
            raise CallProblemError(
                "stray" if behind else "unclosed",
                f"{where}: a parameter or </function> must follow, not {behind!r}. "
                f"{_QWEN_EXPECTED}",
            )
        at = _closed(text, end.end(), len(calls), "</function>") if wrapped else end.end()
        calls.append((name, json_of_tags(values)))
    return _spoken(text, [*spoken, text[at:]], calls)


_GLM_NAME = re.compile(r"\s*([^\s<]+)")
_GLM_ARGUMENT = re.compile(
    r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|</tool_call>))",
    re.DOTALL,
)
_GLM_EXPECTED = (
    "Write <tool_call>name\n<arg_key>key</arg_key>\n<arg_value>value</arg_value>\n</tool_call>."
)


def glm(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>`. What a
    schema does not say to be a string is JSON where it can be read as JSON."""
    spoken: list[str] = []
    calls: list[Call] = []
    at = 0
    while (opened := text.find(OPEN, at)) >= 0:
        spoken.append(text[at:opened])
        where = f"Tool call {len(calls) + 1}"
        named = _GLM_NAME.match(text, opened + len(OPEN))
        if not named:
            raise CallProblemError("shape", f"{where} names no function. {_GLM_EXPECTED}")
        name, at = named.group(1), named.end()
        values: dict[str, str] = {}
        while argument := _GLM_ARGUMENT.match(text, at):
            key, at = argument.group(1).strip(), argument.end()
            if key in values:
                raise CallProblemError("shape", f"{where} gives {key!r} twice.")
            values[key] = typed(
                argument.group(2).strip(), parameter_schema(tools, name, key), unknown=""
            )
        at = _closed(text, at, len(calls), f"its arguments ({_GLM_EXPECTED})")
        calls.append((name, json_of_tags(values)))
    return _spoken(text, [*spoken, text[at:]], calls)


_TOOL_CALLS = "[TOOL_CALLS]"
_MISTRAL_NAME = re.compile(r"\s*([^\s{\[\]]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_MISTRAL_EXPECTED = '[TOOL_CALLS][{"name": "...", "arguments": {...}}]'


def mistral(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`[TOOL_CALLS]` and a JSON list of `{"name": ..., "arguments": {...}}`, or a name and its
    arguments (`name{...}`, `name[ARGS]{...}`), the tag before each."""
    content, *parts = text.split(_TOOL_CALLS)
    calls: list[Call] = []
    for part in parts:
        where = f"Tool call {len(calls) + 1}"
        at = skip_blanks(part, 0)
        if part.startswith("[", at):
            at += 1
            while True:
                name, arguments, at = json_call(part, at, len(calls))
                calls.append((name, arguments))
                at = skip_blanks(part, at)
                if not part.startswith(",", at):
                    break
                at += 1
            if not part.startswith("]", at):
                raise CallProblemError(
                    "unclosed", f"The list of tool calls must end with ']': {_MISTRAL_EXPECTED}."
                )
            at += 1
        else:
            named = _MISTRAL_NAME.match(part)
            if not named:
                shown = part.strip()[:SHOWN]
                raise CallProblemError(
                    "shape", f"{where} is no call: {shown!r}. Write {_MISTRAL_EXPECTED}."
                )
            arguments, at = json_object(part, named.end(), where)
            calls.append((named.group(1), arguments))
        if part[at:].strip():
            raise CallProblemError(
                "stray",
                f"Nothing may follow tool call {len(calls)}, not {part[at:].strip()[:SHOWN]!r}.",
            )
    return _spoken(text, [content], calls)


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^\n<]+?)"
    r"(?:\n```json\n|<｜tool▁sep｜>)"
)
_DEEPSEEK_END = re.compile(r"\s*(?:```)?\s*<｜tool▁call▁end｜>")


def deepseek(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """DeepSeek's tags, with the arguments as a block of JSON (V3, R1) or bare (V3.1)."""
    begun = text.find(_CALLS_BEGIN)
    if begun < 0:
        return text, []
    at = begun + len(_CALLS_BEGIN)
    calls: list[Call] = []
    while call := _DEEPSEEK_CALL.match(text, at):
        where = f"Tool call {len(calls) + 1}"
        arguments, at = json_object(text, call.end(), where)
        end = _DEEPSEEK_END.match(text, at)
        if not end:
            raise CallProblemError("unclosed", f"{where} does not end after its JSON object.")
        at = end.end()
        calls.append((call.group(1).strip(), arguments))
    at = skip_blanks(text, at)
    if not calls or not text.startswith(_CALLS_END, at):
        behind = text[at : at + SHOWN]
        raise CallProblemError(
            "stray" if behind else "unclosed",
            f"After tool call {len(calls)} another one or {_CALLS_END} must follow, not "
            f"{behind!r}.",
        )
    return _spoken(text, [text[:begun], text[at + len(_CALLS_END) :]], calls)


READERS: Mapping[ToolFormat, Callable[[str, Tools], tuple[str, list[Call]]]] = {
    "hermes": hermes,
    "llama3_json": llama3_json,
    "qwen3_coder": qwen3_coder,
    "glm": glm,
    "mistral": mistral,
    "deepseek": deepseek,
}
"""All but `harmony`, whose calls are messages of their own. Each takes an answer (no thinking in
front) and tools, and gives content and calls."""


def as_calls(
    calls: Sequence[Call], known: ToolFormat, id_prefix: str = "call"
) -> list[dict[str, Any]]:
    """Calls in the chat API's form."""
    return [
        {
            # Templates of Mistral refuse ids that are not nine letters or digits.
            "id": f"call{index:05d}" if known == "mistral" else f"{id_prefix}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]


def _spoken(text: str, pieces: Sequence[str], calls: list[Call]) -> tuple[str, list[Call]]:
    """What was said beside calls, without the line breaks that stood between it and them."""
    if not calls:
        return text, []
    stripped = (piece.strip("\n") for piece in pieces)
    return "\n".join(piece for piece in stripped if piece.strip()), calls
