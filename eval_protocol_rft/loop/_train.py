"""`train`: an evaluation test in, a policy that scores better on it out.

Invariant: the test is used as it is: its data, its processor, its evaluator. Stopped in any way,
the same call on the same folder goes on, and with `max_staleness=0` and a model in this process the
metrics are those of a run that was never stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from eval_protocol_rft.data import OnWait, PathOrGlob, Reporter, Waiting, reporter, waits
from eval_protocol_rft.loop import _run_directory as directory
from eval_protocol_rft.loop._metrics import Line, MetricSink, open_sinks, require_sinks
from eval_protocol_rft.loop._run_directory import LoopState, RunFolder, RunFolderError
from eval_protocol_rft.loop._run_options import EVALUATION, MODEL, RUN, LoopOptions
from eval_protocol_rft.loop._setup import LocalParts, MakeParts, Parts, rollout_params
from eval_protocol_rft.loop._trainer import DamagedCheckpointError
from eval_protocol_rft.loop._watch import TrainingStoppedError

if TYPE_CHECKING:
    from eval_protocol_rft.loop._run import Run

_LINE_EVERY = 5.0
"""Seconds between lines of progress where there is no terminal; evaluations have their own."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    folder: Path
    lines: list[Line]
    """All of `metrics.jsonl`."""

    @property
    def steps(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "step"]

    @property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "eval"]


def train(evaluator: Callable[..., Any], output: str | Path, **arguments: Any) -> TrainResult:
    """As `atrain`, where no event loop is running."""
    return asyncio.run(atrain(evaluator, output, **arguments))


