"""Write docs/api.md: what users import, with signature and the first paragraph of its docstring.

    python scripts/api_reference.py            # writes the page
    python scripts/api_reference.py --check    # says whether it is as it should be

Read from the sources as text: nothing of the package is run. A room's stub (`__init__.pyi`) lists
the names for users first; those behind the line `FOR_ROOMS` are for other rooms alone.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "eval_protocol_rft"
PAGE = ROOT / "docs" / "api.md"
FOR_ROOMS = "# For other rooms alone: these may change."
SECTIONS = (
    ("rollout", "Rollouts in Eval Protocol"),
    ("episodes", "Episodes: environments and tools"),
    ("episodes/gateway", "Agents through the gateway"),
    ("scoring", "Scoring"),
    ("record", "The rollout record"),
    ("training", "Training data"),
    ("training/advantages", "Advantage estimators"),
    ("training/export/fireworks", "Export: Fireworks"),
    ("training/export/cookbook", "Export: Fireworks' cookbook"),
    ("training/export/tinker", "Export: Tinker"),
    ("training/export/trl", "Export: TRL"),
    ("training/export/verl", "Export: verl"),
    ("training/export/skyrl", "Export: SkyRL"),
    ("training/export/slime", "Export: slime"),
    ("training/export/prime_rl", "Export: prime-rl"),
    ("training/export/areal", "Export: AReaL"),
    ("training/export/nemo_rl", "Export: NeMo-RL"),
    ("training/export/openrlhf", "Export: OpenRLHF"),
    ("training/export/rl_step", "Export: lines of a step"),
    ("training/export/files", "Export: files"),
    ("training/losses", "Losses"),
    ("loop", "The training loop"),
    ("loop/trl", "TRL in the loop"),
    ("loop/fireworks", "Fireworks in the loop"),
    ("data", "Jobs over data sets"),
    ("report", "Reports"),
    ("sampling", "Sampling"),
    ("local", "Models in this process"),
    ("local/models", "Names of local models"),
)
"""Rooms and public modules, in the order of the page. A module without a stub offers what it
defines without an underscore."""
RAISED = ("Error", "Warning")
"""What names of errors and warnings end with; they are listed behind the others, a line each."""
WIDTH = 100
"""Columns of a signature; a longer one gets a line per parameter."""
HEAD = """# API reference

What is meant to be imported, room by room ([architecture.md](architecture.md)); everything else
may change. Made by `scripts/api_reference.py` from the sources; `help(name)` says more.

