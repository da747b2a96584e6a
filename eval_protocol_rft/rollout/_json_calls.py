"""Tool calls that models write as JSON in the middle of text: Hermes, Llama 3, Mistral.

Invariant: a call is what the model wrote, or a `CallProblemError` that says what is wrong with it.
Nothing is closed, unquoted or completed for the model, and no call is left out. Arguments stay the
very text that was sampled.

What is not the form's own way to write a call, but plainly means one, is a problem: it must not
pass for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any, Literal, get_args

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


Key = Literal["arguments", "parameters"]
_CALLS: Mapping[Key, type[msgspec.Struct]] = {
    key: msgspec.defstruct("_Call", [("name", str), (key, msgspec.Raw)]) for key in get_args(Key)
}


def json_call(text: str, start: int, index: int, key: Key = "arguments") -> tuple[str, str, int]:
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
        call: Any = msgspec.json.decode(text[start:end], type=_CALLS[key])
        arguments = bytes(getattr(call, key)).decode()
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


def _no_constant(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is no JSON number")


DECODER = JSONDecoder(parse_constant=_no_constant)


OPEN, CLOSE = "<tool_call>", "</tool_call>"


def hermes(text: str, tools: Tools = None) -> tuple[str, list[Call]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, anywhere."""
    spoken: list[str] = []
    calls: list[Call] = []
    at = 0
    while (opened := text.find(OPEN, at)) >= 0:
        spoken.append(text[at:opened])
        name, arguments, at = json_call(text, opened + len(OPEN), len(calls))
        at = call_end(text, at, len(calls), "its JSON object")
        calls.append((name, arguments))
    return spoken_beside(text, [*spoken, text[at:]], calls)


def call_end(text: str, at: int, index: int, what: str) -> int:
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
            return spoken_beside(text, [text[:start]], calls)
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
    return spoken_beside(text, [content], calls)


def spoken_beside(text: str, pieces: Sequence[str], calls: list[Call]) -> tuple[str, list[Call]]:
    """What was said beside calls, without the line breaks that stood between it and them."""
    if not calls:
        return text, []
    stripped = (piece.strip("\n") for piece in pieces)
    return "\n".join(piece for piece in stripped if piece.strip()), calls
