"""Everything that decides whether a request of a run may start, as one machine. Pure.

Invariant: `in_flight` is what was started and has neither ended nor been abandoned, and it grows
only while it is below the limit. Breaker, budget and limit see the same events in the same order.

The caller owns the clock, the tasks and the waiting:

    decision = control.may_start(now, retry=...)
    Go:   control.started(now, ...); make the request; control.ended(attempt), or abandoned()
    Wait: ask again at `until`, or when a request ends
    Stop: end the run with its reason
"""

from __future__ import annotations

from eval_protocol_rft.sampling.attempts import Attempt
from eval_protocol_rft.sampling.breaker import CircuitBreaker
from eval_protocol_rft.sampling.budget import BudgetMeter
from eval_protocol_rft.sampling.concurrency import ConcurrencyLimit
from eval_protocol_rft.sampling.decisions import UNTIL_SOMETHING_ENDS, Decision, Stop, Wait


class RunControl:
    """One run against one server."""

    def __init__(
        self, *, limit: ConcurrencyLimit, breaker: CircuitBreaker, budget: BudgetMeter
    ) -> None:
        self.limit = limit
        self.breaker = breaker
        self.budget = budget
        self.in_flight = 0

    def may_start(self, now: float, *, retry: bool) -> Decision:
        """Whether a request may start now. `retry`: it is not its completion's first."""
        limit = self.limit.limit
        decision = self.breaker.may_start(now, in_flight=self.in_flight, limit=limit)
        if isinstance(decision, Stop):
            return decision
        probe = not isinstance(decision, Wait) and decision.probe
        allowance = self.budget.may_start(now, retry=retry, probe=probe)
        if isinstance(allowance, Stop):
            return allowance
        if self.in_flight >= limit:
            return Wait(UNTIL_SOMETHING_ENDS)
        waits = [answer for answer in (decision, allowance) if isinstance(answer, Wait)]
        return max(waits, key=lambda wait: wait.until) if waits else decision

    def started(self, now: float, *, retry: bool, probe: bool) -> None:
        """The request that was allowed has begun."""
        self.in_flight += 1
        self.breaker.started(now, probe=probe)
        self.budget.started(now, retry=retry, probe=probe)

    def ended(self, attempt: Attempt) -> None:
        """It has ended."""
        self.in_flight -= 1
        self.breaker.ended(attempt, in_flight=self.in_flight)
        if self.breaker.state in ("open", "half-open"):
            # What fails during an outage says nothing of how many the server can take.
            self.limit.outage()
        else:
            self.limit.ended(attempt, in_flight=self.in_flight)

    def abandoned(self, *, probe: bool) -> None:
        """It was cancelled by us."""
        self.in_flight -= 1
        self.breaker.abandoned(probe=probe)
