"""What a machine that guards requests may answer: go, wait, or stop.

Invariant: an answer commits to nothing. Whoever asks tells the machine separately what it did, so
several machines can be asked before one request is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

UNTIL_SOMETHING_ENDS = math.inf
"""`Wait.until` where no date can be named: ask again when a request in flight has ended."""


@dataclass(frozen=True, slots=True)
class Go:
    """Make the request."""

    probe: bool = False
    """It is one of the few that find out whether the server is back."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now; ask again."""

    until: float
    """Clock seconds before which the answer stays the same unless a request ends."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Never again in this run."""

    reason: str
    """What happened and what to do about it, for the user."""


Decision: TypeAlias = Go | Wait | Stop