async def atrain(
    evaluator: Callable[..., Any],
    output: str | Path,
    *,
    options: LoopOptions,
    model: Annotated[str | None, MODEL(unset="the test's")] = None,
    completion_params: Mapping[str, Any] | None = None,
    data: Annotated[Sequence[PathOrGlob] | None, RUN()] = None,
    eval_data: Annotated[Sequence[PathOrGlob] | None, EVALUATION(unset="held out")] = None,
    held_out: Annotated[float, Ge(0), EVALUATION()] = 0.1,
    parts: MakeParts | None = None,
    overwrite: Annotated[bool, RUN()] = False,
    progress: bool | None = None,
    log_to: Annotated[
        Sequence[str], EVALUATION("--log", only=True, metavar="tensorboard|wandb")
    ] = (),
    on_line: Callable[[Line], None] = lambda line: None,
    warn: Callable[[str], None] = warnings.warn,
) -> TrainResult:
    """Train the policy that `evaluator` judges.

    Args:
        evaluator: a function under `@evaluation_test`.
        output: folder of the run; a run that is there is continued.
        options: how to train.
        model: local/FOLDER, local/arithmetic, or the name that a server knows.
        completion_params: joined with the test's, and before them.
        data: in place of the test's data set: Parquet, JSONL, JSON, CSV or TSV, text also as .gz,
            .zst or .bz2: files, folders, patterns, URLs; repeatable.
        eval_data: the same, to evaluate on; repeatable.
        held_out: share of the rows, or number of them from 1 on.
        parts: where sampling and training happen: `LocalParts(...)`, the default, or
            `FireworksParts(...)`.
        overwrite: begin anew, whatever run is there.
        progress: False for none; None for what stderr can show.
        log_to: besides metrics.jsonl; repeatable.
        on_line: told of every line of metrics.
        warn: told what is wrong and not fatal.

    Raises:
        SetupError, SourceError, ParamsError, RunFolderError:
            something given is wrong, or a logger's package is missing; nothing was started.
        NothingToTrainOnError: rows give no completions, or none with a gradient.
        TrainingStoppedError: sampler and trainer disagree; nothing learnt would be right.
    """
    # These take long to import (Eval Protocol takes seconds), and the options above are read for
    # `--help`, too.
    from eval_protocol_rft.data import aopen_source
    from eval_protocol_rft.loop._data import load_rows, split_rows
    from eval_protocol_rft.loop._run import Run
    from eval_protocol_rft.rollout import redact_params
    from eval_protocol_rft.scoring.executors import code_fingerprints

    require_sinks(log_to)
    options.objective()  # what is wrong with the loss is said before anything is paid for
    rows = load_rows(evaluator, None if data is None else await aopen_source(data))
    if eval_data is not None:
        train_rows = rows
        eval_rows = load_rows(evaluator, await aopen_source(eval_data))
    else:
        train_rows, eval_rows = split_rows(rows, held_out, options.seed)
    params = rollout_params(evaluator, completion_params, model=model, options=options)
    chosen = parts or LocalParts()
    settings = {
        **options.settings(),
        **chosen.settings(),
        "completion_params": redact_params(params),
        "train_rows": len(train_rows),
        "eval_rows": len(eval_rows),
        "rows": await asyncio.to_thread(directory.rows_fingerprint, [*train_rows, *eval_rows]),
        "evaluator": f"{evaluator.__module__}.{evaluator.__name__}",
        "evaluator_code": code_fingerprints(evaluator),
        "initial_weights": await asyncio.to_thread(
            directory.weights_fingerprint, params["model"], chosen.settings().get("weights")
        ),
    }
    RunFolder.check(Path(output), settings, overwrite=overwrite)
    steps = options.steps or math.ceil(
        (options.epochs or 1) * len(train_rows) / options.groups_per_step
    )
    waiting = _Waiting()
    telling = getattr(chosen, "telling", None)
    with waits(progress) as shown_waits:
        waiting.show = shown_waits
        if telling is not None:
            chosen = telling(waiting)
        assembled = await chosen.make(evaluator, params, options)
    try:
        folder = RunFolder.open(Path(output), settings, overwrite=overwrite)
    except BaseException:
        await _release(assembled)
        raise
    stopped: str | None = None
    readable = True
    try:
        latest = folder.latest()
        done = latest[0] if latest else 0
        with (
            contextlib.ExitStack() as closing,
            reporter("train", steps, done=done, show=progress, every=_LINE_EVERY) as shown,
        ):
            log = _Log(folder, shown, on_line, done)
            waiting.show = log.wait
            state = await _load_newest(assembled, folder, warn)
            log.sinks = await asyncio.to_thread(_sinks, log_to, folder, state)
            for sink in log.sinks:
                closing.callback(sink.close)
            run = Run(
                evaluator,
                options=options,
                steps=steps,
                parts=assembled,
                rows=train_rows,
                held_out=eval_rows,
                folder=folder,
                on_line=log,
                warn=warn,
            )
            await _resume(run, state)
            await run()
        export = getattr(assembled.trainer, "export", None)
        if export is not None:
            await _export(assembled, folder)
        return TrainResult(folder.path, folder.lines())
    except BaseException as error:
        stopped = _why_stopped(error)
        readable = not isinstance(error, RunFolderError)
        raise
    finally:
        try:
            await _release(assembled)
            if readable:
                _report(folder, stopped, warn)
        finally:
            folder.close()


async def _release(parts: Parts) -> None:
    await parts.trainer.aclose()
    await parts.processor.acleanup()
    if parts.engine is not None:
        await asyncio.to_thread(parts.engine.stop)
    if parts.at_end is not None:
        parts.at_end()


async def _load_newest(
    parts: Parts, folder: RunFolder, warn: Callable[[str], None]
) -> LoopState | None:
    """Load the newest checkpoint that is whole, and return the loop's own state in it, which
    `Run.restore` takes; None where there is no checkpoint at all.

    Raises:
        RunFolderError: there are some, and none of them can be read.
    """
    damaged: list[str] = []
    for step, path in folder.checkpoints():
        try:
            state = folder.state(path)
            await parts.trainer.load(path)
        except (RunFolderError, DamagedCheckpointError) as error:
            damaged.append(str(error))
            continue
        if damaged:
            folder.set_aside(step)
            warn(f"{'; '.join(damaged)}: going on from the one before, step {step}")
        if step and not folder.lines():
            warn(f"{folder.metrics_path} is missing: what was measured up to step {step} is lost")
        return state
    if damaged:
        raise RunFolderError(
            f"{'; '.join(damaged)}: no checkpoint is left to go on from. Begin anew with "
            "--overwrite"
        )
    return None


