"""The prompt in a row: which column holds it, and whether it can be asked.

Invariant: a data set's prompts are all text or all message lists; nothing is turned from one into
the other, and a prompt that cannot be asked is an error before it is sent.
"""

from __future__ import annotations

from typing import Any, Literal

from eval_protocol_rft.batch.source.filter import listed_columns
from eval_protocol_rft.batch.source.types import Source, SourceError, SourceRow, type_name

PROMPT_COLUMNS = ("prompt", "messages", "question", "problem", "instruction")
"""What prompt columns are usually called; the first that exists is taken."""

PromptKind = Literal["text", "messages"]


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


def check_prompt(row: SourceRow, column: str, expected: PromptKind | None) -> PromptKind:
    """What kind of prompt a row has. Text is never parsed: a message list written as JSON text is
    a prompt of text.

    Args:
        row: the row.
        column: the column that holds its prompt.
        expected: kind of the data set's other prompts; None for the first row.

    Returns:
        "messages" for a list of objects, each with a `role` and `content` (or, for a call of tools,
        `tool_calls`); "text" for text.

    Raises:
        SourceError: the prompt is empty, of neither kind, or of another kind than `expected`.
    """
    prompt = row.values[column]
    place = f"{row.where}: the prompt in {column!r}"
    kind: PromptKind
    if isinstance(prompt, str):
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


_NAMES: dict[PromptKind, str] = {"text": "text", "messages": "a list of messages"}


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
