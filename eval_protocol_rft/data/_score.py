"""`score`: rewards for completions that are there, as often as graders change.

Invariant: tokens stay as they are. A completion gets a reward, or None with the reason why, never a
0 in its place; what was graded is on disk at once, and an interrupted call goes on from there. The
file is replaced in one step, when all of it is graded. Rewards that cannot mean anything do not
pass without a word.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from annotated_types import Ge

from eval_protocol_rft import scoring
from eval_protocol_rft._options import Flag, check_arguments
from eval_protocol_rft.data import _files as files
from eval_protocol_rft.data import _score_file as score_file
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import (
    ORIGINAL_PREFIX,
    RewardSettings,
    reward_column,
    reward_columns,
)
from eval_protocol_rft.data._job_file import BusyError
from eval_protocol_rft.data._job_store import JobStore, lock_folder, parts_folder, read_schema
from eval_protocol_rft.data._jsonl import is_jsonl
from eval_protocol_rft.data._progress import reporter
from eval_protocol_rft.scoring import executors
from eval_protocol_rft.scoring.executors import RAY_ADDRESS, Engine, LoadedEvaluator, check_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What a call of `score` did, and what the column holds now."""

    output: Path
    column: str
    graded: int
    """Completions graded by this call."""
    rows: int = 0
    """Rows of the data set."""
    completions: int = 0
    """All of the file, those that could not be sampled too."""
    scored: int
    """Completions with a reward."""
    mean: float | None
    """Of the rewards."""
    unscored: Counter[str] = field(default_factory=Counter)
    """Why a completion has none -> how many."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was wrong with completions that have a reward all the same -> how many."""
    failed: int = 0
    """Completions that could not be sampled, so there is nothing to grade."""
    warnings: tuple[str, ...] = ()
    """What makes the rewards doubtful."""


def summarize_rewards(
    target: Path, column: str, graded: int, evaluator: LoadedEvaluator, *, adapt: bool
) -> ScoreSummary:
    """Look at all rows of a file that was scored."""
    dataset = RolloutDataset(target)
    error_column = reward_columns(column)[3]
    columns = ["data_idx", column, error_column, "error", "ground_truth"]
    rows: set[int] = set()
    completions = scored = failed = truths = 0
    total = 0.0
    lowest, highest = float("inf"), float("-inf")
    unscored: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    for table in dataset.tables([name for name in columns if name in dataset.schema.names]):
        rewards = table.column(column)
        rows.update(pc.unique(table.column("data_idx")).to_pylist())
        completions += len(table)
        failed += len(table) - table.column("error").null_count
        if "ground_truth" in table.schema.names:
            truths += _present(table.column("ground_truth"))
        scored += len(rewards) - rewards.null_count
        total += float(pc.sum(rewards, min_count=0).as_py())
        if rewards.null_count < len(rewards):
            ends = pc.min_max(rewards).as_py()
            lowest, highest = min(lowest, ends["min"]), max(highest, ends["max"])
        has_none = rewards.is_null().to_pylist()
        errors = table.column(error_column).to_pylist()
        for error, is_unscored in zip(errors, has_none, strict=True):
            if error:
                (unscored if is_unscored else remarks)[error] += 1
    warnings = []
    uses_adapter = adapt and evaluator.dataset_adapter is not None
    if scored and not truths and not uses_adapter and _mentions_ground_truth(evaluator):
        warnings.append(
            f"ground_truth is absent in every row, and {evaluator.name} reads it: name the data "
            "set's column of right answers ground_truth, and sample again"
        )
    if scored > 1 and lowest == highest:
        warnings.append(f"all {scored} rewards are {lowest:g}: nothing can be learned from them")
    return ScoreSummary(
        output=target,
        column=column,
        graded=graded,
        rows=len(rows),
        completions=completions,
        scored=scored,
        mean=total / scored if scored else None,
        unscored=unscored,
        remarks=remarks,
        failed=failed,
        warnings=tuple(warnings),
    )


def _present(values: pa.ChunkedArray) -> int:
    """How many are there; JSON text may say null."""
    count = len(values) - values.null_count
    if pa.types.is_string(values.type):
        count -= pc.sum(pc.equal(values, "null"), min_count=0).as_py()
    return int(count)


