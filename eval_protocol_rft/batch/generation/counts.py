"""What a run has done so far, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from eval_protocol_rft.batch.rollouts.rows import CompletionRow


@dataclass(slots=True)
class RunCounts:
    """Counts of one run; completions of earlier runs are not in it."""

    completions: int = 0
    """Sampled and stored."""
    truncated: int = 0
    tokens: int = 0
    """Sampled tokens."""
    attempts: int = 0
    """Requests made."""
    failures: Counter[str] = field(default_factory=Counter)
    """Kind -> completions that failed for good."""
    first_failure: str | None = None

    @property
    def failed(self) -> int:
        return self.failures.total()

    def add(self, rows: Iterable[CompletionRow]) -> None:
        """Count rows that were stored."""
        for row in rows:
            self.attempts += row.attempts or 0
            if row.failed:
                self.failures[row.error_kind or "internal"] += 1
                self.first_failure = self.first_failure or f"row {row.row_id}: {row.error}"
            else:
                self.completions += 1
                self.truncated += bool(row.truncated)
                self.tokens += row.num_tokens
