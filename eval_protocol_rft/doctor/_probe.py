"""Asks the setup: completions through the normal sampler and fan-out.

Invariant: every completion asked for is counted, as itself or with its failure, and a probe keeps
its place: lists have one entry per seed. The setup says what is examined, and with how many probes.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from eval_protocol_rft._options import Flag
from eval_protocol_rft.local.models import LOCAL_PREFIX, local_model_folder
from eval_protocol_rft.rollout import RolloutRequest
from eval_protocol_rft.sampling import (
    Completion,
    Failure,
    FixedLimit,
    RetryPolicy,
    RunLimiter,
    Sampler,
    SamplingParams,
    TokenIds,
    derive_seeds,
    sample_group,
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
    seeds_refused: str | None = None
    """The server's words, where it answers only requests without a seed: then none is sent."""
    completed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Kind of failure -> completions."""
    first_failure: str | None = None
    _limiter: RunLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._limiter = self._fresh_limiter()

    @property
    def seeded(self) -> bool:
        """Whether requests carry seeds."""
        return self.seeds_refused is None

    def _fresh_limiter(self) -> RunLimiter:
        return RunLimiter(limit=FixedLimit(self.concurrency), patience_seconds=PATIENCE_SECONDS)

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
            limiter=self._fresh_limiter(),
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
            limiter=self._limiter,
            prompt=stage,
        )
        self.on_done(n)
        self.completed += len(group.survivors)
        for failure in group.failures:
            self.failures[failure.kind] += 1
            self.first_failure = self.first_failure or failure.message
        completions: list[Completion | None] = [None] * n
        for survivor in group.survivors:
            completions[survivor.index] = survivor.completion
        return completions


def there(completions: Sequence[Completion | None]) -> list[Completion]:
    """Those that came back."""
    return [completion for completion in completions if completion is not None]


FEWEST_REQUESTS = 40
_RUN = functools.partial(Flag, panel="Run")
DEFAULT_SEED = 20
"""Fixed: the same setup gives the same table. Another one repeats an unlikely p-value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One setup to examine."""

    request: RolloutRequest
    """Model, endpoint, tokenizer, template arguments, and the temperature to train at (above 0)."""
    weights: Annotated[str | Path | None, Flag(unset="a local model's own")] = None
    """Folder that the trainer loads: compares sampler and trainer."""
    requests: Annotated[int, Ge(FEWEST_REQUESTS), _RUN()] = 400
    """One-token probes; a tenth as many for whole completions."""
    concurrency: Annotated[int | None, Ge(1), _RUN(unset="16; local models: 96")] = None
    """Requests in flight."""
    trust_remote_code: Annotated[bool, _RUN()] = False
    """Let tokenizer and model folders run their own code."""

    @property
    def in_flight(self) -> int:
        """Few over HTTP: some engines draw seeded requests one by one."""
        return self.concurrency or (96 if self.request.endpoint is None else 16)

    @property
    def trainer_weights(self) -> str | Path | None:
        """What the trainer would load."""
        model = self.request.params.model
        if self.weights is not None or not model.startswith(LOCAL_PREFIX):
            return self.weights
        return local_model_folder(model)

    def per_prompt(self, prompts: int) -> PerPrompt:
        """How many probes each of `prompts` prompts gets."""
        one_token = max(FEWEST_REQUESTS, self.requests) // prompts
        return PerPrompt(one_token, max(12, one_token // 4), max(4, one_token // 10), 3)


@dataclass(frozen=True, slots=True)
class PerPrompt:
    """Probes of one prompt."""

    first_tokens: int
    kind: int
    """At each of two temperatures."""
    full: int
    pairs: int

    @property
    def total(self) -> int:
        return self.first_tokens + 2 * self.kind + self.full + 2 * self.pairs
