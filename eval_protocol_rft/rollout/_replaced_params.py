"""Whether completion_params that come from the environment took away a tokenizer that a test names.

Invariant: a tokenizer that is seen to be lost is refused by name; where that cannot be seen, it is
told which one is used.

A tokenizer that a test names may get lost with `EP_COMPLETION_PARAMS`
(`pytest --ep-completion-params`), a JSON list, with which Eval Protocol replaces the
completion_params of a test whole where the test is decorated; anything else in it is ignored. The
test's own are gone then, with the `tokenizer` that they may
name, and what the replacement names none for is rendered with the tokenizer of the model.
(`EP_INPUT_PARAMS_JSON` is merged into each set, and loses none.)
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

_VARIABLE = "EP_COMPLETION_PARAMS"
_KEY = "tokenizer"
REPLACED = (
    f"{_VARIABLE} replaces the completion_params of evaluation tests whole, and with them a "
    f'"{_KEY}" that they name'
)
_ADVICE = (
    f'Put "{_KEY}" into {_VARIABLE} (pytest --ep-completion-params) too, or name it as '
    f"FireworksTrainingRolloutProcessor({_KEY}=...), which nothing replaces"
)


def is_replacement(completion_params: Mapping[str, Any] | None) -> bool:
    """Whether these are of the environment, not of the test."""
    return completion_params in (_replacements() or ())


def lost_tokenizer(test: Callable[..., Any], sets: Any) -> str | None:
    """Why `sets`, the completion_params in force, cannot be used for the evaluation test; None
    where they are its own, or where all name a tokenizer, or the test is not seen to name one."""
    if not _is_silent(sets) or not _names_tokenizer(test):
        return None
    return f"{REPLACED}, as those of this test do. {_ADVICE}"


def untold_tokenizer(test: Callable[..., Any], sets: Any) -> str | None:
    """What to tell where it cannot be seen whether a tokenizer was lost; else None."""
    if not _is_silent(sets) or _names_tokenizer(test) is not None:
        return None
    return f"{REPLACED}: here the model's own was used, as it names none. {_ADVICE}"


def _replacements() -> list[Any] | None:
    """As Eval Protocol reads them."""
    try:
        sets = json.loads(os.environ.get(_VARIABLE) or "null")
    except ValueError:
        return None
    return sets if isinstance(sets, list) else None


def _is_silent(sets: Any) -> bool:
    """Whether they are of the environment, and one of them names no tokenizer."""
    return bool(sets) and sets == _replacements() and not all(map(_holds_tokenizer, sets))


def _names_tokenizer(test: Callable[..., Any]) -> bool | None:
    """Whether the test's own completion_params name a tokenizer, as its decorator is written; None
    where that does not say."""
    function = inspect.unwrap(test)
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    written = [
        keyword.value
        for decorator in getattr(definition, "decorator_list", ())
        for keyword in getattr(decorator, "keywords", ())
        if keyword.arg == "completion_params"
    ]
    if not written:
        return None
    known = getattr(function, "__globals__", {})
    nodes = [node for value in written for node in ast.walk(value)]
    if any(_is_key(node) for node in nodes):
        return True
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    if any(_holds_tokenizer(known.get(name)) for name in names):
        return True
    computed = any(isinstance(node, ast.Call | ast.Attribute | ast.comprehension) for node in nodes)
    return None if computed or any(name not in known for name in names) else False


def _is_key(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        return any(isinstance(key, ast.Constant) and key.value == _KEY for key in node.keys)
    return isinstance(node, ast.keyword) and node.arg == _KEY


def _holds_tokenizer(value: Any) -> bool:
    """Whether completion_params, or one of several, name one."""
    if isinstance(value, Mapping):
        return value.get(_KEY) is not None or _holds_tokenizer(value.get("extra_body"))
    return isinstance(value, list | tuple) and any(map(_holds_tokenizer, value))
