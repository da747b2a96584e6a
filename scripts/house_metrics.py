"""Figures of the package's structure, and the rules that tests/test_house.py holds it to.

    python scripts/house_metrics.py            # a table
    python scripts/house_metrics.py --lone     # the modules that one sibling alone imports

Read from the imports as text: nothing of the package is run. A room's stub (`__init__.pyi`) names
what the room offers; other rooms import from the room and not from its modules, so a chain of
imports is counted inside a room.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOMS = (
    "cli",
    "doctor",
    "loop",
    "report",
    "data",
    "training",
    "episodes",
    "scoring",
    "rollout",
    "record",
    "local",
    "sampling",
)
"""From the top floor down: a room imports from those behind it alone."""
DATA_CLASSES = ("Struct", "NamedTuple", "BaseModel", "TypedDict")
"""Base classes that make a class one of data, as `@dataclass` does."""
EVAL_PROTOCOL_MARKS = ("__ep_", "_origin_func", "_metainfo", "callspec")
"""Attributes that Eval Protocol, and pytest for it, leave on evaluators and promise nobody."""


@dataclass(frozen=True)
class House:
    """One package as its sources say."""

    root: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each module, by dotted name; a package is its `__init__.py`."""
        files = {}
        for path in sorted(self.root.rglob("*.py")):
            parts = (self.root.name, *path.relative_to(self.root).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return files

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """The parsed source of each module."""
        return {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    @cached_property
    def lines(self) -> dict[str, int]:
        """Lines of each module."""
        return {name: path.read_text().count("\n") for name, path in self.files.items()}

    def is_room(self, name: str) -> bool:
        """Whether a module is a package's `__init__.py`."""
        return self.files[name].name == "__init__.py"

    def imported(self, name: str) -> Iterator[tuple[str, str, int]]:
        """Module, imported name and line of each import from the package, lazy ones included."""
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                if node.module.split(".")[0] != self.root.name:
                    continue
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield (full if full in self.files else node.module), alias.name, node.lineno

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Which modules (no packages) each module imports."""
        return {
            name: {
                module
                for module, _, _ in self.imported(name)
                if module in self.files and module != name and not self.is_room(module)
            }
            for name in self.files
        }

    @cached_property
    def circles(self) -> set[str]:
        """Modules that a chain of imports leads back to."""
        found: set[str] = set()
        self._depths(found)
        return found

    @cached_property
    def longest_chain(self) -> list[str]:
        """The longest chain of imports, first module first."""
        depths = self._depths(set())
        chain = [max(depths, key=lambda name: depths[name])]
        while below := self.arrows[chain[-1]] - set(chain):
            chain.append(max(below, key=lambda name: depths[name]))
        return chain

    def _depths(self, circles: set[str]) -> dict[str, int]:
        depths: dict[str, int] = {}

        def depth(name: str, above: tuple[str, ...]) -> int:
            if name in above:
                circles.add(name)
                return 0
            if name not in depths:
                below = [depth(module, (*above, name)) for module in sorted(self.arrows[name])]
                depths[name] = 1 + max(below, default=0)
            return depths[name]

        for name in self.files:
            depth(name, ())
        return depths

    @cached_property
    def offered(self) -> dict[str, set[str]]:
        """The modules whose names each package's stub offers."""
        offered: dict[str, set[str]] = defaultdict(set)
        for stub in self.root.rglob("__init__.pyi"):
            package = ".".join((self.root.name, *stub.parent.relative_to(self.root).parts))
            for node in ast.parse(stub.read_text()).body:
                if isinstance(node, ast.ImportFrom):
                    names = [node.module] if node.module else [a.name for a in node.names]
                    offered[package].update(f"{package}.{name}" for name in names)
        return offered

    @cached_property
    def lone(self) -> dict[str, str]:
        """Modules that one module of the same package imports and nobody else, with that one."""
        users: dict[str, set[str]] = defaultdict(set)
        for arrows in (self.arrows, self.offered):
            for name, modules in arrows.items():
                for module in modules:
                    users[module].add(name)
        return {
            name: user
            for name in self.files
            if not self.is_room(name) and len(users[name]) == 1
            for user in users[name]
            if user.rpartition(".")[0] == name.rpartition(".")[0] and not self.is_room(user)
        }

    def room_of(self, name: str) -> str:
        """The room or top-level module that a module lies in."""
        return [*name.split("."), ""][1]

    @cached_property
    def upward(self) -> list[str]:
        """Imports that lead from a room to one above it, and such that reach into another room's
        private modules: where, and what is imported."""
        floors = {room: floor for floor, room in enumerate(ROOMS)}
        wrong = []
        for name in self.files:
            room = self.room_of(name)
            for module, what, line in self.imported(name):
                other = self.room_of(module) or what
                if other == room or room not in floors:
                    continue
                place = f"{self.files[name].relative_to(self.root)}:{line}: {module} ({what})"
                if floors.get(other, len(ROOMS)) < floors[room]:
                    wrong.append(f"{place} lies above")
                elif any(part.startswith("_") for part in module.split(".")[2:]):
                    wrong.append(f"{place} is private to its room")
        return wrong

    @cached_property
    def import_lines(self) -> int:
        """Lines that import statements take."""
        return sum(
            (node.end_lineno or node.lineno) - node.lineno + 1
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        )

    @cached_property
    def data_classes(self) -> list[str]:
        """Classes that hold data, as `module.name`."""
        return [
            f"{name}.{node.name}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and (
                any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
                or any(ast.unparse(base).endswith(DATA_CLASSES) for base in node.bases)
            )
        ]

    @cached_property
    def exceptions(self) -> dict[str, set[str]]:
        """The package's exception classes (no warnings), each with the names of all its bases."""
        bases = {
            node.name: {ast.unparse(base) for base in node.bases}
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

        def above(name: str) -> set[str]:
            names: set[str] = set()
            waiting = {name}
            while waiting:
                names |= waiting
                waiting = {base for name in waiting for base in bases.get(name, ())} - names
            return names - {name}

        ancestors = {name: above(name) for name in bases}
        return {name: names for name, names in ancestors.items() if any(map(_is_exception, names))}

    @cached_property
    def function_lines(self) -> list[int]:
        """Lines of each function, ascending."""
        return sorted(
            (node.end_lineno or node.lineno) - node.lineno + 1
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )

    @cached_property
    def mark_readers(self) -> set[str]:
        """Files that name an attribute which Eval Protocol leaves on what it decorates."""
        return {
            str(path.relative_to(self.root))
            for path in self.files.values()
            if any(mark in path.read_text() for mark in EVAL_PROTOCOL_MARKS)
        }


def _is_exception(name: str) -> bool:
    """Whether that is the name of a built-in exception which is no warning."""
    found = getattr(builtins, name, None)
    return (
        isinstance(found, type)
        and issubclass(found, BaseException)
        and not issubclass(found, Warning)
    )


def exported_symbols(package: Path) -> int:
    """What `pyright --verifytypes` counts: names that a user can import without an underscore, and
    the members of classes that have no underscore either. Needs pyright on the path."""
    command = ["pyright", "--pythonpath", sys.executable, "--verifytypes", package.name]
    done = subprocess.run(  # noqa: S603 - its arguments are ours
        [*command, "--ignoreexternal", "--outputjson"],
        capture_output=True,
        text=True,
        check=False,  # it fails where one type is unknown
        env={**os.environ, "PYTHONPATH": str(package.resolve().parent)},
    )
    counts: dict[str, int] = json.loads(done.stdout)["typeCompleteness"]["exportedSymbolCounts"]
    return sum(counts.values())


def main() -> None:
    """Print the figures of `eval_protocol_rft`, or of the package that is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", nargs="?", default="eval_protocol_rft", type=Path)
    parser.add_argument(
        "--pyright", action="store_true", help="count the exported symbols too (a minute)"
    )
    parser.add_argument("--lone", action="store_true", help="name the modules with one importer")
    options = parser.parse_args()
    house = House(options.package)
    if options.lone:
        for name, user in house.lone.items():
            print(f"{house.lines[name]:5} {name} <- {user}")
        return
    lines = sum(house.lines.values())
    sizes = [n for name, n in house.lines.items() if not house.is_room(name)]
    table = {
        "files": len(house.files),
        "lines": lines,
        "lines of a file, median": round(statistics.median(sizes)),
        "lines of a function, median": round(statistics.median(house.function_lines)),
        "longest chain of imports": len(house.longest_chain),
        "modules that one sibling imports": len(house.lone),
        "share of lines that are imports": f"{100 * house.import_lines / lines:.1f} %",
        "data classes per 1,000 lines": f"{1000 * len(house.data_classes) / lines:.1f}",
        "circles": len(house.circles),
        "arrows up, or into another room": len(house.upward),
        "files that read Eval Protocol's marks": len(house.mark_readers),
        "exception classes": len(house.exceptions),
    }
    if options.pyright:
        table["exported symbols"] = exported_symbols(options.package)
    for name, value in table.items():
        print(f"{name:40} {value}")
    print("longest chain:", " > ".join(name.partition(".")[2] for name in house.longest_chain))


if __name__ == "__main__":
    main()
