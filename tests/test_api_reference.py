"""docs/api.md says what users import, as the sources have it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import api_reference  # noqa: E402


def test_the_page_is_what_the_script_makes_of_the_sources() -> None:
    script = ROOT / "scripts" / "api_reference.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_a_stub_lists_for_users_is_imported_from_the_room() -> None:
    for stub in api_reference.PACKAGE.rglob("__init__.pyi"):
        room = ".".join(stub.parent.relative_to(ROOT).parts)
        listed = [name for _, name in api_reference._offered(stub.parent)]
        assert set(listed) <= set(import_module(room).__all__), room


def test_names_of_the_package_itself_are_explained_in_their_room() -> None:
    names = [api_reference._names(place) for place, _ in api_reference.SECTIONS]
    explained = {name for room in names for _, name in room}
    itself = {name for _, name in api_reference._offered(api_reference.PACKAGE)}
    assert itself - explained <= {"EvalProtocolRftError", "RecordError"}


def test_signatures_are_written_as_in_the_source(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(
        "async def f(a, /, b: int = 1, *, c: str, **more: int) -> None:\n"
        '    """Does.\n\n    More."""\n'
        "class Broken(ValueError):\n"
        '    """It is."""\n'
        'KINDS = ("a",)\n"""All\nkinds."""\n'
        "from package.room import _sibling as sibling\n"
        "from package import room\n"
        "def g(a: sibling.Own, b: room.Other) -> sibling.Own: ...\n"
    )
    assert api_reference._definition(source, "f") == (
        "async def f(a, /, b: int = 1, *, c: str, **more: int) -> None",
        "Does.",
    )
    assert api_reference._definition(source, "Broken") == ("class Broken()", "It is.")
    assert api_reference._definition(source, "KINDS") == ("KINDS = ('a',)", "All kinds.")
    # What the file calls a private module is no name for a reader.
    assert api_reference._definition(source, "g")[0] == "def g(a: Own, b: room.Other) -> Own"
