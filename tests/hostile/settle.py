"""The account of a run: every attempt of the client against every request that the server saw.

Invariant: each request of the server's is one attempt of one completion, in order, with an end that
its fault allows; an attempt without a request can only have broken off or timed out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.hostile.book import CROSSED, CUT, ENDS, NEVER_CONNECTED, WHOLE, Book
from tests.hostile.faults import ACCEPTED, FAULTS

UNDERWAY = 0.1
"""Seconds between the end of a reply, where it leaves, and its end at the client, on a machine that
has other things to do."""


class Attempt(NamedTuple):
    end: str
    connected: bool
    at: float = 0.0
    """When it ended, on the monotonic clock."""


class Seen(NamedTuple):
    """A request, by the server's own account."""

    fault: str
    flags: int
    at: float = 0.0
    """When the last of its answer had left the server, on the same clock."""


@dataclass(slots=True)
class Account:
    """What came of a run."""

    accepted: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Completions without an end, by kind; `cancelled`: we gave up their prompt."""
    attempts: int = 0
    """That the client told of."""
    requests: int = 0
    """That the server read."""
    cancelled: int = 0
    """Requests under way when we gave up their prompt: no attempt tells of them."""
    refused: int = 0
    """Attempts without a request: nobody listened."""
    broken: int = 0
    """Attempts without a request: the connection was ended at accept, or under them."""
    at_accept: int = 0
    """Connections that a fault met before their first request."""
    late: int = 0
    """Timeouts that no fault explains: the machine was too slow for the patience given."""
    thrown_away: int = 0
    """Those of them whose true reply had left the server to its last byte `UNDERWAY` before."""
    crossed: int = 0
    """Requests that met, underway, a reply which nobody had asked for, and failed of it: over
    HTTP/1.1 nothing tells it from theirs."""
    struck: Counter[str] = field(default_factory=Counter)
    """Requests and connections by the fault that met them."""
    problems: list[str] = field(default_factory=list)
    """Everything that must not be; empty after a good run."""


def settle(book: Book) -> Account:
    """The account of a run that is over, on both sides."""
    account = Account(problems=list(book.problems), struck=Counter(book.at_accept))
    account.at_accept = book.at_accept.total()
    attempts, requests = _attempts(book), _requests(book)
    for number, code in enumerate(book.ends):
        end, mine, seen = ENDS[code], attempts.pop(number, []), requests.pop(number, [])
        account.attempts += len(mine)
        account.requests += len(seen)
        account.struck.update(one.fault or "none" for one in seen)
        account.accepted += end == "accept"
        if end != "accept":
            account.failed[end or "lost"] += 1
        for problem in _wrong(account, end, book.tries[number], mine, seen):
            account.problems.append(f"completion {number}: {problem}")
    return account


def _wrong(
    account: Account, end: str, tries: int, mine: list[Attempt], seen: list[Seen]
) -> Iterator[str]:
    """What is wrong with one completion; its pairs are added to the account."""
    if not end:
        yield "it has no end"
    if end != "cancelled" and (len(mine), mine[-1:] and mine[-1].end) != (tries, end):
        yield f"it ended as {end!r} after {tries} requests, and the attempts told of are {mine}"
    spare = 1 if end == "cancelled" else 0
    pairs = paired(mine, seen, spare=spare)
    if pairs is None:
        yield f"{mine} does not fit {seen}"
        return
    account.cancelled += len(seen) - sum(one is not None for one in pairs)
    for attempt, one in zip(mine, pairs, strict=True):
        if one is None:
            account.refused += not attempt.connected
            account.broken += attempt.connected
        elif not _due(attempt.end, one):
            account.late += attempt.end == "timeout"
            arrived = bool(one.flags & WHOLE) and one.at + UNDERWAY < attempt.at
            account.thrown_away += attempt.end == "timeout" and arrived
            account.crossed += bool(one.flags & CROSSED)


def paired(
    mine: Sequence[Attempt], seen: Sequence[Seen], *, spare: int = 0
) -> list[Seen | None] | None:
    """Of each attempt its request, None where it has none; or None if they cannot be paired in
    order. The last `spare` requests may have no attempt."""
    if not mine:
        return [] if len(seen) <= spare else None
    first, *rest = mine
    if seen and first.connected and _fits(first.end, seen[0]):
        others = paired(rest, seen[1:], spare=spare)
        if others is not None:
            return [seen[0], *others]
    if first.end in ("connection", "timeout"):
        others = paired(rest, seen, spare=spare)
        if others is not None:
            return [None, *others]
    return None


def _due(end: str, one: Seen) -> bool:
    """Whether the fault alone explains this end."""
    sees = FAULTS[one.fault].sees if one.fault else ACCEPTED
    if end == "accept" and sees == ACCEPTED:
        # Where the server died, the last bytes were underway.
        return bool(one.flags & (WHOLE | CUT))
    return end in sees


def _fits(end: str, one: Seen) -> bool:
    """Whether anything explains it. On a busy machine whatever was asked may be late (`Book` looks
    whether so much time had passed); with a dead server a reply breaks off; and where another's
    reply was taken for its own, anything but a completion may come of it."""
    return (
        _due(end, one)
        or end == "timeout"
        or (end == "connection" and bool(one.flags & CUT))
        or (end != "accept" and bool(one.flags & CROSSED))
    )


def _attempts(book: Book) -> dict[int, list[Attempt]]:
    found: dict[int, list[Attempt]] = defaultdict(list)
    for number, end, flags, at in zip(*book.attempts, strict=True):
        found[number].append(Attempt(ENDS[end], not flags & NEVER_CONNECTED, at))
    return found


def _requests(book: Book) -> dict[int, list[Seen]]:
    """In the order in which they came; they were noted in that of their ends."""
    found: dict[int, list[Seen]] = defaultdict(list)
    for number, _which, fault, flags, at in sorted(zip(*book.requests, strict=True)):
        found[number].append(Seen(book.fault_names[fault], flags, at))
    return found
