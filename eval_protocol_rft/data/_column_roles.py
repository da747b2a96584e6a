"""Which column of a data set plays which part: its prompt, its ground truth, and what its rows are
called; and whether a prompt and its tools can be asked.

Invariant: a data set's prompts are all text, all message lists or all token ids. The same rows as
Parquet and as JSONL are the same prompts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from eval_protocol_rft.data.source._columns import (
    Source,
    SourceColumn,
    SourceRow,
    listed_columns,
    type_name,
    without_nulls,
)
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.rollout import PROMPT_IDS_KEY

logger = logging.getLogger(__name__)
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


BEHIND = "####"
"""Ends a path to text of which what stands behind the last of these marks is meant, as in GSM8K."""
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class ColumnPath:
    """Where a row holds a value: a column, a field in its objects (`reward_model.ground_truth`), or
    what stands behind a mark in its text (`answer####`). Made by `ColumnPath.find`."""

    key: str
    """As it is written."""
    column: SourceColumn
    fields: tuple[str, ...] = ()
    behind: bool = False
    type: pa.DataType | None = None
    """Arrow type of the values; None where objects of JSON hold them, whose values tell."""

    @classmethod
    def find(cls, source: Source, key: str, flag: str) -> ColumnPath:
        """What `key` leads to.

        Args:
            flag: that it was given as, for messages.

        Raises:
            SourceError: there is no such column, or no such field in it.
        """
        columns = {column.name: column for column in source.columns}
        if key in columns:
            return cls(key, columns[key], type=columns[key].type)
        behind = key.endswith(BEHIND)
        names = key.removesuffix(BEHIND).split(".")
        # A column's own name may have dots.
        cuts = [i for i in range(len(names), 0, -1) if ".".join(names[:i]) in columns]
        if not cuts:
            listed = listed_columns(list(columns))
            raise SourceError(f"{source.name}: {flag} {key}: no column {names[0]!r}; {listed}")
        column, fields = columns[".".join(names[: cuts[0]])], tuple(names[cuts[0] :])
        kind: Any = column.type
        for i, name in enumerate(() if column.is_json else fields):
            if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
                held = [f.name for f in kind] if pa.types.is_struct(kind) else [str(kind)]
                place = ".".join((column.name, *fields[:i]))
                raise SourceError(
                    f"{source.name}: {flag} {key}: {place} has no {name!r}: it holds "
                    f"{', '.join(held)}"
                )
            kind = kind.field(name).type
        if behind:
            kind = pa.string()
        elif column.is_json:
            kind = None
        return cls(key, column, fields, behind, kind)

    def of(self, row: SourceRow) -> Any:
        """The row's value; None where there is none.

        Raises:
            SourceError: something on the way is no object, or the text has no mark.
        """
        value = row.values[self.column.name]
        for name in self.fields:
            if value is None:
                return None
            if not isinstance(value, dict):
                found = type_name(value)
                raise SourceError(f"{row.where}: {self.key}: {name!r} is looked for in {found}")
            value = value.get(name)
        if not self.behind or value is None:
            return value
        answer = ""
        if isinstance(value, str) and BEHIND in value:
            answer = value.rpartition(BEHIND)[2].strip()
        if not answer:
            raise SourceError(f"{row.where}: {self.key}: there is nothing behind {BEHIND}")
        return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


class GroundTruth:
    """The ground truth of a data set: what is named, the column of that name, or where data sets of
    known shapes hold it, if all rows do. `look` sees every row first."""

    def __init__(self, source: Source, prompt_key: str, key: str | None) -> None:
        self._shape: str | None = None
        """Whose it is, where the data set is taken to be of a known one."""
        self._named = key is not None
        self._kinds: set[type] = set()
        self.path: ColumnPath | None = None
        columns = {column.name: column for column in source.columns}
        if key is not None:
            self.path = ColumnPath.find(source, key, "--ground-truth-key")
        elif "ground_truth" in columns:
            self.path = ColumnPath.find(source, "ground_truth", "")
        elif "reward_model" in columns and not pa.types.is_null(columns["reward_model"].type):
            self._try(source, "reward_model.ground_truth", "verl's")
        elif {"question", "answer"} <= columns.keys() and prompt_key == "question":
            self._try(source, f"answer{BEHIND}", "GSM8K's")

    def _try(self, source: Source, key: str, shape: str) -> None:
        with contextlib.suppress(SourceError):
            self.path, self._shape = ColumnPath.find(source, key, ""), shape

    def look(self, row: SourceRow) -> None:
        """See one row.

        Raises:
            SourceError: what was named is not there.
        """
        if self.path is None:
            return
        try:
            value = self.path.of(row)
        except SourceError:
            if self._shape is None:
                raise
            value = None
        if value is not None:
            self._kinds.add(type(value))
        elif self._shape is not None:
            self.path = self._shape = None  # not of that shape after all

    def said(self) -> str | None:
        """What to tell of a shape that was recognised, once all rows were seen.

        Raises:
            SourceError: what was named is in no row.
        """
        if self._named and self.path is not None and not self._kinds:
            raise SourceError(f"--ground-truth-key {self.path.key}: no row has that")
        if self.path is None or self._shape is None:
            return None
        return (
            f"the data set has {self._shape} shape: the ground truth is taken from "
            f"{self.path.key!r} (--ground-truth-key names another)"
        )

    @property
    def type(self) -> pa.DataType | None:
        """Arrow type that it is stored as, once all rows were seen; None: there is none."""
        if self.path is None:
            return None
        return self.path.type or pa.string()

    @property
    def is_json(self) -> bool:
        """Whether that is JSON text."""
        if self.path is None:
            return False
        if self.path.type is None:
            return not self._kinds <= {str}
        return self.path.column.is_json and not self.path.behind


class RowIds:
    """What the rows of a data set are called: what is named, or a column `row_id` if its values are
    all different. `look` sees every row first, then comes `check`."""

    COLUMN = "row_id"

    def __init__(self, source: Source, key: str | None) -> None:
        self._named = key is not None
        self._hashes = array("q")  # eight bytes a row
        self.path: ColumnPath | None = None
        if key is not None or any(column.name == self.COLUMN for column in source.columns):
            self.path = ColumnPath.find(source, key or self.COLUMN, "--row-id-key")

    def look(self, row: SourceRow) -> None:
        """See one row.

        Raises:
            SourceError: what was named is missing, or no name.
        """
        if self.path is not None:
            with self._or_none():
                self._hashes.append(hash(self.of(row)))

    def check(self, rows: Callable[[], Iterator[SourceRow]]) -> None:
        """See that no two of the rows that were seen are called the same.

        Raises:
            SourceError: some are, of a column that was named.
        """
        if self.path is None:
            return
        hashes = np.asarray(self._hashes)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(np.diff(hashes[order]) == 0)
        if not len(again):
            return
        first, second = sorted(order[again[0] : again[0] + 2].tolist())
        pair = [row for i, row in enumerate(islice(rows(), second + 1)) if i in (first, second)]
        with self._or_none():
            raise SourceError(
                f"{pair[1].where}: {self.path.key} is {self.of(pair[1])!r}, as in {pair[0].where}: "
                "completions of two rows would be taken for those of one"
            )

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        """What was not named, but found, is used where it can be."""
        try:
            yield
        except SourceError as error:
            if self._named:
                raise
            logger.warning("rows are not called by their column %s: %s", self.COLUMN, error)
            self.path = None

    def of(self, row: SourceRow) -> str | None:
        """The name of a row; None where rows have none of their own.

        Raises:
            SourceError: it is neither text nor a whole number.
        """
        if self.path is None:
            return None
        value = self.path.of(row)
        if type(value) is int or (isinstance(value, str) and value.strip()):
            return str(value)
        found = "empty" if isinstance(value, str) else type_name(value)
        raise SourceError(
            f"{row.where}: {self.path.key} is {found}, and a row's id is text or a whole number"
        )
