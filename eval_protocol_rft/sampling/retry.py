"""When to try again. Pure: no clock, no randomness, no sleep; those come in as arguments.

Invariant: one budget for everything. Nothing below this retries, and Eval Protocol does not
resample our errors, so `max_attempts` is the number of requests that one completion can cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from eval_protocol_rft.sampling.types import SamplingError

TRANSIENT_KINDS = frozenset({"unavailable", "connection", "timeout"})
"""A refusal or a reply that breaks the contract would come back the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter (delay uniform in [0, base * 2^(attempt-1)], capped),
    with the server's `Retry-After` as a floor. Source: M. Brooker, "Exponential Backoff And
    Jitter", AWS Architecture Blog, 2015."""

    max_attempts: int = 8
    """Requests per completion, the first included."""
    max_seconds: float = 1800.0
    """No attempt is made that would have to wait beyond this, counted from the first one's start.
    Waiting for a slot comes on top."""
    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    """Longest backoff of our own; a longer `Retry-After` is still honoured."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        for name in ("max_seconds", "base_seconds", "cap_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def delay(
        self, error: SamplingError, *, attempt: int, elapsed: float, uniform: float
    ) -> float | None:
        """Seconds to wait after `attempt` (1-based) failed with `error`; None to give up.

        `elapsed`: seconds since the first attempt began. `uniform`: a draw from [0, 1).
        """
        if error.kind not in TRANSIENT_KINDS or attempt >= self.max_attempts:
            return None
        # 2.0**attempt overflows a float past 1023 attempts; the cap is reached long before.
        ceiling = min(self.cap_seconds, self.base_seconds * 2.0 ** min(attempt - 1, 60))
        wait = max(uniform * ceiling, error.retry_after or 0.0)
        return wait if elapsed + wait <= self.max_seconds else None
