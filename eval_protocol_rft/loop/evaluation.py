"""Scores on held-out rows: greedy, and sampled as in training.

Invariant: every evaluation of a run samples the same rows, in this process with the same seeds, so
that a change of the score is the policy's. Nothing of it is trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.loop.metrics import Line, eval_line
from eval_protocol_rft.loop.options import OnUnscored
from eval_protocol_rft.loop.rollouts import (
    NothingToTrainOnError,
    roll_out,
    wave,
    why_fruitless,
)
from eval_protocol_rft.row_runner import RowRunner
from eval_protocol_rft.training.errors import BiasedSamplingWarning
from eval_protocol_rft.training.trajectory import PromptGroup

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

    from eval_protocol_rft.loop.setup import Parts

RUN = 1 << 20
"""The number of evaluation's runs: no epoch of training has its seeds."""


@dataclass(slots=True)
class Evaluation:
    """Evaluates the policy as it is now; `await evaluation(step)`."""

    rows: Sequence[EvaluationRow]
    greedy: RowRunner
    sampled: RowRunner | None
    parts: Parts
    pass_threshold: float
    per_row: int
    on_unscored: OnUnscored = "stop"
    warn: Callable[[str], None] = print

    @classmethod
    def of(
        cls,
        evaluator: Callable[..., Any],
        rows: Sequence[EvaluationRow],
        parts: Parts,
        *,
        completions: int,
        pass_threshold: float,
        on_unscored: OnUnscored = "stop",
        warn: Callable[[str], None] = print,
    ) -> Evaluation | None:
        """None where nothing is held out."""
        if not rows:
            return None

        def runner(**changes: Any) -> RowRunner:
            with warnings.catch_warnings():
                # Greedy completions are not trained on.
                warnings.simplefilter("ignore", BiasedSamplingWarning)
                return RowRunner(
                    evaluator,
                    processor=parts.processor,
                    completion_params={**parts.params, **changes},
                    max_concurrency=parts.max_concurrency,
                )

        return cls(
            rows=rows,
            greedy=runner(temperature=0.0, n=1),
            sampled=runner(n=completions) if completions else None,
            parts=parts,
            pass_threshold=pass_threshold,
            per_row=completions,
            on_unscored=on_unscored,
            warn=warn,
        )

    async def __call__(self, step: int) -> Line:
        greedy = await self._groups(self.greedy, 1)
        sampled = [] if self.sampled is None else await self._groups(self.sampled, self.per_row)
        self._require_scores(step, [*greedy, *sampled])
        return eval_line(step, greedy, sampled, pass_threshold=self.pass_threshold)

    def _require_scores(self, step: int, groups: Sequence[PromptGroup]) -> None:
        """A curve without points is no curve: say so, and why."""
        if any(t.reward is not None for group in groups for t in group.trajectories):
            return
        message = (
            f"step {step}: nothing of {len(self.rows)} held-out rows could be scored; the first: "
            f"{why_fruitless(groups[0])}"
        )
        if self.on_unscored == "stop":
            raise NothingToTrainOnError(f"{message}. To train all the same: --on-unscored warn")
        self.warn(message)

    async def _groups(self, runner: RowRunner, per_row: int) -> list[PromptGroup]:
        return await wave(
            [roll_out(runner, row, run=RUN) for row in self.rows],
            sampler=self.parts.sampler,
            per_row=per_row,
        )
