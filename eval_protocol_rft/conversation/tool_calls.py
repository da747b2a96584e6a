"""Tool calls out of sampled text.

Invariant: a call is what the model wrote, or a `ParseProblem` that says what is wrong with it.
Nothing is closed, unquoted or completed for the model, no call is left out, and the arguments stay
the very text that was sampled.

Parsers of general libraries close what was left open and lose the good calls beside a bad one, or
raise; that is right for an answer to a user, and wrong for what a policy is rewarded for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any, Literal

import msgspec

from eval_protocol_rft.prompts import PromptError
from eval_protocol_rft.tokenizer import LoadedTokenizer

ToolFormat = Literal["hermes", "llama3_json"]
ProblemKind = Literal["json", "shape", "unclosed", "stray"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THOUGHT_CLOSE = "</think>"
_PYTHON_TAG = "<|python_tag|>"
_LLAMA_CALL = re.compile(r"\s*(?:<\|python_tag\|>|\{\s*\"name\"\s*:)")
"""How a Llama call begins. Other JSON is an answer."""
_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseProblem:
    """Why the text's tool calls cannot be run."""

    kind: ProblemKind
    """`json`: not JSON; `shape`: JSON, but no call; `unclosed`: the call does not end; `stray`:
    something between or behind calls where the format has no place for it."""
    message: str
    """What is wrong and what is expected, in words that can be shown to the model."""


