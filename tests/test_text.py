"""Text of others costs a character at most, and steers no terminal."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval_protocol_rft
from eval_protocol_rft._text import text_of, visible, visible_lines, well_formed, well_formed_json

ANY = st.text(st.characters(codec=None, categories=None))


@given(ANY)
def test_any_text_becomes_one_that_utf_8_can_hold_and_only_halves_are_lost(text):
    mended = well_formed(text)
    whole = mended.encode().decode()
    assert whole == mended
    pairs = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == pairs
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert mended == text


def test_two_halves_that_belong_together_are_their_character():
    assert well_formed("\ud83d\ude00 and \ud83d") == "\U0001f600 and \ufffd"


def test_keys_that_only_differ_in_their_halves_both_stay():
    first, second = "a\ud800", "a\ud801"
    assert well_formed_json({first: 1, second: ["\udfff"], 3: None}) == {
        "a\ufffd": 1,
        "a\ufffd\ufffd": ["\ufffd"],
        3: None,
    }


def test_an_object_whose_text_raises_is_told_by_its_type():
    class Mute:
        def __str__(self) -> str:
            raise KeyError("no")

    assert text_of(Mute()) == "(Mute, whose text raised KeyError)"
    assert text_of(ValueError("\ud800")) == "\ufffd"


@given(ANY)
def test_what_is_visible_is_printable(text):
    assert visible(text).isprintable()
    assert all(c.isprintable() or c in "\n\t" for c in visible_lines(text))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b]0;PWNED\x07", r"\x1b]0;PWNED\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten", r"over\rwritten"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\ud83d", r"\ud83d"),
    ],
)
def test_a_terminal_takes_nothing_for_a_command(raw, shown):
    assert visible_lines(raw) == shown


def test_commands_print_in_one_way():
    """Everything but `say` and `say_json` would print text of others as it is."""
    root = Path(eval_protocol_rft.__file__).parent
    for file in root.rglob("*.py"):
        if file.name == "_common.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {"typer.echo", "typer.secho", "click.echo"}, f"{file}: {called}"
