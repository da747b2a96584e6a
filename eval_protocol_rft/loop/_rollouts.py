"""Rows to scored prompt groups, through the user's own processor and evaluator; and the scores of
held-out rows.

Invariant: a row gives one group, whatever happens to it: what went wrong is in the group, as a
failure or a failed row. Rows of one wave give the same bits in whatever order their tasks run.
Every evaluation of a run samples the same rows, in this process with the same seeds, so that a
change of the score is the policy's. Nothing of it is trained on.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.loop._metrics import Line, eval_line
from eval_protocol_rft.loop._options import LoopOptions
from eval_protocol_rft.loop._row_runner import RowRunner
from eval_protocol_rft.sampling import RetryPolicy, RunStoppedError, TokenIds, sample_group
from eval_protocol_rft.training import (
    BiasedSamplingWarning,
    PromptGroup,
    TrainingDataError,
    Trajectory,
    group_rows,
)

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.loop._setup import Parts
    from eval_protocol_rft.rollout import FireworksTrainingRolloutProcessor

_T = TypeVar("_T")

PROBE_TOKENS = 32
"""Most tokens of a completion that is sampled for a comparison alone."""
PROBE_RETRY = RetryPolicy(max_attempts=2, max_seconds=60.0)
"""A step waits for it."""
GATHERING_SECONDS = 30.0
"""How long a wave waits for the next of its requests to be at the sampler. A row that asks for
fewer than expected would otherwise keep it waiting."""


class NothingToTrainOnError(EvalProtocolRftError, RuntimeError):
    """Rows give no completions, no scores, or none with a gradient; the message says why."""


def row_runner(evaluator: Callable[..., Any], parts: Parts, **changes: Any) -> RowRunner:
    """Rolls rows out with `parts`; `changes` are to its completion_params."""
    return RowRunner(
        evaluator,
        processor=parts.processor,
        completion_params={**parts.params, **changes},
        max_concurrency=parts.max_concurrency,
    )


async def roll_out(runner: RowRunner, row: EvaluationRow, *, run: int) -> PromptGroup:
    """Sample and score one row; `run` numbers its repetitions, and is part of the seeds.

    Raises:
        RunStoppedError: the server refuses everything, or answers nothing.
        TrainingDataError: the processor left no rollout record.
    """
    try:
        scored = await runner(row, run=run)
    except RunStoppedError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's processor and evaluator raise anything
        message = f"row {row.input_metadata.row_id}: {type(error).__name__}: {error}"
        return PromptGroup(key=row.input_metadata.row_id, trajectories=(), failed_rows=(message,))
    try:
        (group,) = group_rows([scored])
    except TrainingDataError as error:
        raise TrainingDataError(
            f"{error} (training needs a processor that leaves rollout records, such as "
            "FireworksTrainingRolloutProcessor)"
        ) from error
    return group


async def sample_prompts(
    processor: FireworksTrainingRolloutProcessor,
    completion_params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
) -> list[Trajectory]:
    """A short completion of each prompt, unscored, from what `processor` samples from; those that
    fail are left out."""
    request = processor.request_of(completion_params)
    sampler = await processor.sampler_of(request)
    most = min(request.params.max_tokens or PROBE_TOKENS, PROBE_TOKENS)
    try:
        groups = await asyncio.gather(
            *(
                sample_group(
                    sampler,
                    TokenIds(prompt),
                    replace(request.params, max_tokens=most),
                    seeds=[None],
                    slots=contextlib.nullcontext(),
                    retry=PROBE_RETRY,
                )
                for prompt in prompts
            )
        )
    except RunStoppedError:
        return []  # rollouts meet the same server, and say so
    return [
        Trajectory(
            tokens=np.array([*prompt, *one.completion.token_ids], np.int64),
            logprobs=np.array([0.0] * len(prompt) + one.completion.logprobs, np.float32),
            loss_mask=np.repeat(
                np.array([0.0, 1.0], np.float32), [len(prompt), len(one.completion.token_ids)]
            ),
            reward=None,
            finish_reason=one.completion.finish_reason,
            policy_version=one.completion.policy_version,
            first_policy_version=one.completion.first_policy_version,
            row_id="of a probe",
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group.survivors
    ]


def why_fruitless(group: PromptGroup) -> str:
    """Why a completion of `group` could not be had, or has no score: the first reason there is."""
    if group.failed_rows:
        return group.failed_rows[0]
    for trajectory in group.trajectories:
        if trajectory.reward is None:
            reason = trajectory.score_error or "the evaluator gave no valid score"
            return f"row {trajectory.row_id}, completion {trajectory.completion}: {reason}"
    if group.failures:
        return f"row {_row_id(group)}: {group.failures[0].kind}: {group.failures[0].message}"
    return f"row {_row_id(group)}: nothing was sampled"


FRUITLESS_ROWS = 64
"""So many rows in a row of which nothing could be sampled or scored end the run."""


def nothing_scored(rows: int, last: PromptGroup) -> NothingToTrainOnError:
    """The end of a run in which so many rows in a row, `last` the last of them, gave nothing."""
    return NothingToTrainOnError(
        f"{rows} rows in a row gave no scored completion; the last: {why_fruitless(last)}"
    )


def _row_id(group: PromptGroup) -> object:
    return group.key[-1] if isinstance(group.key, tuple) else group.key


async def wave(
    rollouts: Sequence[Coroutine[Any, Any, _T]], *, sampler: LocalSampler | None, per_row: int
) -> list[_T]:
    """Run all of `rollouts` and return what they return, in order.

    Args:
        rollouts: one per row.
        sampler: where it samples in this process, all requests begin as one batch.
        per_row: requests that each makes at once.
    """
    tasks = [asyncio.ensure_future(rollout) for rollout in rollouts]
    try:
        if sampler is not None:
            with sampler.held():
                await _gathered(tasks, sampler, per_row)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gathered(
    tasks: Sequence[asyncio.Task[Any]], sampler: LocalSampler, per_row: int
) -> None:
    """Wait until every row that still runs has its requests at the sampler."""
    loop = asyncio.get_running_loop()
    seen, end = -1, 0.0
    while sampler.pending < per_row * sum(not task.done() for task in tasks):
        if sampler.pending != seen:
            seen, end = sampler.pending, loop.time() + GATHERING_SECONDS
        elif loop.time() > end:
            return
        await asyncio.sleep(0.0005)


RUN = 1 << 20
"""The number of evaluation's runs: no epoch of training has its seeds."""


