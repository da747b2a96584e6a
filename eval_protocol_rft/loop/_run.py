"""The loop itself: start rows, take in groups, take steps, until the steps are done; and between
them the scores of held-out rows.

Invariant: every group that is started is in a step's batch or in its count of dropped ones. With
`max_staleness=0` sampling and training take turns, and the run is the same to the last bit however
tasks are scheduled; otherwise sampling goes on while a step is taken. Every evaluation of a run
samples the same rows, in this process with the same seeds, so that a change of the score is the
policy's. Nothing of it is trained on.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.loop._metrics import Line, eval_line
from eval_protocol_rft.loop._rollouts import (
    DEFAULT_CONCURRENCY,
    EVALUATION_RUN,
    RowRunner,
    roll_out,
    wave,
)
from eval_protocol_rft.loop._run_directory import STATE_FILE, LoopState, RunFolder
from eval_protocol_rft.loop._run_options import LoopOptions
from eval_protocol_rft.loop._scheduler import Draw, RowStream, Scheduler
from eval_protocol_rft.loop._setup import Parts, Slots
from eval_protocol_rft.loop._step import StepRunner
from eval_protocol_rft.loop._watch import NothingToTrainOnError, why_fruitless
from eval_protocol_rft.scoring import parameters_of
from eval_protocol_rft.training import BiasedSamplingWarning, PromptGroup

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow


class Run:
    """One run. Everything in it belongs to one event loop."""

    def __init__(
        self,
        evaluator: Callable[..., Any],
        *,
        options: LoopOptions,
        steps: int,
        parts: Parts,
        rows: Sequence[EvaluationRow],
        held_out: Sequence[EvaluationRow],
        folder: RunFolder,
        on_line: Callable[[Line], None],
        warn: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            rows: to train on.
            held_out: to evaluate on; none: nothing is evaluated.
            on_line: called with each line of metrics.
        """
        self.parts = parts = _with_slots(parts, evaluator)
        self.folder = folder
        self._options, self._steps, self._rows, self._on_line = options, steps, rows, on_line
        self._runner = row_runner(evaluator, parts)
        compares = "baselines" in options.batch.estimator_inputs
        self._greedy = greedy_runner(evaluator, parts) if compares else None
        self._step = StepRunner(parts=parts, options=options, steps=steps, warn=warn)
        self._evaluation = (
            Evaluation(evaluator, held_out, parts, options, warn=warn) if held_out else None
        )
        self._stream = RowStream(len(rows), options.seed, options.epochs)
        self._scheduler = Scheduler(
            options.groups_per_step, options.max_staleness, last_version=steps
        )
        self._draws: dict[int, Draw] = {}
        """Of groups that are outstanding."""
        self._ready: dict[int, PromptGroup] = {}
        self._dropped: dict[int, PromptGroup] = {}
        """Since the last step."""
        self._evaluated: set[int] = set()
        self._saved = 0
        """Version of the newest checkpoint; there is none of what training begins with."""
        self._waited = 0.0
        """Seconds in which no step was under way, since the last one."""

    async def begin(self) -> None:
        """Evaluate what training begins with."""
        await self._evaluate(0)

    def seen(self, line: Line) -> None:
        """A line of this run from before it was stopped."""
        if line["kind"] == "eval":
            self._evaluated.add(line["step"])
        elif line["kind"] == "step":
            self._step.seen(line)

    def restore(self, state: LoopState) -> None:
        """Go on from a checkpoint's state."""
        self._scheduler.version = self._saved = state.version
        self._stream.taken = state.taken
        self._stream.put_back = list(state.put_back)

    async def __call__(self) -> None:
        """Take all steps.

        Raises:
            NothingToTrainOnError: no completion, score or gradient for long.
            TrainingStoppedError: sampler and trainer disagree.
            Exception: whatever the trainer raises.
        """
        version, every = self._scheduler.version, self._options.eval_every
        if version and every and version % every == 0 and version not in self._evaluated:
            await self._evaluate(version)  # the run was stopped in it
        try:
            if self._options.max_staleness:
                await self._ahead()
            else:
                await self._by_turns()
            if not self._scheduler.version:
                raise self._step.watch.no_step()
            await self._save()  # before the last evaluation, which may take long
            if self._scheduler.version not in self._evaluated:
                await self._evaluate(self._scheduler.version)
        except BaseException:
            # What was trained since the last checkpoint is kept; not half of a step, which is in
            # the weights and not in the version.
            if not self._scheduler.training:
                await self._save()
            raise
        finally:
            self._step.end()
        if self._dropped:
            dropped = len(self._dropped)
            self._on_line(
                {"kind": "end", "step": self._scheduler.version, "groups_dropped": dropped}
            )

    async def _by_turns(self) -> None:
        while self._scheduler.version < self._steps:
            started = self._start_rows()
            if started:
                began = time.perf_counter()
                groups = await wave(
                    [self._rollout(number) for number in started],
                    sampler=self.parts.sampler,
                    per_row=self.parts.request.n + (self._greedy is not None),
                    slots=self.parts.max_concurrency,
                )
                self._waited += time.perf_counter() - began
                for number, group in zip(started, groups, strict=True):
                    self._arrived(number, group)
            batch = self._scheduler.take()
            if batch is not None:
                await _finished(self._take_step(batch))
            elif not started:
                return

    async def _ahead(self) -> None:
        sampling: dict[asyncio.Task[PromptGroup], int] = {}
        step: asyncio.Task[None] | None = None
        try:
            while True:
                for number in self._start_rows():
                    sampling[asyncio.create_task(self._rollout(number))] = number
                if step is None and (batch := self._scheduler.take()) is not None:
                    step = asyncio.create_task(self._take_step(batch))
                running = {*sampling, *([step] if step else [])}
                if not running:
                    return
                began, idle = time.perf_counter(), step is None
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if idle:
                    self._waited += time.perf_counter() - began
                for task in done:
                    if task is step:
                        step = None
                        await task
                    else:
                        number = sampling.pop(task)  # type: ignore[arg-type]
                        self._arrived(number, await task)  # type: ignore[arg-type]
        finally:
            for task in sampling:
                task.cancel()
            # A step that has begun ends: half of one would be in the weights.
            await asyncio.gather(*sampling, *([step] if step else []), return_exceptions=True)

    def _start_rows(self) -> list[int]:
        """Take in as many rows as may be sampled now."""
        started: list[int] = []
        while self._scheduler.may_start():
            draw = self._stream.next()
            if draw is None:
                self._scheduler.exhausted = True
                break
            number = self._scheduler.start()
            self._draws[number] = draw
            started.append(number)
        return started

    async def _rollout(self, number: int) -> PromptGroup:
        draw = self._draws[number]
        row = self._rows[draw.place]
        return await roll_out(self._runner, row, run=draw.epoch, greedy=self._greedy)

    def _arrived(self, number: int, group: PromptGroup) -> None:
        options = self._options.batch
        trains = options.filtered(group)[0] is not None
        self._scheduler.sampled(number, trains=trains)
        (self._ready if trains else self._dropped)[number] = group
        self._step.watch.group(group, trains=trains)

    async def _take_step(self, taken: list[int]) -> None:
        seconds, self._waited = {"sampling": self._waited}, 0.0
        groups = {**{n: self._ready[n] for n in taken}, **self._dropped}
        self._dropped = {}
        ordered = sorted(groups)
        staleness = {n: self._scheduler.staleness(n) for n in taken}
        line = await self._step(
            self._scheduler.version,
            [groups[n] for n in ordered],
            [staleness[n] for n in ordered if n in staleness],
            seconds,
        )
        for number in groups:
            self._ready.pop(number, None)
            del self._draws[number]
        self._scheduler.trained()
        rounded = {name: round(value, 4) for name, value in seconds.items()}
        self._on_line({**line, "seconds": rounded})
        await self._after(self._scheduler.version)

    async def _after(self, step: int) -> None:
        """Evaluate and save, where it is time to."""
        every = self._options.eval_every
        if every and step % every == 0:
            await self._evaluate(step)
        if step % self._options.checkpoint_every == 0:
            await self._save()

    async def _evaluate(self, step: int) -> None:
        line = None if self._evaluation is None else await self._evaluation(step)
        self._evaluated.add(step)
        if line is not None:
            self._on_line(line)

    async def _save(self) -> None:
        version = self._scheduler.version
        if self._saved == version:
            return
        self._saved = version
        with self.folder.checkpoint(version, keep=self._options.keep_checkpoints) as unfinished:
            await self.parts.trainer.save(unfinished)
            outstanding = [*self._draws.values(), *self._stream.put_back]
            state = LoopState(version, self._stream.taken, outstanding)
            (unfinished / STATE_FILE).write_bytes(msgspec.json.encode(state) + b"\n")


