"""The loop itself: start rows, take in groups, take steps, until the steps are done.

Invariant: every group that is started is in a step's batch or in its count of dropped ones. With
`max_staleness=0` sampling and training take turns, and the run is the same to the last bit however
tasks are scheduled; otherwise sampling goes on while a step is taken.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.loop._data import Draw, RowStream
from eval_protocol_rft.loop._metrics import Line
from eval_protocol_rft.loop._options import LoopOptions
from eval_protocol_rft.loop._rollouts import (
    Evaluation,
    NothingToTrainOnError,
    roll_out,
    wave,
    why_fruitless,
)
from eval_protocol_rft.loop._row_runner import RowRunner
from eval_protocol_rft.loop._run_directory import RunFolder
from eval_protocol_rft.loop._scheduler import Scheduler
from eval_protocol_rft.loop._setup import Parts
from eval_protocol_rft.loop._step import StepRunner, Times
from eval_protocol_rft.training import PromptGroup, filter_group

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow

FRUITLESS_ROWS = 64
"""So many rows in a row of which nothing could be sampled or scored end the run."""
STUCK_STEPS = 20
"""So many steps' worth of groups in a row without a gradient end the run."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One run. Everything in it belongs to one event loop."""

    options: LoopOptions
    steps: int
    parts: Parts
    runner: RowRunner
    rows: Sequence[EvaluationRow]
    """To train on."""
    step: StepRunner
    evaluation: Evaluation | None
    """None: nothing is held out."""
    folder: RunFolder
    on_line: Callable[[Line], None]
    stream: RowStream = field(init=False)
    scheduler: Scheduler = field(init=False)
    _draws: dict[int, Draw] = field(default_factory=dict)
    """Of groups that are outstanding."""
    _ready: dict[int, PromptGroup] = field(default_factory=dict)
    _dropped: dict[int, PromptGroup] = field(default_factory=dict)
    """Since the last step."""
    _evaluated: set[int] = field(default_factory=set)
    _saved: int = 0
    """Version of the newest checkpoint; there is none of what training begins with."""
    _fruitless: int = 0
    _without_gradient: int = 0
    _waited: float = 0.0
    """Seconds in which no step was under way, since the last one."""

    def __post_init__(self) -> None:
        self.stream = RowStream(len(self.rows), self.options.seed, self.options.epochs)
        self.scheduler = Scheduler(
            self.options.groups_per_step, self.options.max_staleness, last_version=self.steps
        )

    async def begin(self) -> None:
        """Evaluate what training begins with."""
        await self._evaluate(0)

    def seen(self, line: Line) -> None:
        """A line of this run from before it was stopped."""
        if line["kind"] == "eval":
            self._evaluated.add(line["step"])
        elif line["kind"] == "step":
            self.step.seen(line)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.scheduler.version = self._saved = state["version"]
        self.stream.taken = state["taken"]
        self.stream.put_back = [Draw(*draw) for draw in state["put_back"]]

    async def __call__(self) -> None:
        """Take all steps.

        Raises:
            NothingToTrainOnError: no completion, score or gradient for long.
            TrainingStoppedError: sampler and trainer disagree.
            Exception: whatever the trainer raises.
        """
        version, every = self.scheduler.version, self.options.eval_every
        if version and every and version % every == 0 and version not in self._evaluated:
            await self._evaluate(version)  # the run was stopped in it
        try:
            if self.options.max_staleness:
                await self._ahead()
            else:
                await self._by_turns()
            if not self.scheduler.version:
                raise NothingToTrainOnError(self._why_no_step())
            await self._save()  # before the last evaluation, which may take long
            if self.scheduler.version not in self._evaluated:
                await self._evaluate(self.scheduler.version)
        except BaseException:
            # What was trained since the last checkpoint is kept; not half of a step, which is in
            # the weights and not in the version.
            if not self.scheduler.training:
                await self._save()
            raise
        finally:
            self.step.end()
        if self._dropped:
            dropped = len(self._dropped)
            self.on_line({"kind": "end", "step": self.scheduler.version, "groups_dropped": dropped})

    async def _by_turns(self) -> None:
        while self.scheduler.version < self.steps:
            batch = self.scheduler.take()
            if batch is None:
                numbers = self._start_rows()
                if not numbers:
                    if (batch := self.scheduler.take()) is None:
                        return
                    await _finished(self._take_step(batch))
                    continue
                began = time.perf_counter()
                groups = await wave(
                    [self._rollout(number) for number in numbers],
                    sampler=self.parts.sampler,
                    per_row=self.parts.request.n,
                )
                self._waited += time.perf_counter() - began
                for number, group in zip(numbers, groups, strict=True):
                    self._arrived(number, group)
            else:
                await _finished(self._take_step(batch))

    async def _ahead(self) -> None:
        sampling: dict[asyncio.Task[PromptGroup], int] = {}
        step: asyncio.Task[None] | None = None
        try:
            while True:
                for number in self._start_rows():
                    sampling[asyncio.create_task(self._rollout(number))] = number
                if step is None and (batch := self.scheduler.take()) is not None:
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
        numbers: list[int] = []
        while self.scheduler.may_start():
            draw = self.stream.next()
            if draw is None:
                self.scheduler.exhausted = True
                break
            number = self.scheduler.start()
            self._draws[number] = draw
            numbers.append(number)
        return numbers

    async def _rollout(self, number: int) -> PromptGroup:
        draw = self._draws[number]
        return await roll_out(self.runner, self.rows[draw.place], run=draw.epoch)

    def _arrived(self, number: int, group: PromptGroup) -> None:
        options = self.options.batch
        left, _ = filter_group(group, options.filters, relative=options.relative)
        self.scheduler.sampled(number, trains=left is not None)
        if left is not None:
            self._ready[number] = group
            self._fruitless = self._without_gradient = 0
            return
        self._dropped[number] = group
        self._without_gradient += 1
        scored = any(t.reward is not None for t in group.trajectories)
        self._fruitless = 0 if scored else self._fruitless + 1
        stuck = STUCK_STEPS * self.options.groups_per_step
        if self._fruitless >= min(FRUITLESS_ROWS, stuck):
            raise NothingToTrainOnError(
                f"{self._fruitless} rows in a row gave no scored completion; the last: "
                f"{why_fruitless(group)}"
            )
        if self._without_gradient >= stuck:
            rewards = [t.reward for t in group.trajectories if t.reward is not None]
            mean = sum(rewards) / len(rewards) if rewards else None
            raise NothingToTrainOnError(
                f"{self._without_gradient} groups in a row have nothing to learn from: all "
                f"completions of a prompt got the same reward (the last {mean}), or filters "
                "dropped them. Use easier or harder prompts, or more completions per prompt."
                f"{self.step.watch.stuck(mean)}"
            )

    def _why_no_step(self) -> str:
        """The data is used up, and not one group was left to train on."""
        groups = list(self._dropped.values())
        rewards = [t.reward for g in groups for t in g.trajectories if t.reward is not None]
        if rewards:
            why = (
                "the completions of each prompt got the same reward (the last "
                f"{rewards[-1]:g}), or filters dropped them: use easier or harder prompts, or more "
                "completions per prompt"
            )
        else:
            why = f"none gave a scored completion; the last: {why_fruitless(groups[-1])}"
        return f"no step was taken on all {len(groups)} groups: {why}"

    async def _take_step(self, numbers: list[int]) -> None:
        version, times = self.scheduler.version, Times()
        times.seconds["sampling"], self._waited = self._waited, 0.0
        groups = {**{n: self._ready[n] for n in numbers}, **self._dropped}
        self._dropped = {}
        ordered = sorted(groups)
        staleness = {n: self.scheduler.staleness(n) for n in numbers}
        line = await self.step(
            version,
            [groups[n] for n in ordered],
            [staleness[n] for n in ordered if n in staleness],
            times,
        )
        for number in groups:
            self._ready.pop(number, None)
            del self._draws[number]
        self.scheduler.trained()
        self.on_line({**line, "seconds": _rounded(times)})
        await self._after(self.scheduler.version)

    async def _after(self, step: int) -> None:
        """Evaluate and save, where it is time to."""
        every = self.options.eval_every
        if every and step % every == 0:
            await self._evaluate(step)
        if step % self.options.checkpoint_every == 0:
            await self._save()

    async def _evaluate(self, step: int) -> None:
        line = None if self.evaluation is None else await self.evaluation(step)
        self._evaluated.add(step)
        if line is not None:
            self.on_line(line)

    async def _save(self) -> None:
        version = self.scheduler.version
        if self._saved == version:
            return
        self._saved = version
        with self.folder.checkpoint(version, keep=self.options.keep_checkpoints) as unfinished:
            await self.parts.trainer.save(unfinished)
            (unfinished / "state.json").write_text(json.dumps(self._state()) + "\n")

    def _state(self) -> dict[str, Any]:
        """Enough to go on with the very rows that come next; those that are outstanding are
        sampled again."""
        return {
            "version": self.scheduler.version,
            "taken": self.stream.taken,
            "put_back": [*self._draws.values(), *self.stream.put_back],
        }


async def _finished(step: Coroutine[Any, Any, None]) -> None:
    """Take a step to its end, even when cancelled: half of one would be in the weights."""
    task = asyncio.ensure_future(step)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _rounded(times: Times) -> dict[str, float]:
    return {name: round(seconds, 4) for name, seconds in times.seconds.items()}
