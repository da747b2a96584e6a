"""Which fault strikes which request.

Invariant: with a plan the fault follows from (plan, prompt, seed, attempt) alone, whatever order
requests arrive in; only faults at accept follow the number of the connection.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.hostile.exchange import Request
from tests.hostile.faults import FAULTS, Fault
from tests.hostile.replies import Dialect


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Faults drawn at random, from a seed."""

    seed: int
    share: float = 0.5
    """Part of the requests that a fault strikes."""
    accept_share: float = 0.02
    """Part of the connections that a fault strikes before their first request."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often each fault by name, against 1 for those not named; 0 leaves one out. Costly faults
    are left out unless named."""

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(FAULTS)
        assert not unknown, f"no such fault: {sorted(unknown)}"

    def of_request(self, request: Request, dialect: Dialect) -> Fault | None:
        key = f"{self.seed}/{request.prompt}/{request.seed}/{request.attempt}"
        choices = [fault for fault in FAULTS.values() if fault.strikes(request, dialect)]
        return self._draw(random.Random(key), self.share, choices)

    def of_connection(self, number: int) -> Fault | None:
        choices = [fault for fault in FAULTS.values() if fault.at_accept]
        return self._draw(random.Random(f"{self.seed}/{number}"), self.accept_share, choices)

    def _draw(self, rng: random.Random, share: float, choices: list[Fault]) -> Fault | None:
        if rng.random() >= share:
            return None
        weights = [self.weights.get(fault.name, 0.0 if fault.costly else 1.0) for fault in choices]
        return rng.choices(choices, weights)[0] if any(weights) else None


@dataclass(frozen=True, slots=True)
class Scripted:
    """The same few faults in order, one for each request (or connection), then none. An empty name
    stands for an honest answer."""

    names: list[str]
    """Used up from the front."""

    def of_request(self, request: Request, dialect: Dialect) -> Fault | None:
        fault = FAULTS[self.names[0]] if self.names and self.names[0] else None
        if fault is not None and fault.at_accept:
            return None
        if self.names:
            self.names.pop(0)
        if fault is not None:
            assert fault.strikes(request, dialect), f"{fault.name} cannot strike this request"
        return fault

    def of_connection(self, number: int) -> Fault | None:
        fault = FAULTS[self.names[0]] if self.names and self.names[0] else None
        if fault is None or not fault.at_accept:
            return None
        self.names.pop(0)
        return fault
