"""Names and times, as all parts of the service write them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

ACCOUNT = "accounts/acc"
"""The one account of this server."""
PUBLIC_ACCOUNT = "accounts/fireworks"
"""Whose models and shapes everyone may use."""


def now() -> str:
    """RFC 3339, to the microsecond: later things have later times."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def last(name: str) -> str:
    """The id at the end of a name."""
    return name.rpartition("/")[2]


def full_name(name: str, collection: str) -> str:
    """`accounts/acc/<collection>/x` of that or of `x`."""
    return name if "/" in name else f"{ACCOUNT}/{collection}/{name}"


def state_row(checkpoint: str) -> str:
    """Where the store has the row of a state of training: a snapshot to sample from, which can be
    promoted, may have the same name."""
    return f"{checkpoint}#state"
