"""Which column of a data set plays which part: what its prompt is called, and whether a prompt and
its tools can be asked.

Invariant: a data set's prompts are all text, all message lists or all token ids. The same rows as
Parquet and as JSONL are the same prompts.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import pyarrow as pa

from eval_protocol_rft.data.source._columns import (
    Source,
    SourceRow,
    listed_columns,
    type_name,
    without_nulls,
)
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.rollout import PROMPT_IDS_KEY

SourceKind = Literal["text", "messages", "ids"]
"""What a data set has in its prompt column."""

PROMPT_COLUMNS = (
    PROMPT_IDS_KEY,
    "prompt",
    "messages",
    "question",
    "problem",
    "instruction",
    "input",
)
"""What prompt columns are usually called; the first that exists is taken."""


def prompt_column(source: Source, key: str | None = None) -> str:
    """The column that holds the prompt: `key`, or the first of `PROMPT_COLUMNS` that exists.

    Raises:
        SourceError: there is no such column.
    """
    names = [column.name for column in source.columns]
    if key is not None:
        if key not in names:
            raise SourceError(f"{source.name}: no column {key!r}; {listed_columns(names)}")
        return key
    for name in PROMPT_COLUMNS:
        if name in names:
            return name
    raise SourceError(
        f"{source.name}: which column holds the prompt? None is called "
        f"{', '.join(PROMPT_COLUMNS)}; {listed_columns(names)}. Name it with --prompt-key"
    )


def check_prompt(row: SourceRow, column: str, expected: SourceKind | None) -> SourceKind:
    """What kind of prompt a row has. A message list written as JSON text is one of messages, unless
    the rows before have text.

    Args:
        row: the row.
        column: the column that holds its prompt.
        expected: kind of the data set's other prompts; None for the first row.

    Returns:
        "messages" for a list of objects, each with a `role` and `content` (or, for a call of tools,
        `tool_calls`); "text" for text; "ids" for a list of token ids, in the column of that name.

    Raises:
        SourceError: the prompt is empty, of neither kind, or of another kind than `expected`.
    """
    prompt = row.values[column]
    place = f"{row.where}: the prompt in {column!r}"
    if isinstance(prompt, str) and expected != "text" and column != PROMPT_IDS_KEY:
        prompt = messages_in(prompt) or prompt
    kind: SourceKind
    if column == PROMPT_IDS_KEY:
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise SourceError(f"{place} is {type_name(prompt)}, not a list of token ids")
        kind = "ids"
    elif isinstance(prompt, str):
        kind = "text"
    elif isinstance(prompt, list):
        kind = "messages"
    else:
        raise SourceError(f"{place} is {type_name(prompt)}, not text or a list of messages")
    if not prompt:
        raise SourceError(f"{place} is empty")
    if kind == "messages":
        for i, message in enumerate(prompt):
            _check_message(message, f"{place}: message {i}")
    if expected is not None and kind != expected:
        raise SourceError(
            f"{place} is {_NAMES[kind]}, but the rows before have {_NAMES[expected]}: a data set "
            "must be of one kind"
        )
    return kind


def messages_in(text: str) -> list[dict[str, Any]] | None:
    """The messages of a list of them that was written as JSON text; None: it is text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_chat = values and all(
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and ("content" in value or "tool_calls" in value)
        for value in values
    )
    return values if is_chat else None


def without_absent(value: Any, type_: pa.DataType) -> Any:
    """A value of an Arrow column without the keys that other rows have. A struct has the fields of
    all rows, so a key that a row lacks reads as a null; a null that was meant reads the same, and
    in a message or a schema says as much as no key.

    Args:
        type_: of the column. What is not nested (JSON's columns are text) stays as it is.
    """
    return without_nulls(value) if pa.types.is_nested(type_) else value


def tools_in(value: Any, place: str) -> list[dict[str, Any]] | None:
    """The tools of a row, in the chat API's form: a list of objects, or JSON text of the list or of
    each of them. None where there are none.

    Raises:
        SourceError: it is something else; the message begins with `place`.
    """
    value = _decoded(value, place)
    tools = [_decoded(tool, place) for tool in value] if isinstance(value, list) else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SourceError(f"{place} {_TOOLS}")
    return tools


def _decoded(value: Any, place: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} {_TOOLS}; its text is no JSON: {error}") from error


_TOOLS = "must be a list of tools, objects of the chat API, or the JSON text of one"

_NAMES: dict[SourceKind, str] = {
    "text": "text",
    "messages": "a list of messages",
    "ids": "a list of token ids",
}


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise SourceError(f"{place} is {type_name(message)}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if "role" not in message:
        raise SourceError(f"{place} has no role (its keys: {', '.join(message) or 'none'})")
    if not isinstance(role, str) or not role:
        found = "empty" if role == "" else type_name(role)
        raise SourceError(f"{place} has a role that is {found}, not text like 'user'")
    if content is None and not message.get("tool_calls"):
        found = "null as its content" if "content" in message else "no content"
        raise SourceError(f"{place} has {found}")
    if content is not None and not isinstance(content, (str, list)):
        raise SourceError(
            f"{place} has content that is {type_name(content)}, not text or a list of parts"
        )
