"""Thousands of completions over the hostile server, through each way into the package: what is
accepted is what was sampled, each request has one end, and nothing is left over."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.hostile.ask import Ask
from tests.hostile.book import CROSSED, CUT, WHOLE, Book
from tests.hostile.clients import through_sampler
from tests.hostile.faults import FAULTS
from tests.hostile.plan import Scripted
from tests.hostile.resources import Memory
from tests.hostile.run import CLIENTS, Outcome, run
from tests.hostile.settle import Attempt, Seen, paired

LEAST_ACCEPTED = 0.75
"""Of the completions: about a sixth of the requests meets a fault that is final."""


def assert_sound(outcome: Outcome, completions: int) -> None:
    account = outcome.account
    assert not account.problems
    assert account.accepted + account.failed.total() == completions
    assert account.accepted > LEAST_ACCEPTED * completions
    unread = account.refused + account.broken
    assert account.attempts + account.cancelled == account.requests + unread


def quick_run(through: str, **options: Any) -> Outcome:
    """A run with little patience; once more with more where the machine was too slow for it:
    timeouts that no fault explains are as many as completions."""
    outcome = run(through, patience=0.3, **options)
    if outcome.account.late > options["completions"]:
        outcome = run(through, patience=5.0, **options)
    return outcome


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("through", CLIENTS)
def test_what_is_accepted_was_sampled_and_every_request_is_accounted_for(
    through: str, seed: int
) -> None:
    # Coming back from a death takes seconds.
    deaths = 1 if (through, seed) == ("fanout", 11) else 0
    outcome = quick_run(through, completions=240, seed=seed, deaths=deaths)
    assert_sound(outcome, 240)
    assert len(outcome.account.struck) > 50


def test_no_reply_that_arrived_is_thrown_away_beside_an_evaluator_on_the_loop() -> None:
    outcome = quick_run(
        "fanout", completions=160, seed=13, deaths=0, evaluator=True, slow_share=0.3
    )
    assert_sound(outcome, 160)


@pytest.mark.slow
def test_twenty_thousand_completions_beside_an_evaluator_on_the_loop() -> None:
    assert_sound(run("fanout", completions=20_000, seed=1, evaluator=True), 20_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("through", "seed"),
    [("fanout", 1), ("fanout", 2), ("fanout", 3), ("processor", 1), ("generate", 1)],
)
def test_twenty_thousand_completions_with_every_fault(through: str, seed: int) -> None:
    outcome = run(through, completions=20_000, seed=seed)
    assert_sound(outcome, 20_000)
    assert set(FAULTS) <= set(outcome.account.struck)
    assert len(outcome.memory.quarters()) == 4


Change = Callable[[Book], None]


def no_signed_zeros(book: Book) -> None:
    real = book.accepted
    book.accepted = lambda number, ids, logprobs, *rest, **named: real(  # type: ignore[method-assign]
        number, ids, [value + 0.0 for value in logprobs], *rest, **named
    )


def one_bit_off(book: Book) -> None:
    real = book.accepted
    book.accepted = (
        lambda number, ids, logprobs, *rest, **named: real(  # type: ignore[method-assign]
            number, ids, [*logprobs[:-1], math.nextafter(logprobs[-1], -1.0)], *rest, **named
        )
    )


def siblings_swapped(book: Book) -> None:
    real = book.accepted
    book.accepted = lambda number, *rest, **named: real(number ^ 1, *rest, **named)  # type: ignore[method-assign]


def one_told_twice(book: Book) -> None:
    real = book.accepted

    def twice(number: int, *rest: Any, **named: Any) -> None:
        for _ in range(2 if number == 3 else 1):
            real(number, *rest, **named)

    book.accepted = twice  # type: ignore[method-assign]


def one_forgotten(book: Book) -> None:
    real = book.accepted
    book.accepted = lambda number, *rest, **named: number == 3 or real(number, *rest, **named)  # type: ignore[method-assign]


def an_attempt_untold(book: Book) -> None:
    real = book.tried
    book.tried = lambda number, *rest, **named: number == 3 or real(number, *rest, **named)  # type: ignore[method-assign]


def a_request_unseen(book: Book) -> None:
    book.asks(0, [7, 11, 0], range(4))
    book.tried(3, None, seed=3, seconds=0.1, message="")


def timed_out_at_once(book: Book) -> None:
    real = book.tried
    book.tried = lambda number, kind, **named: real(number, "timeout", **named)  # type: ignore[method-assign]


def a_task(book: Book) -> None:
    LEFT.append(asyncio.ensure_future(asyncio.sleep(60)))


def a_socket(book: Book) -> None:
    LEFT.append(socket.socket())


LEFT: list[Any] = []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_signed_zeros, "accepted"),
        (one_bit_off, "accepted"),
        (siblings_swapped, "accepted"),
        (one_told_twice, "ends as 'accept' after it ended as 'accept'"),
        (one_forgotten, "it has no end"),
        (an_attempt_untold, "does not fit"),
        (a_request_unseen, "does not fit"),
        (timed_out_at_once, "timed out after"),
        (a_task, "left over: <Task"),
        (a_socket, "left over: sockets"),
    ],
)
def test_a_run_fails_of_what_must_not_be(
    monkeypatch: pytest.MonkeyPatch, change: Change, says: str
) -> None:
    """A run is no good if it cannot fail."""

    async def changed(ask: Ask, book: Book) -> None:
        change(book)
        await through_sampler(ask, book)

    monkeypatch.setitem(CLIENTS, "changed", changed)
    outcome = run("changed", completions=8, seed=1, plan=Scripted([]), deaths=0)
    while LEFT:
        if isinstance(one := LEFT.pop(), socket.socket):
            one.close()
    assert any(says in problem for problem in outcome.account.problems), outcome.account.problems


def test_a_run_fails_of_a_fault_that_is_not_seen_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lie = dataclasses.replace(FAULTS["entry_dropped"], name="lie", sees=("accept",))
    monkeypatch.setitem(FAULTS, "lie", lie)
    plan = Scripted(["", "lie", "entry_dropped"])
    account = run("sampler", completions=4, seed=1, plan=plan, in_flight=1, deaths=0).account
    assert account.failed == {"contract": 2}
    [problem] = account.problems
    assert "does not fit [Seen(fault='lie', flags=0" in problem


def ends(*kinds: str) -> list[Attempt]:
    return [Attempt(kind, True) for kind in kinds]


def test_attempts_and_requests_are_paired_in_order() -> None:
    busy, true = Seen("status_503", 0), Seen("", WHOLE)
    assert paired(ends("unavailable", "accept"), [busy, true]) == [busy, true]
    assert paired(ends("unavailable", "accept"), [true, busy]) is None
    assert paired(ends("unavailable", "connection", "accept"), [busy, true]) == [busy, None, true]
    assert paired(ends("accept"), [true, true]) is None
    assert paired(ends("accept"), [true, true], spare=1) == [true]
    assert paired([Attempt("connection", False)], [Seen("", CUT)]) is None


@pytest.mark.parametrize(
    ("end", "fault", "flags", "fits"),
    [
        ("accept", "", 0, False),  # the server did not send it to its end
        ("accept", "", CUT, True),
        ("accept", "status_503", WHOLE, False),
        ("accept", "gzip_right", WHOLE, True),
        ("refused", "status_503", 0, False),
        ("contract", "", WHOLE, False),
        ("contract", "", WHOLE | CROSSED, True),
        ("accept", "status_503", CROSSED, False),
        ("unavailable", "", CUT, False),
        ("connection", "gzip_right", CUT, True),
    ],
)
def test_an_attempt_ends_as_its_request_allows(
    end: str, fault: str, flags: int, fits: bool
) -> None:
    pairs = paired(ends(end), [Seen(fault, flags)])
    assert pairs == ([Seen(fault, flags)] if fits else None)


def test_memory_is_flat_from_the_second_quarter_on() -> None:
    warming = [float(mib) for mib in range(100, 200)]
    assert Memory([*warming, *[200.0] * 300]).growth() is None
    assert Memory([*warming, *[200.0] * 200, *[214.0] * 100]).growth() is None
    assert Memory([*warming, *[1000.0] * 200, *[1049.0] * 100]).growth() is None
    assert "from 200.0 to 216.0" in str(Memory([*warming, *[200.0] * 200, *[216.0] * 100]).growth())
    assert Memory([*warming, *[200.0] * 100, *[230.0] * 200]).growth() is None
    steady = [*warming, *[200.0] * 100, *[208.0] * 100, *[216.0] * 100]
    assert "from 200.0 to 216.0" in str(Memory(steady).growth())