class Evaluation:
    """Evaluates the policy as it is now on held-out rows; `await evaluation(step)`."""

    def __init__(
        self,
        evaluator: Callable[..., Any],
        rows: Sequence[EvaluationRow],
        parts: Parts,
        options: LoopOptions,
        *,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._rows, self._parts, self._options, self._warn = rows, parts, options, warn
        n = options.eval_completions
        with warnings.catch_warnings():
            # Greedy completions are not trained on.
            warnings.simplefilter("ignore", BiasedSamplingWarning)
            self._greedy = row_runner(evaluator, parts, temperature=0.0, n=1)
            self._sampled = row_runner(evaluator, parts, n=n) if n else None

    async def __call__(self, step: int) -> Line:
        n = self._options.eval_completions
        greedy = await self._groups(self._greedy, 1)
        sampled = [] if self._sampled is None else await self._groups(self._sampled, n)
        self._require_scores(step, [*greedy, *sampled])
        return eval_line(step, greedy, sampled, pass_threshold=self._options.pass_threshold)

    def _require_scores(self, step: int, groups: Sequence[PromptGroup]) -> None:
        """A curve without points is no curve: say so, and why."""
        if any(t.reward is not None for group in groups for t in group.trajectories):
            return
        message = (
            f"step {step}: nothing of {len(self._rows)} held-out rows could be scored; the first: "
            f"{why_fruitless(groups[0])}"
        )
        if self._options.on_unscored == "stop":
            raise NothingToTrainOnError(f"{message}. To train all the same: --on-unscored warn")
        self._warn(message)

    async def _groups(self, runner: RowRunner, per_row: int) -> list[PromptGroup]:
        return await wave(
            [roll_out(runner, row, run=RUN) for row in self._rows],
            sampler=self._parts.sampler,
            per_row=per_row,
        )
