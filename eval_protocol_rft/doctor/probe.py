"""Asks the setup: completions through the normal sampler and fan-out.

Invariant: every completion asked for is counted, as itself or with its failure, and a probe keeps
its place: lists have one entry per seed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eval_protocol_rft.sampling.concurrency import FixedLimit
from eval_protocol_rft.sampling.fanout import derive_seeds, sample_group
from eval_protocol_rft.sampling.guard import RunGuard
from eval_protocol_rft.sampling.retry import RetryPolicy
from eval_protocol_rft.sampling.types import (
    Completion,
    Failure,
    Sampler,
    SamplingParams,
    TokenIds,
)

PATIENCE_SECONDS = 60.0
"""Who waits for a diagnosis is told soon that the server is away."""


@dataclass(slots=True)
class Probe:
    """Samples for the checks, and counts what came of it. Belongs to one event loop."""

    sampler: Sampler
    concurrency: int
    seed: int
    on_done: Callable[[int], None]
    """Told how many more completions were asked for and settled."""
    seeded: bool = True
    """Whether requests carry seeds."""
    completed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Kind of failure -> completions."""
    first_failure: str | None = None
    _guard: RunGuard = field(init=False)

    def __post_init__(self) -> None:
        self._guard = self._fresh_guard()

    def _fresh_guard(self) -> RunGuard:
        return RunGuard(limit=FixedLimit(self.concurrency), patience_seconds=PATIENCE_SECONDS)

    async def one(
        self, prompt: TokenIds, params: SamplingParams, *, seed: int | None, attempts: int = 1
    ) -> Completion | Failure:
        """One completion that may fail: it counts for nothing."""
        group = await sample_group(
            self.sampler,
            prompt,
            params,
            seeds=[seed],
            slots=contextlib.nullcontext(),
            retry=RetryPolicy(max_attempts=attempts, max_seconds=PATIENCE_SECONDS),
            guard=self._fresh_guard(),
        )
        self.on_done(1)
        return group.survivors[0].completion if group.survivors else group.failures[0]

    async def several(
        self, prompt: TokenIds, params: SamplingParams, n: int, *, stage: str
    ) -> list[Completion | None]:
        """n completions under seeds of their own, None where there is none. The same `stage` has
        the same seeds.

        Raises:
            RunStoppedError: the server refuses everything, or is away for too long.
        """
        seeds = derive_seeds(self.seed if self.seeded else None, f"doctor/{stage}", n)
        group = await sample_group(
            self.sampler,
            prompt,
            params,
            seeds=seeds,
            slots=contextlib.nullcontext(),
            retry=RetryPolicy(max_attempts=3, max_seconds=PATIENCE_SECONDS),
            guard=self._guard,
            prompt=stage,
        )
        self.on_done(n)
        self.completed += len(group.survivors)
        for failure in group.failures:
            self.failures[failure.kind] += 1
            self.first_failure = self.first_failure or failure.message
        found: list[Completion | None] = [None] * n
        for survivor in group.survivors:
            found[survivor.index] = survivor.completion
        return found


def there(completions: Sequence[Completion | None]) -> list[Completion]:
    """Those that came back."""
    return [completion for completion in completions if completion is not None]
