"""What a data set of prompts is, whatever its file format.

Invariant: a row keeps its number. `data_idx` is the row's place in the data set as it is on disk,
so a run that was killed finds the same rows under the same numbers, shuffled or not.

Which rows of a data set are wanted: a Python-like expression over its columns.

Invariant: an expression either gives an answer for a row or is an error; a row on which it fails is
never counted as "no". Nothing outside the row can be reached and nothing in it can be changed.
"""

from __future__ import annotations

import abc
import ast
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.data.source._places import Place
from eval_protocol_rft.data.source._urls import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


ROW = "row"
"""The whole row as an object, for columns whose names are no Python names: `row["odd name"]`."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (abs, all, any, float, int, len, max, min, round, str, sum)
}

LIST_METHODS = {"count", "index"}
OBJECT_METHODS = {"get", "items", "keys", "values"}

LISTED_COLUMNS = 30
"""Columns that a message names at most."""


class FilterError(EvalProtocolRftError, ValueError):
    """An expression that is wrong, or that fails on a row."""


class Filter:
    """An expression, ready to be asked about rows. A row passes where it is true in Python's sense.

    Comparisons, arithmetic, `and`, `or`, `not`, `in`, `is None`, indexing (`meta["level"]`),
    comprehensions, methods of text (`subject.startswith("alg")`) and the functions in `FUNCTIONS`
    can be used. `row` is always the whole row, even where a column has that name.

    Raises:
        FilterError: it is no expression, or names a column or function that does not exist.
    """

    def __init__(self, expression: str, columns: Sequence[str]) -> None:
        import simpleeval

        self._expression = expression
        try:
            self._tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise FilterError(
                f"where {expression!r} is no expression: {error}. Equality is ==, and a column "
                f'whose name is no Python name is written {ROW}["odd name"]'
            ) from error
        self._columns = self._used_columns(columns)
        self._evaluator = simpleeval.EvalWithCompoundTypes(
            functions=dict(FUNCTIONS),
            allowed_attrs={
                str: simpleeval.BASIC_ALLOWED_ATTRS[str],
                list: LIST_METHODS,
                dict: OBJECT_METHODS,
            },
        )
        self._failures = (
            simpleeval.InvalidExpression,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        )

    def __call__(self, values: Mapping[str, Any]) -> bool:
        """Whether a row with these values passes.

        Raises:
            FilterError: the expression fails on them.
        """
        names = {name: values[name] for name in self._columns}
        names[ROW] = values
        self._evaluator.names = names
        try:
            return bool(self._evaluator.eval(self._expression, self._tree))
        except self._failures as error:
            raise FilterError(self._failure(error, values)) from error

    def _used_columns(self, columns: Sequence[str]) -> list[str]:
        names = [node for node in ast.walk(self._tree) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        called = {
            node.func.id
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        used = {node.id for node in names} - bound - {ROW}
        functions = {*FUNCTIONS, "dict", "list", "set", "tuple"}
        for name in sorted(called - functions):
            raise FilterError(
                f"where {self._expression!r}: no function {name}; there are "
                f"{', '.join(sorted(functions))}"
            )
        for name in sorted(used - called - set(columns)):
            raise FilterError(
                f"where {self._expression!r}: no column {name}; {listed_columns(columns)}"
            )
        return [name for name in columns if name in used]

    def _failure(self, error: Exception, values: Mapping[str, Any]) -> str:
        message = f"where {self._expression!r} fails: "
        if isinstance(error, KeyError):
            message += f"no key {error}"
        else:
            message += str(error) or type(error).__name__
        for name in self._columns:
            if values[name] is None:
                message += f". {name} is null here: ask for `{name} is not None and ...` first"
            elif isinstance(error, TypeError) and isinstance(values[name], str):
                message += f". {name} is text here: int({name}) or float({name}) makes it a number"
        return message


def listed_columns(columns: Sequence[str]) -> str:
    """The columns that there are, as messages put it."""
    shown = ", ".join(repr(name) for name in columns[:LISTED_COLUMNS])
    rest = len(columns) - LISTED_COLUMNS
    return f"the columns are {shown}" + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True, slots=True)
class SourceColumn:
    """A column and how its values can be stored."""

    name: str
    type: pa.DataType
    """Arrow type that holds the values without loss."""
    is_json: bool
    """True: values are to be stored as JSON text (`type` is string). So it is where the format has
    no types and the column is nested, mixes kinds (also int with float), or has an int beyond 64
    bits."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a data set."""

    data_idx: int
    """0-based place in the data set on disk, before filter, shuffle and limit."""
    values: dict[str, Any]
    """Every column by name, as Python values; JSON columns decoded. None where the row has a null
    or, in JSON, no such key: the two read alike."""
    where: str
    """Place for messages: "problems.jsonl:17" (lines count from 1), or "data.parquet, row 17" (rows
    count from 0)."""