def _mentions_ground_truth(evaluator: LoadedEvaluator) -> bool:
    file = inspect.getsourcefile(inspect.unwrap(evaluator.function))
    return file is not None and "ground_truth" in Path(file).read_text(errors="replace")


def score(
    path: str | os.PathLike[str],
    evaluator: str,
    *,
    output: Annotated[
        str | os.PathLike[str] | None, Flag("-o", unset="the rollout file is replaced")
    ] = None,
    name: Annotated[str | None, Flag(unset="reward")] = None,
    evaluator_args: Annotated[Mapping[str, Any] | None, Flag()] = None,
    workers: Annotated[int | None, Ge(1), Flag(unset="processors; async evaluators: 1")] = None,
    timeout: Annotated[float | None, Ge(0), Flag()] = 60.0,
    max_concurrency: Annotated[int, Ge(1), Flag("--concurrency", only=True)] = 96,
    retry_unscored: Annotated[bool, Flag()] = False,
    overwrite: Annotated[bool, Flag()] = False,
    adapt: Annotated[bool, Flag("--no-adapter", only=True)] = True,
    engine: Annotated[Engine, Flag()] = "local",
    ray_address: Annotated[str | None, Flag(unset=RAY_ADDRESS)] = None,
    progress: bool | None = None,
) -> ScoreSummary:
    """Grade every completion of a file.

    Args:
        path: a finished rollout file, also compressed JSON lines or a URL.
        evaluator: `tests/test_x.py::test_x`, under `@evaluation_test` or plain, or
            `package.module:function`; it takes `row` (or `rows`) and returns the row, an
            `EvaluateResult` or a number. Or a reward function of Eval Protocol
            (`eval_protocol.rewards.math:math_reward`), verl (`compute_score`) or TRL, by its
            parameters.
        output: a new file.
        name: column reward_NAME, beside other rewards.
        evaluator_args: further arguments of the evaluator.
        workers: worker processes; with Ray, on each of its nodes.
        timeout: seconds for one completion; 0: any time.
        max_concurrency: calls in flight of an async evaluator.
        retry_unscored: grade again what got no reward.
        overwrite: grade all anew, replacing rewards or the output.
        adapt: use the evaluation test's dataset_adapter on the columns, for what the evaluator
            finds on its row besides the messages.
        engine: with ray, grade on every node of a Ray cluster.
        ray_address: HOST:PORT of the cluster, or auto.
        progress: show a bar; None: where stderr is a terminal.

    Raises:
        FormatError, JobError: the file cannot be read, scored so, or written.
        EvaluatorNotFoundError, EvaluatorError: the evaluator cannot be had or used.
        ScoringError: a worker process cannot load it.
        RayEngineError: there is no Ray, no cluster, or a node of it cannot do its work.
        BusyError: another process scores into the same column.
        OSError: the disk is full or failed. What was graded is safe.
    """
    check_engine(engine)
    check_arguments(score, locals())
    timeout = timeout or None
    dataset = RolloutDataset(path)
    if not dataset.finished:
        raise JobError(
            f"{dataset.where}: the job that writes it is not finished: run it to its end first"
        )
    if output is None and dataset.is_copy:
        raise JobError(f"{dataset.where} is only read: name a new file for the output (-o)")
    target = dataset.path if output is None else files.output_path(output)
    loaded = executors.load_evaluator(executors.with_arguments(evaluator, evaluator_args))
    _check_columns(dataset, loaded)
    column = reward_column(name)
    folders = [parts_folder(target), parts_folder(target, column)]
    files.check_rollout_file(target, folders=folders)
    if target.exists() and not target.samefile(dataset.path) and not overwrite:
        raise JobError(f"{target}: exists; choose another output, or overwrite it")
    if is_jsonl(target) == is_jsonl(dataset.path):
        files.check_room(target, dataset.path.stat().st_size)
    with _alone(target):
        if not dataset.is_copy:
            # Again: whoever had it until now may have changed it.
            dataset = RolloutDataset(path)
        settings = RewardSettings(
            evaluator=loaded.name, fingerprint=loaded.fingerprint, code=dict(loaded.code)
        )
        keep = _keeps_old(dataset, column, settings, overwrite=overwrite)
        index = score_file.FileIndex(dataset, column, keep=keep, retry_unscored=retry_unscored)
        job_id = _job_id(dataset.path, column, settings, adapt=adapt)
        schema = score_file.SCORES.with_metadata({"job": job_id})
        folder = parts_folder(target, column)
        known = read_schema(folder)
        stale = known is not None and known.metadata != schema.metadata
        with contextlib.closing(JobStore(folder, schema, index.places, anew=stale)) as store:
            for places, _ in store.stored():
                index.stored(places)
            items = score_file.grading_items(dataset, loaded, index.wanted, adapt=adapt)
            grader = executors.score_items
            if engine == "ray":
                grader = functools.partial(executors.score_items_on_ray, address=ray_address)
            grading = grader(
                items, loaded, workers=workers, timeout=timeout, max_concurrency=max_concurrency
            )
            with (
                reporter("score", int(index.wanted.sum()), show=progress) as bar,
                contextlib.closing(grading) as results,
            ):
                graded = score_file.store_scores(
                    results, store, on_stored=lambda count: bar.update(count, detail="")
                )
            if _job_id(dataset.path, column, settings, adapt=adapt) != job_id:
                raise JobError(f"{dataset.where} was changed while it was scored: score it again")
            if len(store) or target != dataset.path or column not in dataset.metadata.rewards:
                wanted = score_file.schema_with_reward(dataset.schema, column, settings)
                tables = score_file.with_scores(
                    dataset, store, wanted, column, places=index.places, keep=keep
                )
                files.write_file(target, wanted, tables)
            store.remove()
    return summarize_rewards(target, column, graded, loaded, adapt=adapt)


