"""What a run trains towards, as fingerprints: the rows' content, the evaluator's code, the weights.

Invariant: whatever of them changes the objective changes its fingerprint; a comment does not.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.models import bundled_model_path, model_folder_fingerprint
from eval_protocol_rft.params import LOCAL_PREFIX

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

_SHOWN = 16
"""Hex digits kept."""
_PACKAGE = Path(__file__).resolve().parents[1]


def rows_fingerprint(rows: Sequence[EvaluationRow]) -> str:
    """Which rows, in which order, with all that a prompt or an evaluator can see of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            row.model_dump_json(
                include={
                    "messages": True,
                    "tools": True,
                    "ground_truth": True,
                    "input_metadata": {"row_id", "dataset_info"},
                }
            ).encode(errors="surrogatepass")
        )
        digest.update(b"\n")
    return digest.hexdigest()[:_SHOWN]


def code_fingerprints(function: Callable[..., Any]) -> dict[str, str]:
    """File name -> fingerprint: of the file that defines `function`, and of every file of the
    user's own (no installed package's) that it, or one of those, imports from."""
    found: dict[Path, str] = {}
    modules = [sys.modules.get(function.__module__)]
    seen: set[str] = set()
    while modules:
        module = modules.pop()
        if module is None or module.__name__ in seen:
            continue
        seen.add(module.__name__)
        path = _own_source(module)
        if path is None:
            continue
        found[path] = _code_digest(path)
        modules += _used_by(module)
    named: dict[str, str] = {}
    for path in sorted(found):
        named[path.name if path.name not in named else str(path)] = found[path]
    return named


def weights_fingerprint(model: str, weights: str | Path | None) -> str | None:
    """Of what training begins with, where it lies in a folder of this machine."""
    name = model.removeprefix(LOCAL_PREFIX)
    if weights is not None:
        folder = Path(weights)
    elif model.startswith(LOCAL_PREFIX):
        folder = bundled_model_path(name) or Path(name)
    else:
        return None
    return model_folder_fingerprint(folder)[:_SHOWN] if folder.is_dir() else None


def _own_source(module: ModuleType) -> Path | None:
    """The file of a module of the user's own."""
    if not (name := getattr(module, "__file__", None)) or not name.endswith(".py"):
        return None
    path = Path(name).resolve()
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib")}
    foreign = "site-packages" in path.parts or path.is_relative_to(_PACKAGE)
    if foreign or any(path.is_relative_to(folder) for folder in installed) or not path.is_file():
        return None
    return path


def _used_by(module: ModuleType) -> Iterable[ModuleType | None]:
    """Modules whose contents stand in `module` under some name."""
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value
        elif isinstance(name := getattr(value, "__module__", None), str):
            yield sys.modules.get(name)


def _code_digest(path: Path) -> str:
    source = path.read_bytes()
    # What runs was loaded before an edit that breaks it: then the bytes are compared.
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        source = ast.dump(ast.parse(source)).encode(errors="surrogatepass")
    return hashlib.sha256(source).hexdigest()[:_SHOWN]
