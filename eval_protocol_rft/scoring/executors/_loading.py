"""A user's evaluator by the name they would give pytest or Python, with fingerprints of the code
that its scores depend on.

Invariant: what is loaded is the function the spec names, from the file it names, or an error that
says which of the two is missing. A spec loaded again in another process gives the same evaluator,
or another `fingerprint`. An edit of what the evaluator uses, in its own file or in another of the
user's, changes a fingerprint of its `code` and says in which file; a comment, or a function that it
does not use, changes none.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from eval_protocol_rft import scoring
from eval_protocol_rft._errors import EvalProtocolRftError

_SHOWN = 16
"""Hex digits kept."""
_PACKAGE = Path(__file__).resolve().parents[2]
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
    fingerprints = {path: _digest(used, path)}
    modules = _imported(used, home.__name__, path)
    while modules:
        module = modules.pop()
        path = _own_file(module)
        if path is not None and path not in fingerprints:
            statements = _statements(path)
            fingerprints[path] = _digest(statements, path)
            modules += _imported(statements, module, path)
    named: dict[str, str] = {}
    for path in sorted(fingerprints):
        named[path.name if path.name not in named else str(path)] = fingerprints[path]
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
    modules: list[str] = []
    for node in (node for statement in statements or () for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            within = parents if node.level else []
            base = ".".join([*within, *([node.module] if node.module else [])])
            modules += [base, *(f"{base}.{name.name}" for name in node.names)]
    return modules


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


FORMS = "path/to/test_file.py::function or package.module:function"

INSTALLED = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
"""How the names of files begin that are Python's or a library's."""


class EvaluatorNotFoundError(EvalProtocolRftError, ValueError):
    """The spec leads to no function; the message says where the way ends."""


@dataclass(frozen=True, slots=True)
class LoadedEvaluator:
    """A function of the user's and what is known of it. Get it with `load_evaluator`."""

    spec: str
    """What `load_evaluator` takes in any process: a file by its absolute path."""
    name: str
    """The spec as the user gave it, for humans and metadata."""
    function: Callable[..., Any]
    """As in its module, under its decorators."""
    mode: Literal["pointwise", "groupwise", "all"]
    is_async: bool
    kwargs: Mapping[str, Any]
    """What it gets besides rows: from `@evaluation_test`, and from the spec."""
    dataset_adapter: Callable[..., Any] | None
    """That of the evaluation test; None where it is Eval Protocol's default."""
    fingerprint: str
    """Hex SHA-256 of its module's source file. Files that this one imports are not in it."""
    code: Mapping[str, str]
    """Of each file that its scores depend on, a fingerprint of what they depend on."""


def load_evaluator(spec: str) -> LoadedEvaluator:
    """Import the module of an evaluator and look at the function.

    A file is imported as pytest does in `prepend` mode: the first folder upwards that is no
    package goes first on `sys.path`, and the module is named from there. `conftest.py` is not
    loaded. For a module the current folder goes first on `sys.path`, as with `python -m`.

    Args:
        spec: `path/to/test_file.py::function` (or with one colon) or `package.module:function`;
            behind a `?`, further arguments as a JSON object.

    Raises:
        EvaluatorNotFoundError: no such file, module or function, the import raises, or the name
            stands for something that cannot be called.
        EvaluatorError: the function is no evaluator, has several sets of evaluation_test_kwargs,
            or needs arguments that nothing gives.
    """
    place = _parse(spec)
    module = _import(place)
    return _look_at(place, _function(place, module))


def load_named(spec: str, what: str) -> Any:
    """What a spec names, imported as `load_evaluator` does; `what` it is to be, for messages.

    Raises:
        EvaluatorNotFoundError: no such file, module or name, or the import raises.
    """
    place = _place_of(spec, what)
    module = _import(place)
    if not hasattr(module, place.function):
        raise EvaluatorNotFoundError(f"{spec}: {place.module} has no {place.function!r}")
    return getattr(module, place.function)


class _Place(NamedTuple):
    """Where a spec points."""

    spec: str
    """Resolved."""
    name: str
    """As given."""
    module: str
    function: str
    file: Path | None
    """None where the module was named, not its file."""
    root: Path
    """What goes on `sys.path`."""
    arguments: Mapping[str, Any] = {}
    """Behind the `?`."""


def with_arguments(spec: str, arguments: Mapping[str, Any] | None) -> str:
    """The spec of an evaluator that is called with these arguments besides its row.

    Raises:
        EvaluatorNotFoundError: they are not JSON.
    """
    if not arguments:
        return spec
    try:
        return f"{spec}?{json.dumps(dict(arguments), sort_keys=True, allow_nan=False)}"
    except (TypeError, ValueError) as error:
        raise EvaluatorNotFoundError(f"{spec}: its arguments are no JSON: {error}") from error


