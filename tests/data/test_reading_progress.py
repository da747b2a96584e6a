"""What a person sees of commands that read rollouts, and how these end when they are stopped."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import Result

from eval_protocol_rft.data import _progress as progress
from eval_protocol_rft.data._convert import convert as convert_file
from eval_protocol_rft.data._progress import Reading
from tests.data.servers import ep_rft
from tests.scored_files import Sampled, write

COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "stats": lambda folder: [],
    "filter": lambda folder: ["-o", folder / "out.parquet", "--reward-min", 0],
    "convert": lambda folder: [folder / "out.jsonl"],
    "datums": lambda folder: ["-o", folder / "out.npz"],
    "report": lambda folder: ["-o", folder / "out.html", "--tokenizer", "local/arithmetic"],
}


class Clock:
    """Half a minute passes between one look at it and the next; at the second one, something may
    happen."""

    def __init__(self, happens: Callable[[], None] = lambda: None) -> None:
        self._looks = itertools.count()
        self._happens = happens

    def monotonic(self) -> float:
        look = next(self._looks)
        if look == 1:
            self._happens()
        return 30.0 * look


def run(name: str, source: Path, folder: Path, *more: str) -> Result:
    return ep_rft(name, source, *COMMANDS[name](folder), *more)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    groups = [
        [Sampled(1.0), Sampled(0.0), Sampled(1.0)],
        [Sampled(0.0), Sampled(1.0), Sampled(0.0)],
    ]
    return write(tmp_path / "in" / "rollouts.parquet", groups)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_long_reading_says_how_far_it_is(name, source, folder, monkeypatch) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    assert f"{name}: 6/6" in run(name, source, folder).stderr.splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_short_or_a_quiet_one_does_not(name, source, folder, monkeypatch) -> None:
    run(name, source, folder)
    monkeypatch.setattr(progress, "time", Clock())
    for left in folder.iterdir():
        left.unlink()
    assert run(name, source, folder, "--quiet").stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_one_line_and_leaves_nothing(
    name, number, code, source, folder, monkeypatch
) -> None:
    monkeypatch.setattr(progress, "time", Clock(lambda: signal.raise_signal(number)))
    ended = run(name, source, folder)
    assert ended.exit_code == code
    assert ended.stderr == "ep-rft: stopped\n"
    assert list(folder.iterdir()) == []
    assert [path.name for path in source.parent.iterdir()] == ["rollouts.parquet"]


def test_lines_of_json_and_rows_of_eval_protocol_are_counted(source, folder, monkeypatch) -> None:
    convert_file(source, folder / "lines.jsonl")
    convert_file(source, folder / "rows.jsonl", to_format="ep")
    monkeypatch.setattr(progress, "time", Clock())
    files = [folder / "lines.jsonl", folder / "rows.jsonl"]
    lines = "".join(ep_rft("stats", file).stderr for file in files).splitlines()
    assert [line.rstrip() for line in lines if ":" in line] == [
        "stats: 6/6",
        "convert: 1/2",
        "convert: 2/2",
        "convert: 1/2  pass 2",
        "convert: 2/2  pass 2",
        "stats: 6/6",
    ]


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Reading("stats", lambda: 4) as reading:
        assert list(reading(["ab", "cd"])) == ["ab", "cd"]
        shown = capsys.readouterr().err
    gone = capsys.readouterr().err
    assert "stats" in shown
    assert "4/4" in shown + gone
    assert gone.endswith("\x1b[2K")  # the line of the bar is empty again


def test_how_much_there_is_is_asked_late(monkeypatch) -> None:
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    with Reading("stats", lambda: pytest.fail("too early"), show=True) as reading:
        assert list(reading(["ab"])) == ["ab"]
