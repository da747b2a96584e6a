"""The filter expression: Python's answers on a row, and an error wherever it has none."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.source._columns import Filter, FilterError

ROW: dict[str, Any] = {
    "level": 3,
    "subject": "algebra",
    "score": None,
    "tags": ["a", "b"],
    "meta": {"source": "x", "ids": [1, 2]},
    "odd name": 5,
    "class": "k",
    "row": "a column",
    "len": 4,
}


def passes(expression: str) -> bool:
    return Filter(expression, list(ROW))(ROW)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("level >= 3 and subject == 'algebra'", True),
        ("level > 3 or not subject", False),
        ("2 < level <= 3", True),
        ("score is None", True),
        ("score is not None and score > 1", False),
        ("subject in ['algebra', 'logic']", True),
        ("'a' in tags and 'z' not in tags", True),
        ("subject.startswith('alg')", True),
        ("meta['source'] == 'x' and meta['ids'][1] == 2", True),
        ("meta.get('missing') is None", True),
        ("len(tags) == 2", True),
        ("len == 4", True),
        ("any(i > 1 for i in meta['ids'])", True),
        ("any([tag == 'z' for tag in tags])", False),
        ("row['odd name'] == 5 and row['class'] == 'k'", True),
        ("row['row'] == 'a column'", True),
        ("int('3') == level", True),
        ("level % 2", True),
        ("  level - 3 ", False),
    ],
)
def test_an_expression_means_what_it_means_in_python(expression: str, expected: bool):
    assert passes(expression) is expected


@given(
    level=st.integers() | st.floats(allow_nan=False),
    bound=st.integers(-(10**6), 10**6),
    name=st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
)
def test_comparisons_are_pythons(level: float, bound: int, name: str):
    compare = {
        "<": operator.lt,
        "<=": operator.le,
        ">": operator.gt,
        ">=": operator.ge,
        "==": operator.eq,
        "!=": operator.ne,
    }[name]
    assert Filter(f"level {name} {bound}", ["level"])({"level": level}) == compare(level, bound)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("level = 3", "is no expression: .*Equality is =="),
        ("", "is no expression"),
        ("level >", "is no expression"),
        ("class == 'k'", r'is no expression: .*row\["odd name"\]'),
        ("level > 1; level > 2", "is no expression"),
        ("lvl > 3", "no column lvl; the columns are 'level', 'subject'"),
        ("open('x')", "no function open; there are abs"),
        ("rand() > 0.5", "no function rand"),
    ],
)
def test_a_wrong_expression_is_refused_before_any_row(expression: str, message: str):
    with pytest.raises(FilterError, match=message):
        Filter(expression, list(ROW))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("score > 3", "score is null here: ask for `score is not None and ...` first"),
        ("subject > 3", r"subject is text here: int\(subject\)"),
        ("meta['nothing'] == 1", "no key 'nothing'"),
        ("row['nothing'] == 1", "no key 'nothing'"),
        ("tags[7] == 'a'", "out of range"),
        ("int(subject) > 1", "invalid literal"),
        ("level / 0 > 1", "division by zero"),
        ("meta.source == 'x'", "source"),
        ("tags.append(1)", "append"),
        ("tags.__class__", "__"),
        ("(lambda: 1)()", "not"),
    ],
)
def test_an_expression_that_fails_on_a_row_is_an_error(expression: str, message: str):
    with pytest.raises(FilterError, match=rf"fails: .*{message}"):
        passes(expression)


def test_a_filter_changes_nothing_in_the_row():
    row = {"tags": ["a"], "meta": {"x": 1}}
    for expression in ("tags.pop() == 'a'", "meta.clear() is None", "meta.pop('x') == 1"):
        with pytest.raises(FilterError):
            Filter(expression, list(row))(row)
    assert row == {"tags": ["a"], "meta": {"x": 1}}


def test_a_filter_answers_each_row_on_its_own():
    keep = Filter("level > 1", ["level"])
    assert [keep({"level": level}) for level in (2, 1, 2, 0)] == [True, False, True, False]


def test_many_columns_are_not_all_listed():
    with pytest.raises(FilterError, match=r"'c29' and 70 more$"):
        Filter("x", [f"c{i}" for i in range(100)])