def _check_columns(dataset: RolloutDataset, evaluator: LoadedEvaluator) -> None:
    """See that the data set has what a reward function has no default for; of rows of Eval Protocol
    the calls find that out."""
    names = [name for name in dataset.schema.names if name.startswith(ORIGINAL_PREFIX)]
    columns = [name.removeprefix(ORIGINAL_PREFIX) for name in names]
    needed = scoring.columns_needed(evaluator.function)
    missing = [name for name in needed if name not in (*columns, *evaluator.kwargs)]
    if missing and (columns or dataset.metadata.data is not None):
        raise JobError(
            f"{evaluator.name} has parameters without a default that no column of the data set is: "
            f"{', '.join(missing)}. The columns are {', '.join(columns) or 'none'}. Give them as "
            "--evaluator-args (evaluator_args=), or sample from a data set that has them"
        )


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep others off `target` while it is scored: a second scoring, or the job that samples it,
    would write the file without what the first one put there.

    Raises:
        BusyError: another process has it.
        JobError: a job that samples it is not finished.
    """
    folder = parts_folder(target)
    if read_schema(folder) is not None:
        raise JobError(f"{target}: the job that writes it is not finished: run it to its end")
    try:
        lock = lock_folder(folder)
    except BusyError:
        raise BusyError(
            f"{target}: another process samples or scores it; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / "_lock").unlink()
            folder.rmdir()
        lock.release()


def _keeps_old(
    dataset: RolloutDataset, column: str, settings: RewardSettings, *, overwrite: bool
) -> bool:
    """Whether rewards that are in the column stay: they are of the same evaluator."""
    known = dataset.metadata.rewards.get(column)
    if overwrite:
        return False
    if known is not None:
        why = known.evaluator
        if known.evaluator == settings.evaluator:
            changed = _changed_files(known, settings)
            if not changed:
                return True
            why = f"an earlier version of its file (changed: {', '.join(changed)})"
        raise JobError(
            f"{dataset.where}: {column!r} has rewards of {why}. Choose a name (--name) to keep "
            "both, or replace them with --overwrite"
        )
    return False


def _changed_files(known: RewardSettings, settings: RewardSettings) -> list[str]:
    """Files in which there is another version of what the rewards depend on."""
    if known.code:
        both = {*known.code, *settings.code}
        return sorted(name for name in both if known.code.get(name) != settings.code.get(name))
    return [] if known.fingerprint == settings.fingerprint else [settings.evaluator]


def _job_id(path: Path, column: str, settings: RewardSettings, *, adapt: bool) -> bytes:
    """Tells whether rewards that an interrupted call left are of the same file and evaluator."""
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    asked = f"{content}\0{column}\0{adapt}\0".encode()
    if settings.code:  # what else is in the file does not matter
        settings = msgspec.structs.replace(settings, fingerprint="")
    return hashlib.sha256(asked + msgspec.json.encode(settings)).hexdigest().encode()
