"""The structure of the package: rooms whose imports point down (docs/architecture.md)."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from house_metrics import ROOMS, House  # noqa: E402


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT / "eval_protocol_rft")


def test_no_imports_go_in_a_circle(house):
    assert not house.circles


def test_a_room_imports_from_rooms_below_it_and_nothing_private_of_them(house):
    assert house.upward == []


def test_no_chain_of_imports_in_a_room_is_longer_than_twelve(house):
    assert len(house.longest_chain) <= 12, " > ".join(house.longest_chain)


def test_one_file_reads_what_eval_protocol_leaves_on_evaluators(house):
    assert house.mark_readers == {"scoring/_evaluator.py"}


def test_every_error_is_an_error_of_the_package(house):
    strangers = [
        name
        for name, bases in house.exceptions.items()
        if "EvalProtocolRftError" not in {name, *bases}
    ]
    assert strangers == []


def test_every_folder_is_a_room_of_the_page(house):
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.name for path in house.root.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS) - {"record"}
    for room in ROOMS:
        assert f'["<b>{room}</b>' in page, room


def test_the_files_that_the_page_names_are_there(house):
    import re

    page = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:[a-z_]+/)*_?[a-z_]+\.pyi?)`", page))
    rooms = [ROOT, house.root, *(path for path in house.root.rglob("*") if path.is_dir())]
    lost = [n for n in names if not any((room / n).is_file() for room in rooms)]
    assert lost == []


def build(root: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = root / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(root / "pkg")


def test_an_arrow_up_and_a_reach_into_a_room_are_found(tmp_path):
    house = build(
        tmp_path,
        {
            "sampling/__init__.py": "",
            "sampling/_http.py": "def f():\n    from pkg.loop import Run\n",
            "loop/__init__.py": "",
            "loop/_run.py": "from pkg.sampling import Sampler\nfrom pkg.sampling._http import f\n",
        },
    )
    assert len(house.upward) == 2
    assert house.upward[0].startswith("loop/_run.py:2: pkg.sampling._http (f) is private")
    assert house.upward[1].startswith("sampling/_http.py:2: pkg.loop (Run) lies above")


def test_a_circle_and_a_chain_are_found(tmp_path):
    chain = build(tmp_path / "a", {"__init__.py": "", "x.py": "", "y.py": "from pkg import x\n"})
    assert chain.longest_chain == ["pkg.y", "pkg.x"]
    assert not chain.circles
    ring = {"__init__.py": "", "x.py": "from pkg.y import b\n", "y.py": "from pkg.x import a\n"}
    assert build(tmp_path / "b", ring).circles