class SourceFile(Protocol):
    """A file of a data set that was looked at."""

    @property
    def place(self) -> Place: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content."""
        ...


class Source(abc.ABC):
    """A data set. It can be read any number of times, always with the same rows in the same order,
    and holds no rows in memory. Made by `open_source`.

    Args:
        name: stem of the file's name, or name of the folder.
        columns: in the order of the file; in JSON, of first appearance.
        files: in which its rows are, in their order.
        watched: other files that may not change.

    Raises:
        SourceError: two files are the same.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[SourceColumn],
        files: Sequence[SourceFile],
        watched: Sequence[Place] = (),
    ) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.fingerprint = _joint_fingerprint([file.fingerprint for file in files])
        """Hex SHA-256 of the content: the same under another file name."""
        self._ends = list(accumulate(file.num_rows for file in files))
        self.num_rows = self._ends[-1]
        self._places = (*watched, *(file.place for file in files))
        known: dict[str, SourceFile] = {}
        for file in files:
            first = known.setdefault(file.fingerprint, file)
            if first is not file and file.num_rows:
                raise SourceError(
                    f"{file.place.label} has the same content as {first.place.label}: its rows "
                    "would be asked twice. Name one of them"
                )

    @property
    def paths(self) -> list[Path]:
        """Of the files of this machine that are read."""
        return [Path(place.name) for place in self._places if place.is_here]

    def _find(self, number: int) -> tuple[int, int]:
        """Which file a row is in, and its number there."""
        place = bisect_right(self._ends, number)
        return place, number - (self._ends[place - 1] if place else 0)

    def rows(
        self,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        where: str | None = None,
    ) -> Iterator[SourceRow]:
        """The rows that pass `where`, in shuffled order if asked, at most `limit` of them.

        Args:
            limit: counts rows that passed. With a shuffle it takes a random sample.
            shuffle_seed: order is numpy's `default_rng(shuffle_seed).permutation(num_rows)` over
                all rows, so it depends on neither `where` nor `limit`. A Parquet or Arrow data set
                is copied once, uncompressed, to an unnamed file in the temporary folder (TMPDIR),
                which is gone when the iterator is closed or the process ends.
            where: an expression over column names, such as `level >= 3 and subject == "algebra"`;
                see `Filter`.

        Raises:
            SourceError: at once for an option that is wrong or a file that changed since it was
                opened; while iterating for a row that cannot be read, or on which `where` fails.
        """
        if limit is not None and limit < 0:
            raise SourceError(f"limit is {limit}: it must be 0 or more")
        if shuffle_seed is not None and shuffle_seed < 0:
            raise SourceError(f"shuffle seed is {shuffle_seed}: it must be 0 or more")
        try:
            keep = None if where is None else Filter(where, [c.name for c in self.columns])
        except FilterError as error:
            raise SourceError(str(error)) from error
        self._refuse_changed_files()
        order = None
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(self.num_rows)
        found = map(self._with_every_column, self._read(order))
        return islice(found if keep is None else _passing(found, keep), limit)

    def records(self) -> Iterator[SourceRow]:
        """All rows, each with the keys that it has itself: what JSONL of the same rows would say.
        In Parquet and Arrow, where a null may stand for a key that only other rows have, nulls are
        left out.

        Raises:
            SourceError: while iterating, for a row that cannot be read or a file that changed.
        """
        self._refuse_changed_files()
        yield from self._read_own()
        self._refuse_changed_files()

    @abc.abstractmethod
    def _read(self, order: NDArray[np.int64] | None) -> Iterator[SourceRow]:
        """All rows, as they lie or in the order of `order` [num_rows]; where the format can tell,
        without the keys that they lack."""

    def _read_own(self) -> Iterator[SourceRow]:
        """All rows as they lie, each with its own keys."""
        return self._read(None)

    def _with_every_column(self, row: SourceRow) -> SourceRow:
        values = {column.name: row.values.get(column.name) for column in self.columns}
        return SourceRow(row.data_idx, values, row.where)

    def _refuse_changed_files(self) -> None:
        for place in self._places:
            if place.has_changed():
                raise SourceError(
                    f"{place.shown} has changed since it was opened: run again on a file that "
                    "nobody writes to"
                )


def _joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """One file's own fingerprint, or hex SHA-256 of those of several in their order."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(b"".join(map(bytes.fromhex, fingerprints))).hexdigest()


def _passing(rows: Iterator[SourceRow], keep: Filter) -> Iterator[SourceRow]:
    for row in rows:
        try:
            passed = keep(row.values)
        except FilterError as error:
            raise SourceError(f"{row.where}: {error}") from error
        if passed:
            yield row


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that hold a null, at any depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """The kind of a value in plain words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"a {type(value).__name__}"