def _parse(spec: str) -> _Place:
    named, mark, text = spec.partition("?")
    if not mark:
        return _place_of(spec)
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise EvaluatorNotFoundError(f"{spec}: behind the ? is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise EvaluatorNotFoundError(f"{spec}: behind the ? is no JSON object")
    place = _place_of(named)
    return place._replace(spec=f"{place.spec}?{text}", name=spec, arguments=arguments)


def _place_of(spec: str, what: str = "evaluator") -> _Place:
    if "::" in spec:
        path, _, function = spec.partition("::")
        return _file_place(spec, Path(path), function)
    module, colon, function = spec.partition(":")
    if not colon or not module or not function:
        raise EvaluatorNotFoundError(f"{spec!r} names no {what}: write {FORMS}")
    if module.endswith(".py"):
        return _file_place(spec, Path(module), function)
    if os.sep in module:
        raise EvaluatorNotFoundError(f"{spec!r}: a file ends in .py: {module}.py::{function}")
    return _Place(spec, spec, module, function, None, Path.cwd())


def _file_place(spec: str, path: Path, function: str) -> _Place:
    file = path.absolute()
    if not file.is_file():
        raise EvaluatorNotFoundError(f"{spec}: there is no file {file}")
    if not function.isidentifier():
        raise EvaluatorNotFoundError(
            f"{spec}: {function!r} is not the name of a function at the top of a module: write "
            f"{FORMS}"
        )
    folder, names = file.parent, [] if file.stem == "__init__" else [file.stem]
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return _Place(f"{file}::{function}", spec, ".".join(names), function, file, folder)


def _import(place: _Place) -> ModuleType:
    import pytest

    if sys.path[:1] != [str(place.root)]:
        sys.path.insert(0, str(place.root))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(place.module)
    except (Exception, SystemExit, pytest.skip.Exception, pytest.fail.Exception) as error:
        raise EvaluatorNotFoundError(
            f"{place.name}: importing {place.module} failed: {_cause(error)}"
        ) from error
    if getattr(module.__spec__, "_initializing", False):
        raise EvaluatorNotFoundError(
            f"{place.name}: {place.module} is still being imported: what scores with an evaluator "
            "of the same file belongs under `if __name__ == '__main__':`"
        )
    source = inspect.getsourcefile(module)
    if place.file is not None and (source is None or not place.file.samefile(source)):
        raise EvaluatorNotFoundError(
            f"{place.name}: the module name {place.module} already belongs to "
            f"{source or 'a module without a file'}: rename the file, or put an __init__.py next "
            "to it"
        )
    return module


def _cause(error: BaseException) -> str:
    """Type, message, and the last line of the user's own files on the way to it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)[1:]
    user_frames = [frame for frame in frames if not frame.filename.startswith(INSTALLED)]
    where = f" ({user_frames[-1].filename}:{user_frames[-1].lineno})" if user_frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _function(place: _Place, module: ModuleType) -> Callable[..., Any]:
    if not hasattr(module, place.function):
        names = _evaluators_in(module)
        there = f"evaluators there: {', '.join(names)}" if names else "it has no evaluators"
        raise EvaluatorNotFoundError(
            f"{place.name}: {place.module} has no function {place.function!r}; {there}"
        )
    function: Any = getattr(module, place.function)
    if not callable(function):
        kind = type(function).__name__
        raise EvaluatorNotFoundError(
            f"{place.name}: {place.function} is of type {kind}, not a function"
        )
    return function  # type: ignore[no-any-return]


def _evaluators_in(module: ModuleType) -> list[str]:
    """Names of the module's own functions that can be evaluators, and of evaluation tests."""
    return sorted(
        name
        for name, value in vars(module).items()
        if scoring.parameters_of(value) is not None
        or (
            inspect.isfunction(value)
            and value.__module__ == module.__name__
            and scoring.may_be_evaluator(value)
        )
    )


def _look_at(place: _Place, function: Callable[..., Any]) -> LoadedEvaluator:
    test = scoring.parameters_of(function)
    try:
        inner = scoring.inner_evaluator(function)
        mode = scoring.mode_of(function, inner)
        kwargs = place.arguments
        if not kwargs or len(scoring.sets_of(test, "evaluation_test_kwargs")) < 2:
            kwargs = {**scoring.own_kwargs(function), **kwargs}
        inner.bind(**{inner.parameter: None}, **kwargs)
    except scoring.EvaluatorError as error:
        raise scoring.EvaluatorError(f"{place.name}: {error}") from error
    except TypeError as error:
        names = ", ".join(kwargs) or "none"
        raise scoring.EvaluatorError(
            f"{place.name}: it cannot be called with `{inner.parameter}` and its arguments "
            f"({names}): {error}"
        ) from error
    return LoadedEvaluator(
        spec=place.spec,
        name=place.name,
        function=function,
        mode=mode,
        is_async=inner.is_async,
        kwargs=kwargs,
        dataset_adapter=scoring.adapter_of(test),
        fingerprint=_fingerprint(place),
        code=code_fingerprints(inner.function, name=place.function),
    )


def _fingerprint(place: _Place) -> str:
    source = place.file or inspect.getsourcefile(sys.modules[place.module])
    if source is None:
        raise EvaluatorNotFoundError(f"{place.name}: {place.module} has no source file")
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()
