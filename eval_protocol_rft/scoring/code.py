"""The code that an evaluator's scores depend on, as fingerprints.

Invariant: an edit of what the evaluator uses, in its own file or in another of the user's, changes
a fingerprint and says in which file; a comment, or a function that it does not use, changes none.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_SHOWN = 16
"""Hex digits kept."""
_PACKAGE = Path(__file__).resolve().parents[1]
_SCORING_OPTIONS = {"dataset_adapter", "evaluation_test_kwargs", "mode"}
"""Of `@evaluation_test`; its others say what is rolled out."""


def code_fingerprints(function: Callable[..., Any], *, name: str | None = None) -> dict[str, str]:
    """File name -> fingerprint: of what `function` (in its module also `name`) uses of the file
    that defines it, and of every file of the user's own (no installed package's) that it, or one
    of those, imports from."""
    home = sys.modules.get(function.__module__)
    path = None if home is None else _own_file(home.__name__)
    if home is None or path is None:
        return {}
    names = {function.__name__, function.__qualname__.partition(".")[0], name or function.__name__}
    used = _used_part(path, names)
    found = {path: _digest(used, path)}
    modules = _imported(used, home.__name__, path)
    while modules:
        module = modules.pop()
        path = _own_file(module)
        if path is not None and path not in found:
            statements = _statements(path)
            found[path] = _digest(statements, path)
            modules += _imported(statements, module, path)
    named: dict[str, str] = {}
    for path in sorted(found):
        named[path.name if path.name not in named else str(path)] = found[path]
    return named


def _own_file(module: str) -> Path | None:
    """The file of a module of the user's own."""
    if module in sys.modules:
        name = getattr(sys.modules[module], "__file__", None)
    else:
        # Imported where it is used; a package's parts are not looked for before it is imported.
        spec = None if "." in module else importlib.machinery.PathFinder.find_spec(module)
        name = None if spec is None else spec.origin
    if not name or not name.endswith(".py"):
        return None
    path = Path(name).resolve()
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib")}
    foreign = "site-packages" in path.parts or path.is_relative_to(_PACKAGE)
    if foreign or any(path.is_relative_to(folder) for folder in installed) or not path.is_file():
        return None
    return path


def _imported(statements: list[ast.stmt] | None, module: str, path: Path) -> list[str]:
    """Names of the modules that these statements of `module` import from."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[str] = []
    for node in (node for statement in statements or () for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            within = parents if node.level else []
            base = ".".join([*within, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{name.name}" for name in node.names)]
    return found


def _statements(path: Path) -> list[ast.stmt] | None:
    # What runs was loaded before an edit that breaks it: then the bytes are compared.
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        return ast.parse(path.read_bytes()).body
    return None


def _used_part(path: Path, names: set[str]) -> list[ast.stmt] | None:
    """The statements that these names, and what they use, are defined by, in order."""
    body = _statements(path)
    if body is None:
        return None
    by_name: dict[str, list[ast.stmt]] = {}
    loose = []
    for statement in body:
        defined = _defined(statement)
        for name in defined or ():
            by_name.setdefault(name, []).append(statement)
        if defined is None and not _is_main_guard(statement):
            loose.append(statement)
    if not any(name in by_name for name in names):
        return body  # made in some other way
    taken: list[ast.stmt] = []
    waiting = list(names)
    for statement in loose:
        taken.append(statement)
        waiting += _names_in(statement)
    while waiting:
        for statement in by_name.pop(waiting.pop(), ()):
            if statement not in taken:
                taken.append(statement)
                waiting += _names_in(statement)
    return sorted(taken, key=body.index)


def _defined(statement: ast.stmt) -> list[str] | None:
    """The names that it defines and has no other effect than to; None: it may do anything."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            _leave_out_rollout_options(statement)
            return [statement.name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            known = [(name.asname or name.name).partition(".")[0] for name in names]
            return None if "*" in known else known
        case ast.Assign(targets=targets):
            known = [target.id for target in targets if isinstance(target, ast.Name)]
            return known if len(known) == len(targets) else None
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Expr(value=ast.Constant()):
            return []
        case _:
            return None


def _leave_out_rollout_options(
    definition: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> None:
    for decorator in definition.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(
            "evaluation_test"
        ):
            decorator.keywords = [k for k in decorator.keywords if k.arg in _SCORING_OPTIONS]


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__ ==")


def _names_in(statement: ast.stmt) -> Iterable[str]:
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]


def _digest(statements: list[ast.stmt] | None, path: Path) -> str:
    if statements is None:
        source = path.read_bytes()
    else:
        text = "\n".join(ast.dump(statement) for statement in statements)
        source = text.encode(errors="surrogatepass")
    return hashlib.sha256(source).hexdigest()[:_SHOWN]
