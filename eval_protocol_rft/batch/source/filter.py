"""Which rows of a data set are wanted: a Python-like expression over its columns.

Invariant: an expression either gives an answer for a row or is an error; a row on which it fails is
never counted as "no". Nothing outside the row can be reached and nothing in it can be changed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


class FilterError(ValueError):
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