class _HermesCall(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


class _LlamaCall(msgspec.Struct):
    name: str
    parameters: msgspec.Raw


class _Problem(Exception):  # noqa: N818 - carries a problem, is none
    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.problem = ParseProblem(kind=kind, message=message)


def tool_format(tokenizer: LoadedTokenizer) -> ToolFormat | None:
    """How the model of this tokenizer writes tool calls, as far as its chat template tells: Hermes
    where it shows that form, or is ChatML and shows no form of its own; None where it is neither
    that nor Llama 3."""
    template = str(getattr(tokenizer.tokenizer, "chat_template", None) or "")
    if "<function=" in template or "<arg_key>" in template:
        return None  # calls inside <tool_call>, but not as JSON
    if _OPEN in template or "<|im_start|>" in template:
        return "hermes"
    return "llama3_json" if "<|start_header_id|>" in template else None


def parse_tool_calls(
    text: str,
    tokenizer: LoadedTokenizer,
    *,
    format: ToolFormat | None = None,  # noqa: A002 - the word for it
    id_prefix: str = "call",
) -> tuple[str, list[dict[str, Any]] | ParseProblem]:
    """Split an answer into what it says and what it calls.

    Args:
        text: the sampled text, without the token that ended it.
        tokenizer: its chat template tells the format.
        format: `hermes` (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number,
            anywhere after a closed `<think>` block) or `llama3_json`
            (`{"name": ..., "parameters": {...}}` as the whole answer, several separated by `;`);
            None: as `tool_format` says.
        id_prefix: calls get the ids `{id_prefix}_0`, `{id_prefix}_1`, ...

    Returns:
        Content (all of `text` where nothing is called or there is a problem), and the calls in the
        chat API's form, their arguments as the JSON text that was sampled.

    Raises:
        PromptError: the format cannot be told. Malformed calls are a `ParseProblem`.
    """
    known = format or tool_format(tokenizer)
    if known is None:
        raise PromptError(
            f"cannot tell how the model of {tokenizer.name!r} writes tool calls from its chat "
            'template: give format="hermes" or "llama3_json", or parse its calls yourself'
        )
    try:
        content, calls = _hermes(text) if known == "hermes" else _llama(text)
    except _Problem as found:
        return text, found.problem
    return content, [
        {
            "id": f"{id_prefix}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]


def _hermes(text: str) -> tuple[str, list[tuple[str, str]]]:
    began = _thought_end(text)
    if began is None:
        return text, []  # still thinking: what it writes there calls nothing
    thought, answer = text[:began], text[began:]
    said: list[str] = []
    calls: list[tuple[str, str]] = []
    at = 0
    while (opened := answer.find(_OPEN, at)) >= 0:
        said.append(answer[at:opened])
        name, arguments, at = _call(answer, opened + len(_OPEN), len(calls), _HermesCall)
        at += len(answer[at:]) - len(answer[at:].lstrip())
        if not answer.startswith(_CLOSE, at):
            behind = answer[at : at + _SHOWN]
            raise _Problem(
                "stray" if behind else "unclosed",
                f"Tool call {len(calls) + 1} must end with {_CLOSE} after its JSON object, "
                f"not with {behind!r}.",
            )
        at += len(_CLOSE)
        calls.append((name, arguments))
    if not calls:
        return text, []
    said.append(answer[at:])
    spoken = "\n".join(part for part in (piece.strip("\n") for piece in said) if part.strip())
    return thought + spoken, calls


def _thought_end(text: str) -> int | None:
    """Where the answer begins behind a think block, opened in the text or by the prompt; 0 where
    there is none, None where it was not closed. A tag inside a call's JSON closes nothing, unless
    the call stands in a block itself."""
    closed = text.find(_THOUGHT_CLOSE)
    if text.lstrip().startswith("<think>"):
        return closed + len(_THOUGHT_CLOSE) if closed >= 0 else None
    at = 0
    while closed >= 0:
        opened = text.find(_OPEN, at)
        if not 0 <= opened < closed:
            return closed + len(_THOUGHT_CLOSE)
        at = opened + len(_OPEN)
        with contextlib.suppress(_Problem):  # no call: what it is, the answer's own parse says
            at = _call(text, at, 0, _HermesCall)[2]
        if at > closed:
            closed = text.find(_THOUGHT_CLOSE, at)
    return 0


def _llama(text: str) -> tuple[str, list[tuple[str, str]]]:
    begun = _LLAMA_CALL.match(text)
    if not begun:
        return text, []
    at = begun.end() if begun.group().endswith(_PYTHON_TAG) else 0
    calls: list[tuple[str, str]] = []
    while True:
        name, arguments, at = _call(text, at, len(calls), _LlamaCall)
        calls.append((name, arguments))
        rest = text[at:].strip()
        if not rest:
            return "", calls
        if not rest.startswith(";"):
            raise _Problem(
                "stray",
                f"After tool call {len(calls)} nothing may follow but ';' and another call, not "
                f"{rest[:_SHOWN]!r}.",
            )
        at = text.index(";", at) + 1


def _call(
    text: str, start: int, index: int, kind: type[_HermesCall | _LlamaCall]
) -> tuple[str, str, int]:
    """Name, arguments as they stand there, and where the call's JSON ends."""
    where = f"Tool call {index + 1}"
    field = "arguments" if kind is _HermesCall else "parameters"
    expected = f'Write {{"name": "...", "{field}": {{...}}}}.'
    start += len(text[start:]) - len(text[start:].lstrip())
    if start == len(text):
        raise _Problem("unclosed", f"{where} is empty. {expected}")
    try:
        end = _DECODER.raw_decode(text, start)[1]
        call = msgspec.json.decode(text[start:end], type=kind)
        raw = call.arguments if isinstance(call, _HermesCall) else call.parameters
        arguments = bytes(raw).decode()
        is_object = arguments.startswith("{")
    except msgspec.ValidationError as error:
        raise _Problem("shape", f"{where} is JSON, but no call: {error}. {expected}") from error
    # A ValueError: not JSON, or JSON that is no Unicode text.
    except (ValueError, RecursionError) as error:
        shown = text[start : start + _SHOWN]
        raise _Problem("json", f"{where} is not JSON: {error}: {shown!r}. {expected}") from error
    if not is_object:
        raise _Problem(
            "shape", f"{where}: {field} must be a JSON object, not {arguments[:_SHOWN]}. {expected}"
        )
    return call.name, arguments, end


def _no_constant(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is no JSON number")


_DECODER = JSONDecoder(parse_constant=_no_constant)