Every error is an `EvalProtocolRftError` too, beside what is in brackets behind it. From
`eval_protocol_rft` itself: """

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def page() -> str:
    """The page as the sources say it."""
    itself = [f"`{name}`" for _, name in _offered(PACKAGE)]
    parts = [HEAD + ", ".join(itself) + ".\n"]
    for place, title in SECTIONS:
        entries = [_entry(name, *_definition(file, name)) for file, name in _names(place)]
        module = ".".join((PACKAGE.name, *place.split("/")))
        raised = [entry for entry in entries if entry.startswith("- ")]
        others = [entry for entry in entries if entry not in raised]
        parts.append(f"\n## {title}\n\n`{module}`\n" + "".join(others))
        parts.append("\nErrors and warnings:\n\n" + "".join(raised) if raised else "")
    return "".join(parts)


def _names(place: str) -> Iterator[tuple[Path, str]]:
    """The names for users of a room or a module, each with the file that defines it."""
    room = PACKAGE / place
    if (room / "__init__.pyi").is_file():
        yield from _offered(room)
        return
    file = room / "__init__.py" if room.is_dir() else room.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield file, node.name


def _offered(room: Path) -> Iterator[tuple[Path, str]]:
    """What a stub lists for users."""
    for_users = (room / "__init__.pyi").read_text().partition(FOR_ROOMS)[0]
    for node in ast.parse(for_users).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            file = room.joinpath(*node.module.split("."))
            for alias in node.names:
                yield file.with_suffix(".py"), alias.name


def _definition(file: Path, name: str) -> tuple[str, str]:
    """Signature and first paragraph of what `file` defines by that name."""
    body = _without_siblings(ast.parse(file.read_text())).body
    # The last one: an overloaded function ends with what holds its docstring.
    for node, following in reversed([*zip(body, [*body[1:], None], strict=True)]):
        if isinstance(node, Definition) and node.name == name:
            return _signature(node, body), _paragraph(ast.get_docstring(node) or "")
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if isinstance(target, ast.Name) and target.id == name:
            text = following.value if isinstance(following, ast.Expr) else None
            value = getattr(text, "value", None)
            return ast.unparse(node), _paragraph(value if isinstance(value, str) else "")
    for node in body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _definition(
                (ROOT / (node.module or "").replace(".", "/")).with_suffix(".py"), name
            )
    raise SystemExit(f"{file.relative_to(ROOT)} does not define {name}")


def _without_siblings(module: ast.Module) -> ast.Module:
    """`policy.PPO` as `PPO`, where `policy` is what the file calls a private module: a reader of
    the page cannot know it."""
    siblings = {
        alias.asname
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and alias.name.startswith("_")
    }

    class Bare(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
            self.generic_visit(node)
            if isinstance(node.value, ast.Name) and node.value.id in siblings:
                return ast.Name(node.attr)
            return node

    Bare().visit(module)
    return module


def _signature(node: Definition, body: list[ast.stmt]) -> str:
    """As it is called; `body` is of the file, which may define what a class is made from."""
    if not isinstance(node, ast.ClassDef):
        answer = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        return _wrapped(f"{keyword} {node.name}", _parameters(node.args), answer)
    bases = [ast.unparse(base) for base in node.bases]
    if node.name.endswith(RAISED):
        return f"{node.name}({', '.join(b for b in bases if b != 'EvalProtocolRftError')})"
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if made:
        return _wrapped(f"class {node.name}", _parameters(made[0].args)[1:], "")
    return _wrapped(f"class {node.name}", _fields(node, body), "")


def _fields(node: ast.ClassDef, body: list[ast.stmt]) -> list[str]:
    """Those of what it is made from, then its own."""
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    inherited = [
        field
        for base in body
        if isinstance(base, ast.ClassDef) and base.name in bases
        for field in _fields(base, body)
    ]
    return inherited + [
        _FACTORY.sub("...", ast.unparse(n))
        for n in node.body
        if isinstance(n, ast.AnnAssign)
        and isinstance(n.target, ast.Name)
        and not n.target.id.startswith("_")
    ]


def _parameters(args: ast.arguments) -> list[str]:
    """Each parameter as it is written, `/` and `*` among them."""
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    written = [_parameter(arg, value) for arg, value in zip(positional, defaults, strict=True)]
    if args.posonlyargs:
        written.insert(len(args.posonlyargs), "/")
    if args.vararg:
        written.append(f"*{ast.unparse(args.vararg)}")
    elif args.kwonlyargs:
        written.append("*")
    written += map(_parameter, args.kwonlyargs, args.kw_defaults)
    if args.kwarg:
        written.append(f"**{ast.unparse(args.kwarg)}")
    return written


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(arg)
    return f"{ast.unparse(arg)} = {ast.unparse(default)}"


_FACTORY = re.compile(r"(?<= = )\w*\.?field\(.*\)$")
"""A default that is made anew for each object."""


def _wrapped(name: str, parameters: list[str], answer: str) -> str:
    line = f"{name}({', '.join(parameters)}){answer}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in parameters), f"){answer}"])


def _paragraph(docstring: str) -> str:
    return " ".join(docstring.partition("\n\n")[0].split())


def _entry(name: str, signature: str, text: str) -> str:
    if name.endswith(RAISED):
        return f"- `{signature}`" + (f": {text}\n" if text else "\n")
    return f"\n### {name}\n\n```python\n{signature}\n```\n" + (f"\n{text}\n" if text else "")


def main() -> None:
    """Write the page, or with `--check` say whether it is up to date."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page())
    elif not PAGE.is_file() or PAGE.read_text() != page():
        raise SystemExit("docs/api.md is not what the sources say: run scripts/api_reference.py")


if __name__ == "__main__":
    main()
