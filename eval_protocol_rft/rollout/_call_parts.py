"""What forms of tool calls are made of: JSON in the middle of text, and values typed by a schema.

Invariant: arguments written as JSON stay the very text that was sampled; values in tags become what
was sampled, as the tool's schema types them; whatever is neither is a `CallProblemError`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any, Literal

import msgspec

from eval_protocol_rft._errors import EvalProtocolRftError

ProblemKind = Literal["json", "shape", "unclosed", "stray"]
Call = tuple[str, str]
"""Name and arguments, a JSON object as text."""
Tools = Sequence[Mapping[str, Any]] | None

SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseProblem:
    """Why the text's tool calls cannot be run."""

    kind: ProblemKind
    """`json`: not JSON; `shape`: JSON, but no call; `unclosed`: the call does not end; `stray`:
    something between or behind calls where the format has no place for it."""
    message: str
    """What is wrong and what is expected, in words that can be shown to the model."""


class CallProblemError(EvalProtocolRftError):
    """Carries a `ParseProblem`."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.problem = ParseProblem(kind=kind, message=message)


class _ArgumentsCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


class _ParametersCall(msgspec.Struct):
    name: str
    parameters: msgspec.Raw


def json_call(
    text: str, start: int, index: int, key: Literal["arguments", "parameters"] = "arguments"
) -> tuple[str, str, int]:
    """Name, arguments as they stand there, and where the call's JSON ends; `key` holds them.

    Raises:
        CallProblemError: there is no such call at `start`.
    """
    where = f"Tool call {index + 1}"
    expected = f'Write {{"name": "...", "{key}": {{...}}}}.'
    start = skip_blanks(text, start)
    if start == len(text):
        raise CallProblemError("unclosed", f"{where} is empty. {expected}")
    try:
        end = DECODER.raw_decode(text, start)[1]
        kind: type[_ArgumentsCall | _ParametersCall]
        kind = _ArgumentsCall if key == "arguments" else _ParametersCall
        call = msgspec.json.decode(text[start:end], type=kind)
        raw = call.arguments if isinstance(call, _ArgumentsCall) else call.parameters
        arguments = bytes(raw).decode()
        is_object = arguments.startswith("{")
    except msgspec.ValidationError as error:
        raise CallProblemError(
            "shape", f"{where} is JSON, but no call: {error}. {expected}"
        ) from error
    # A ValueError: not JSON, or JSON that is no Unicode text.
    except (ValueError, RecursionError) as error:
        raise _not_json(text, start, f"{where} is not JSON", error, expected) from error
    if not is_object:
        raise CallProblemError(
            "shape", f"{where}: {key} must be a JSON object, not {arguments[:SHOWN]}. {expected}"
        )
    return call.name, arguments, end


def json_arguments(text: str, where: str) -> str:
    """The JSON object that `text` is.

    Raises:
        CallProblemError: it is none.
    """
    arguments, end = json_object(text, 0, where)
    if text[end:].strip():
        raise CallProblemError(
            "stray", f"{where}: {text[end:].strip()[:SHOWN]!r} follows its arguments."
        )
    return arguments


def json_object(text: str, start: int, where: str) -> tuple[str, int]:
    """A JSON object as it stands at `start`, and where it ends."""
    start = skip_blanks(text, start)
    try:
        value, end = DECODER.raw_decode(text, start)
        text[start:end].encode()
    except (ValueError, RecursionError) as error:
        raise _not_json(text, start, f"{where}: its arguments are not JSON", error, "") from error
    if not isinstance(value, dict):
        raise CallProblemError("shape", f"{where}: its arguments must be a JSON object.")
    return text[start:end], end


def _not_json(
    text: str, start: int, what: str, error: Exception, expected: str
) -> CallProblemError:
    shown = text[start : start + SHOWN]
    return CallProblemError("json", f"{what}: {error}: {shown!r}. {expected}".rstrip())


def skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


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
        if DECODER.raw_decode(bare)[1] == len(bare):
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


def _no_constant(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is no JSON number")


DECODER = JSONDecoder(parse_constant=_no_constant)