async def _resume(run: Run, state: LoopState | None) -> None:
    """Go on from what was loaded, or evaluate what training begins with."""
    trainer = run.parts.trainer
    if state is None:
        run.folder.cut(-1)
        if run.parts.publish_first:
            await trainer.publish(0)
        await run.begin()
        return
    run.folder.cut(state.version)
    await trainer.publish(state.version)
    run.restore(state)
    for line in run.folder.lines():
        run.seen(line)


def _sinks(names: Sequence[str], folder: RunFolder, state: LoopState | None) -> list[MetricSink]:
    """Loggers, told of the lines that the run goes on from."""
    lines = [] if state is None else [n for n in folder.lines() if n["step"] <= state.version]
    settings = json.loads((folder.path / "settings.json").read_text())
    return open_sinks(names, folder.path, settings=settings, lines=lines)


def _report(folder: RunFolder, stopped: str | None, warn: Callable[[str], None]) -> None:
    """The run's page and its curve: whatever there is by now."""
    from eval_protocol_rft.report import ReportError, write_training_report

    try:
        write_training_report(folder.path, stopped=stopped)
    except (ReportError, OSError) as error:
        # The run itself is done and stored; `ep-rft report` writes the page from it.
        warn(f"no page was written for the run in {folder.path}: {error}")


def _why_stopped(error: BaseException) -> str:
    """For the page, which may be published: other messages may quote servers and users' code."""
    if isinstance(error, asyncio.CancelledError):
        return "from outside (Ctrl-C, or a signal)"
    if isinstance(error, TrainingStoppedError):
        return str(error)
    return f"{type(error).__name__}, see what the command printed"


async def _export(parts: Parts, folder: RunFolder) -> None:
    """The final weights with the tokenizer: a folder that `local/...` and servers load."""
    model = folder.path / "model"
    await parts.trainer.export(model)  # type: ignore[attr-defined]
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(model)


class _Waiting:
    """Is told what is waited for, and tells whoever shows it at the time."""

    def __init__(self) -> None:
        self.show: OnWait = lambda waiting: None

    def __call__(self, waiting: Waiting) -> None:
        self.show(waiting)


class _Log:
    """Takes every line: to the file, to loggers, to the screen, to the caller."""

    def __init__(
        self, folder: RunFolder, shown: Reporter, on_line: Callable[[Line], None], step: int
    ) -> None:
        self._folder, self._shown, self._on_line = folder, shown, on_line
        self.sinks: Sequence[MetricSink] = ()
        self._evaluated = ""
        self._step, self._detail = step, ""

    def wait(self, waiting: Waiting) -> None:
        """Show what is waited for, in the place of the last line, until it is there."""
        detail = self._detail if waiting.done else f"{waiting}, {waiting.seconds:.0f} s"
        self._shown.update(self._step, detail=detail)

    def __call__(self, line: Line) -> None:
        self._folder.append(line)
        for sink in self.sinks:
            sink.write(line)
        self._on_line(line)
        detail = self._evaluated
        if line["kind"] == "eval":
            means = {"sampled": line.get("sampled_score"), "greedy": line.get("greedy_score")}
            scores = ", ".join(f"{k} {v:.3f}" for k, v in means.items() if v is not None)
            self._evaluated = detail = f"held out: {scores or 'nothing was scored'}"
        elif "reward_mean" in line:
            detail = f"reward {line['reward_mean']:.3f}  {self._evaluated}"
        self._step, self._detail = line["step"], detail
        self._shown.update(line["step"], detail=detail, now=line["kind"] == "eval")
