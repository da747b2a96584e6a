"""Tool calls that models write in tags of their own (Qwen3 Coder, GLM, DeepSeek) or in channels
(gpt-oss), and all forms by their names.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}
    <|start|>assistant<|channel|>final<|message|>...

Invariant: as in `_json_calls`. Values that stand in tags become a JSON object whose values are what
was sampled, as the tool's schema types them. Of gpt-oss's answers (OpenAI's harmony format, above)
every message is in one channel, and no text is lost: what has no header that can be read is
content.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval_protocol_rft.rollout import _json_calls
from eval_protocol_rft.rollout._json_calls import OPEN, SHOWN, Call, CallProblemError, Tools

ToolFormat = Literal[
    "hermes", "llama3_json", "qwen3_coder", "glm", "mistral", "deepseek", "harmony"
]


def json_of_tags(values: Mapping[str, str]) -> str:
    """A JSON object of values that are JSON texts."""
    inside = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in values.items())
    arguments = "{" + ", ".join(inside) + "}"
    try:
        arguments.encode()
    except UnicodeEncodeError as error:
        raise CallProblemError("json", f"The arguments are no Unicode text: {error}.") from error
    return arguments


def typed(text: str, schema: Mapping[str, Any] | None, *, unknown: str) -> str:
    """A value that stands between tags, as JSON text: a string where the schema says so, else
    itself where it is JSON or Python's word for one of JSON's, else a string, for the tool to
    refuse. `unknown` is the type of what has no schema."""
    types = {unknown} if schema is None else _types(schema)
    word = {"none": "null", "null": "null", "true": "true", "false": "false"}.get(text.lower())
    if word == "null" and ("null" in types or "string" not in types):
        return word
    if "string" in types:
        return json.dumps(text, ensure_ascii=False)
    if word in ("true", "false") and types & {"boolean", ""}:
        return word
    bare = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        if _json_calls.DECODER.raw_decode(bare)[1] == len(bare):
            return bare
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema allows; "string" where it says none."""
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {str(one) for one in types}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return {kind for one in options if isinstance(one, Mapping) for kind in _types(one)}
    return {"string"}


def parameter_schema(tools: Tools, name: str, key: str) -> Mapping[str, Any] | None:
    """What the tool `name` says of its parameter `key`."""
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            schema = properties.get(key) if isinstance(properties, Mapping) else None
            return schema if isinstance(schema, Mapping) else None
    return None


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
        at = (
            _json_calls.call_end(text, end.end(), len(calls), "</function>")
            if wrapped
            else end.end()
        )
        calls.append((name, json_of_tags(values)))
    return _json_calls.spoken_beside(text, [*spoken, text[at:]], calls)


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
        at = _json_calls.call_end(text, at, len(calls), f"its arguments ({_GLM_EXPECTED})")
        calls.append((name, json_of_tags(values)))
    return _json_calls.spoken_beside(text, [*spoken, text[at:]], calls)


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
        arguments, at = _json_calls.json_object(text, call.end(), where)
        end = _DEEPSEEK_END.match(text, at)
        if not end:
            raise CallProblemError("unclosed", f"{where} does not end after its JSON object.")
        at = end.end()
        calls.append((call.group(1).strip(), arguments))
    at = _json_calls.skip_blanks(text, at)
    if not calls or not text.startswith(_CALLS_END, at):
        behind = text[at : at + SHOWN]
        raise CallProblemError(
            "stray" if behind else "unclosed",
            f"After tool call {len(calls)} another one or {_CALLS_END} must follow, not "
            f"{behind!r}.",
        )
    return _json_calls.spoken_beside(text, [text[:begun], text[at + len(_CALLS_END) :]], calls)


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


class Channels:
    """An answer, by channel."""

    def __init__(self, messages: Sequence[_Message]) -> None:
        self.messages = messages

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
            arguments = _json_calls.json_arguments(message.body, where)
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


READERS: Mapping[ToolFormat, Callable[[str, Tools], tuple[str, list[Call]]]] = {
    "hermes": _json_calls.hermes,
    "llama3_json": _json_calls.llama3_json,
    "qwen3_coder": qwen3_coder,
    "glm": glm,
    "mistral": _json_calls.mistral,
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
