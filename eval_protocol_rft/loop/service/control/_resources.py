"""What all resources of the control plane have in common: names, requests, lists and filters.

Pure. A resource is named by its whole path (`accounts/acc/deployments/d`), and a list is a page of
what its filter leaves, oldest first.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from eval_protocol_rft.loop.service._errors import Code, ServiceError
from eval_protocol_rft.loop.service._store import Resource
from eval_protocol_rft.loop.service.control._fields import Fields, camel_case

DEFAULT_PAGE, LARGEST_PAGE = 50, 200
_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CONDITION = re.compile(
    r"\s*(?P<field>[A-Za-z][\w.]*)\s*(?P<op>!=|=)\s*(?P<value>\"[^\"]*\"|'[^']*'|[^\s\"']+)\s*"
    r"(?:AND\b|$)"
)


class Call(NamedTuple):
    """One request to the control plane."""

    name: str
    """Of the resource or the collection that it is about: the path without `/v1/` and verb."""
    query: Mapping[str, str]
    body: Mapping[str, Any]
    base_url: str
    """Under which the client reaches this server."""

    @property
    def parent(self) -> str:
        """What a collection belongs to."""
        return self.name.rpartition("/")[0]

    def wants(self, name: str) -> bool:
        """A flag of the query."""
        return self.query.get(name, "").lower() in ("true", "1")


Handler = Callable[[Call], Awaitable[dict[str, Any]]]
RouteTable = Sequence[tuple[str, str, Handler]]
"""Method, path with `*` for one part of a name, handler."""


def check_id(key: str, what: str) -> str:
    """Raise a ServiceError unless `key` can be the id of a resource."""
    if not _ID.fullmatch(key):
        raise ServiceError(
            f"{what} is {key!r}: it must be 1 to 63 of a-z, 0-9 and hyphen, no hyphen first or last"
        )
    return key


def view(row: Resource) -> dict[str, Any]:
    """A resource as clients see it."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def exists(name: str) -> ServiceError:
    """The refusal of a second one of a name."""
    return ServiceError(f"{name} already exists", code=Code.ALREADY_EXISTS)


def wrong_state(message: str) -> ServiceError:
    """The refusal of what would be right at another time."""
    return ServiceError(message, code=Code.FAILED_PRECONDITION)


def page(
    rows: Sequence[Resource], query: Mapping[str, str], plural: str, fields: Fields
) -> dict[str, Any]:
    """A page of a list: `filter`, `orderBy`, `pageSize` and `pageToken` of the query.

    Raises:
        ServiceError: one of them cannot be read.
    """
    conditions = _conditions(query.get("filter", ""), fields)
    kept = [row for row in rows if _matches(row, conditions)]
    kept = _ordered(kept, query.get("orderBy", ""), fields)
    start = _after(kept, query.get("pageToken", ""))
    stop = start + _page_size(query.get("pageSize", ""))
    token = _token(kept[stop - 1]) if stop < len(kept) else ""
    return {
        plural: [view(row) for row in kept[start:stop]],
        "nextPageToken": token,
        "totalSize": len(kept),
    }


def _page_size(given: str) -> int:
    if not given:
        return DEFAULT_PAGE
    if not re.fullmatch(r"-?\d{1,9}", given, re.ASCII) or int(given) < 0:
        raise ServiceError(f"pageSize is {given!r}: it must be a number, 0 or more")
    return min(int(given), LARGEST_PAGE) or DEFAULT_PAGE


def _token(row: Resource) -> str:
    text = json.dumps([row.get("createTime", ""), row["name"]])
    return base64.urlsafe_b64encode(text.encode()).decode()


def _after(rows: Sequence[Resource], token: str) -> int:
    """Where the page after a token begins; what it names may be gone meanwhile."""
    if not token:
        return 0
    try:
        created, name = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise ServiceError(f"pageToken {token!r} is none that this list gave") from None
    for place, row in enumerate(rows):
        if row["name"] == name:
            return place + 1
    return sum(row.get("createTime", "") <= str(created) for row in rows)


def _conditions(text: str, fields: Fields) -> list[tuple[list[str], bool, str]]:
    """(path of a field, whether it must be equal, value) of each; the part of AIP-160's grammar
    that clients use: `a="x" AND b!=y`."""
    conditions = []
    rest = text.strip()
    while rest:
        match = _CONDITION.match(rest)
        if match is None or (match.end() == len(rest) and rest.rstrip().endswith("AND")):
            raise ServiceError(
                f'filter {text!r} cannot be read: this server knows field="value", != and AND'
            )
        path = [camel_case(part) for part in match["field"].split(".")]
        if path[0] not in fields:
            raise ServiceError(f"filter {text!r}: there is no field {match['field']!r}")
        conditions.append((path, match["op"] == "=", match["value"].strip("\"'")))
        rest = rest[match.end() :]
    return conditions


def _matches(row: Resource, conditions: Sequence[tuple[list[str], bool, str]]) -> bool:
    return all((_text(_field(row, path)) == value) == equal for path, equal, value in conditions)


def _field(row: Resource, path: Sequence[str]) -> Any:
    value: Any = row
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _ordered(rows: list[Resource], order: str, fields: Fields) -> list[Resource]:
    for part in reversed([part.split() for part in order.split(",") if part.strip()]):
        path = [camel_case(name) for name in part[0].split(".")]
        if path[0] not in fields or part[1:] not in ([], ["asc"], ["desc"]):
            raise ServiceError(f"orderBy {order!r} cannot be read: fields, each with desc or not")
        rows = sorted(rows, key=lambda row: _text(_field(row, path)), reverse=part[1:] == ["desc"])
    return rows
