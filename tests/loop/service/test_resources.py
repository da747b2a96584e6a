"""Messages and lists of the control plane, the pure parts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.loop.service import ServiceError
from eval_protocol_rft.loop.service.control import _fields as fields
from eval_protocol_rft.loop.service.control import _resources as resources

FIELDS: fields.Fields = {
    "name": str, "displayName": str, "count": int, "share": float, "isOpen": bool,
    "createTime": str, "inner": {"deepName": str, "more": {"value": int}},
}  # fmt: skip
WORDS = st.text(alphabet="abcxyz", min_size=1, max_size=3)


def snake(name: str) -> str:
    return re.sub("[A-Z]", lambda match: "_" + match[0].lower(), name)


def in_snake_case(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {snake(name): in_snake_case(value) for name, value in message.items()}


MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "displayName": st.text(),
        "count": st.integers(-(2**63), 2**63 - 1),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "isOpen": st.booleans(),
        "inner": st.fixed_dictionaries(
            {},
            optional={
                "deepName": st.text(),
                "more": st.fixed_dictionaries({}, optional={"value": st.integers(0, 9)}),
            },
        ),
    },
)


@given(MESSAGES)
def test_a_message_is_kept_as_it_is_in_either_spelling(message: dict[str, Any]) -> None:
    assert fields.read_fields(message, FIELDS, "it") == message
    assert fields.read_fields(in_snake_case(message), FIELDS, "it") == message


@given(MESSAGES, st.text().filter(lambda name: fields.camel_case(name) not in FIELDS))
def test_a_field_that_there_is_not_is_named(message: dict[str, Any], name: str) -> None:
    with pytest.raises(ServiceError, match=re.escape(repr(name))):
        fields.read_fields({**message, name: 1}, FIELDS, "it")


@given(st.integers(-(2**63), 2**63 - 1))
def test_large_numbers_travel_as_text(number: int) -> None:
    assert fields.read_fields({"count": str(number)}, FIELDS, "it") == {"count": number}


@pytest.mark.parametrize(
    "message",
    [
        {"count": 2**63},
        {"count": 1.5},
        {"count": True},
        {"count": "1e3"},
        {"count": "٣"},
        {"share": "0.5"},
        {"share": float("nan")},
        {"share": 10**400},
        {"isOpen": "true"},
        {"isOpen": 1},
        {"displayName": 1},
        {"inner": "x"},
        {"inner": {"more": []}},
    ],
)
def test_a_value_of_another_type_is_refused(message: dict[str, Any]) -> None:
    (name,) = message
    with pytest.raises(ServiceError, match=rf"it\.{name}"):
        fields.read_fields(message, FIELDS, "it")


def test_nothing_is_a_field_that_was_not_sent() -> None:
    assert fields.read_fields({"count": None, "inner": {"more": None}}, FIELDS, "it") == {
        "inner": {}
    }


ROWS = st.lists(
    st.fixed_dictionaries({"displayName": WORDS, "isOpen": st.booleans(), "_hidden": st.just(1)}),
    max_size=12,
).map(
    lambda rows: [
        {"name": f"n{i}", "createTime": f"2026-01-01T00:00:{i:02}Z", **row}
        for i, row in enumerate(rows)
    ]
)


def pages(rows: list[dict[str, Any]], size: int, **query: str) -> list[dict[str, Any]]:
    listed, token = [], ""
    while True:
        asked = {"pageSize": str(size), "pageToken": token, **query}
        answer = resources.page(rows, asked, "things", FIELDS)
        assert len(answer["things"]) <= size
        listed += answer["things"]
        token = answer["nextPageToken"]
        if not token:
            return listed


@given(ROWS, st.integers(1, 5))
def test_pages_are_the_whole_list_in_its_order(rows: list[dict[str, Any]], size: int) -> None:
    shown = [{k: v for k, v in row.items() if k != "_hidden"} for row in rows]
    assert pages(rows, size) == shown
    assert pages(rows, size, orderBy="create_time desc") == shown[::-1]


@given(ROWS, WORDS, st.booleans(), st.integers(1, 5))
def test_a_filter_leaves_what_it_says(
    rows: list[dict[str, Any]], word: str, is_open: bool, size: int
) -> None:
    text = f'display_name="{word}" AND isOpen!={str(is_open).lower()}'
    listed = pages(rows, size, filter=text)
    expected = [r for r in rows if r["displayName"] == word and r["isOpen"] is not is_open]
    assert [row["name"] for row in listed] == [row["name"] for row in expected]


@given(ROWS.filter(len), st.data())
def test_a_list_goes_on_where_it_was_though_what_it_ended_with_is_gone(
    rows: list[dict[str, Any]], data: Any
) -> None:
    size = data.draw(st.integers(1, len(rows)))
    answer = resources.page(rows, {"pageSize": str(size)}, "things", FIELDS)
    left = [row for row in rows if row["name"] != answer["things"][-1]["name"]]
    if token := answer["nextPageToken"]:
        rest = resources.page(left, {"pageToken": token}, "things", FIELDS)["things"]
        assert [row["name"] for row in rest] == [row["name"] for row in rows[size:]]


@given(st.text(max_size=20))
def test_any_filter_or_token_is_read_or_refused(text: str) -> None:
    rows = [{"name": "n", "createTime": "2026"}]
    for name in ("filter", "pageToken", "orderBy", "pageSize"):
        try:
            resources.page(rows, {name: text}, "things", FIELDS)
        except ServiceError as error:
            assert error.status == 400  # noqa: PT017 - either is right
