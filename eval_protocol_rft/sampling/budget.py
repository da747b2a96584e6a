"""How many requests a run may spend beyond one per completion, and for how long. Pure.

Invariant, at any time t seconds into the run, whatever the server does:

    retries <= burst + extra_ratio * first_attempts + trickle_per_second * t

and no attempt begins after `max_seconds` or beyond `max_attempts`. Probes of a breaker are paced
by the breaker and come on top of the first line. What the budget holds back is late, not lost.
Source of the ratio: retry budgets of Twitter's Finagle (2016) and Google's SRE book, chapter 21.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval_protocol_rft.sampling.decisions import Decision, Go, Stop, Wait

_ROUNDING = 1e-6
"""Of a token: who waits until the date that was named must not find it missing by a rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBudget:
    """What one run may spend."""

    extra_ratio: float = 0.2
    """Retries that each first attempt pays for: at most a fifth more load than was asked for, for
    as long as the server fails. Finagle's default; Google's is 0.1."""
    burst: float = 512.0
    """Retries that can be saved up, and what there is at the start. One interruption fails every
    request in flight at once; twice 256 in flight come back without waiting for their turn."""
    trickle_per_second: float = 1.0
    """Retries that time pays for, so that the last completions of a run, which no first attempt
    follows, still get theirs."""
    max_attempts: int | None = None
    """Requests of the whole run; None: as many as the completions may have."""
    max_seconds: float | None = None
    """Seconds after which the run begins no attempt; None: no such limit."""

    def __post_init__(self) -> None:
        for name in ("extra_ratio", "max_attempts", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not self.burst >= 1:
            raise ValueError(f"burst must be at least 1, got {self.burst}")
        if not self.trickle_per_second > 0:
            # Nothing would ever wake a retry once no first attempt is left.
            raise ValueError(f"trickle_per_second must be above 0, got {self.trickle_per_second}")


class BudgetMeter:
    """What a run has spent of its `RunBudget`. A token bucket that first attempts and time fill."""

    def __init__(self, budget: RunBudget, *, began: float) -> None:
        """`began`: clock seconds at which the run began."""
        self._budget = budget
        self._began = began
        self._tokens = budget.burst
        self._filled_at = began
        self.first_attempts = 0
        self.retries = 0
        """Without probes."""
        self.probes = 0

    @property
    def attempts(self) -> int:
        return self.first_attempts + self.retries + self.probes

    def may_start(self, now: float, *, retry: bool, probe: bool = False) -> Decision:
        """Whether the budget has room for one more attempt."""
        budget = self._budget
        if budget.max_seconds is not None and now - self._began >= budget.max_seconds:
            return Stop(
                f"the run's max_seconds={budget.max_seconds:g} are over after {self._spent()}; "
                "what is missing can be had by running again"
            )
        if budget.max_attempts is not None and self.attempts >= budget.max_attempts:
            return Stop(
                f"the run's max_attempts={budget.max_attempts} are spent ({self._spent()}); "
                "see the failures for the cause before running again"
            )
        if not retry or probe:
            return Go()
        self._fill(now)
        if self._tokens >= 1.0 - _ROUNDING:
            return Go()
        return Wait(now + (1.0 - self._tokens) / budget.trickle_per_second)

    def started(self, now: float, *, retry: bool, probe: bool = False) -> None:
        """One more attempt has begun."""
        self._fill(now)
        if probe:
            self.probes += 1
        elif retry:
            self.retries += 1
            self._tokens -= 1.0
        else:
            self.first_attempts += 1
            self._add(self._budget.extra_ratio)

    def _fill(self, now: float) -> None:
        self._add((now - self._filled_at) * self._budget.trickle_per_second)
        self._filled_at = now

    def _add(self, tokens: float) -> None:
        # A run that went well for hours must not have saved up a storm.
        self._tokens = min(self._budget.burst, self._tokens + tokens)

    def _spent(self) -> str:
        return (
            f"{self.attempts} attempts: {self.first_attempts} first ones, "
            f"{self.retries} retries, {self.probes} probes"
        )