async def _finished(step: Coroutine[Any, Any, None]) -> None:
    """Take a step to its end, even when cancelled: half of one would be in the weights."""
    task = asyncio.ensure_future(step)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _with_slots(parts: Parts, evaluator: Callable[..., Any]) -> Parts:
    """Where rollouts have environments, training and evaluation have as many together as the
    evaluation test allows."""
    if not parts.processor.has_environments:
        return parts
    test = parameters_of(evaluator)
    slots = Slots(DEFAULT_CONCURRENCY if test is None else test.max_concurrent_rollouts)
    return replace(parts, max_concurrency=slots)


def row_runner(evaluator: Callable[..., Any], parts: Parts, **changes: Any) -> RowRunner:
    """Rolls rows out with `parts`; `changes` are to its completion_params."""
    return RowRunner(
        evaluator,
        processor=parts.processor,
        completion_params={**parts.params, **changes},
        max_concurrency=parts.max_concurrency,
    )


def greedy_runner(evaluator: Callable[..., Any], parts: Parts) -> RowRunner:
    """Rolls out one greedy completion a row, which is not trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedSamplingWarning)
        return row_runner(evaluator, parts, temperature=0.0, n=1)


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
        self._greedy = greedy_runner(evaluator, parts)
        with warnings.catch_warnings():
            # Said once, of the rollouts that train.
            warnings.simplefilter("ignore", BiasedSamplingWarning)
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
        slots, sampler = self._parts.max_concurrency, self._parts.sampler
        if isinstance(slots, Slots) and self._options.max_staleness:
            sampler = None  # those who train hold slots, and must be sampled to give them back
        return await wave(
            [roll_out(runner, row, run=EVALUATION_RUN) for row in self._rows],
            sampler=sampler,
            per_row=per_row,
            slots=slots,
        )
