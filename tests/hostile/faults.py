"""What a fault is, and the register of all of them.

Invariant: a fault says what a right client makes of it: the kinds of failure, or `accept` for an
oddity that does no harm. It is known by its function's name.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from tests.hostile.exchange import Exchange, Request
from tests.hostile.replies import Dialect

Sees = Literal["accept", "refused", "unavailable", "connection", "timeout", "contract"]
Act = Callable[[Exchange], Awaitable[None]]
Mode = Literal["whole", "stream"]
WHOLE: tuple[Mode, ...] = ("whole",)
STREAM: tuple[Mode, ...] = ("stream",)
"""For faults that make sense for one kind of request alone."""

ACCEPTED: tuple[Sees, ...] = ("accept",)
TRANSIENT = frozenset({"unavailable", "connection", "timeout"})
"""The kinds after which another attempt makes sense; the others are final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to misbehave."""

    name: str
    sees: tuple[Sees, ...]
    """What a right client may report; `accept`: the true completion."""
    says: str
    """A pattern that the failure's message must hold, in whatever case."""
    act: Act
    at_accept: bool = False
    """Strikes a new connection, before its first request is read."""
    modes: tuple[Mode, ...] = ("whole", "stream")
    """The kinds of request that it can strike."""
    dialects: tuple[Dialect, ...] = ("fireworks", "vllm")
    """The dialects in which a client can tell."""
    costly: bool = False
    """Takes long or moves many bytes: not for thousands of requests."""

    @property
    def harmless(self) -> bool:
        return self.sees == ACCEPTED

    def strikes(self, request: Request, dialect: Dialect) -> bool:
        mode: Mode = "stream" if request.streamed else "whole"
        return not self.at_accept and mode in self.modes and dialect in self.dialects


FAULTS: dict[str, Fault] = {}
"""Every fault by name; filled by the `faults_*` modules, which the server imports."""


def fault(*sees: Sees, says: str = "", name: str = "", **options: Any) -> Callable[[Act], Act]:
    """Register a coroutine function that answers an exchange."""

    def register(act: Act) -> Act:
        known_as = name or act.__name__
        assert known_as not in FAULTS, f"two faults are named {known_as}"
        FAULTS[known_as] = Fault(name=known_as, sees=sees, says=says, act=act, **options)
        return act

    return register


Change = Callable[[Any, random.Random], None]


def change(*sees: Sees, says: str = "", **options: Any) -> Callable[[Change], Change]:
    """Register a function that changes the whole reply's JSON in place; sent well framed."""

    def register(change: Change) -> Change:
        async def act(exchange: Exchange) -> None:
            change(exchange.reply, exchange.rng)
            await exchange.answer(exchange.pieces())
            exchange.whole = sees == ACCEPTED

        fault(*sees, says=says, name=change.__name__, **options)(act)
        return change

    return register


Damage = Callable[[list[bytes], random.Random], list[bytes]]


def pieces(*sees: Sees, says: str = "", **options: Any) -> Callable[[Damage], Damage]:
    """Register a function from the body's pieces (events of a stream, else one) to those that are
    sent, well framed."""

    def register(damage: Damage) -> Damage:
        async def act(exchange: Exchange) -> None:
            await exchange.answer(damage(exchange.pieces(), exchange.rng))
            exchange.whole = sees == ACCEPTED

        fault(*sees, says=says, name=damage.__name__, **options)(act)
        return damage

    return register
