"""`score`: rewards for completions that are there, as often as graders change.

Invariant: tokens stay as they are. A completion gets a reward, or None with the reason why, never a
0 in its place; what was graded is on disk at once, and an interrupted call goes on from there. The
file is replaced in one step, when all of it is graded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft.batch.dataset import RolloutDataset
from eval_protocol_rft.batch.evaluators import LoadedEvaluator, load_evaluator
from eval_protocol_rft.batch.file_index import FileIndex
from eval_protocol_rft.batch.files import OutputError, check_output, write_file
from eval_protocol_rft.batch.format import RewardSettings, reward_column, reward_columns
from eval_protocol_rft.batch.grading import Graded, GradingItem, grade
from eval_protocol_rft.batch.parts import PartStore, read_schema
from eval_protocol_rft.batch.progress import reporter
from eval_protocol_rft.batch.reward_files import SCORES, schema_with_reward, with_scores
from eval_protocol_rft.batch.views import Place, ScoreError, grading_items
from eval_protocol_rft.record import CompletionResult

_STORED_AT_ONCE = 256
_HELD_SECONDS = 1.0
_END_BYTES = 1 << 20
Result = tuple[Place, CompletionResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What a call of `score` did, and what the column holds now."""

    output: Path
    column: str
    graded: int
    """Completions graded by this call."""
    scored: int
    """Completions with a reward."""
    mean: float | None
    """Of the rewards."""
    unscored: Counter[str] = field(default_factory=Counter)
    """Why a completion has none -> how many."""
    failed: int = 0
    """Completions that could not be sampled, so there is nothing to grade."""


def score(
    path: str | os.PathLike[str],
    evaluator: str,
    *,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    workers: int | None = None,
    timeout: float | None = 60.0,
    max_concurrency: int = 96,
    retry_unscored: bool = False,
    overwrite: bool = False,
    adapt: bool = True,
    progress: bool | None = None,
) -> ScoreSummary:
    """Grade every completion of a file.

    Args:
        path: a finished rollout file.
        evaluator: `tests/test_x.py::test_x`, under `@evaluation_test` or plain, or
            `package.module:function`; it takes `row` (or `rows`) and returns the row, an
            `EvaluateResult` or a number.
        output: a new file; default: `path` is replaced.
        name: keeps the rewards in columns of their own, `reward_<name>`; default the main ones.
        workers, timeout, max_concurrency: see `grade`.
        retry_unscored: grade again what got no reward from this evaluator.
        overwrite: let the rewards take the place of another evaluator's, or the output of a file.
        adapt: pass the data set's columns through the `dataset_adapter` of the evaluation test, for
            what the evaluator finds on its row besides the messages.
        progress: show a bar; None: where stderr is a terminal.

    Raises:
        FormatError, ScoreError, OutputError: the file cannot be read, scored so, or written.
        EvaluatorNotFoundError, EvaluatorError: the evaluator cannot be had or used.
        GradingError: a worker process cannot load it.
        BusyError: another process scores into the same column.
        OSError: the disk is full or failed. What was graded is safe.
    """
    dataset = RolloutDataset(path)
    if not dataset.finished:
        raise ScoreError(f"{path}: the job that writes it is not finished: run it to its end first")
    loaded = load_evaluator(evaluator)
    column = reward_column(name)
    target = dataset.path if output is None else Path(output)
    check_output(target)
    if target.exists() and not target.samefile(dataset.path) and not overwrite:
        raise OutputError(f"{target}: exists; choose another output, or overwrite it")
    settings = RewardSettings(evaluator=loaded.name, fingerprint=loaded.fingerprint)
    keep = _keeps_old(dataset, column, settings, overwrite=overwrite)
    index = FileIndex.of(dataset, column, keep=keep, retry_unscored=retry_unscored)
    schema = SCORES.with_metadata({"job": _job_id(dataset.path, column, settings)})
    folder = target.with_name(f"{target.name}.{column}.parts")
    known = read_schema(folder)
    stale = known is not None and known.metadata != schema.metadata
    with contextlib.closing(PartStore(folder, schema, index.places, anew=stale)) as store:
        for data_idx, sample_idx, _ in store.stored():
            index.stored(data_idx, sample_idx)
        items = grading_items(dataset, loaded, index.wanted, adapt=adapt)
        graded = _grade_missing(
            items,
            loaded,
            int(index.wanted.sum()),
            store,
            workers=workers,
            timeout=timeout,
            max_concurrency=max_concurrency,
            progress=progress,
        )
        if store.has_parts or target != dataset.path or column not in dataset.metadata.rewards:
            wanted = schema_with_reward(dataset.schema, column, settings)
            tables = with_scores(
                dataset.tables(), store.merged(), wanted, column, places=index.places, keep=keep
            )
            write_file(target, wanted, tables)
        store.remove()
    return _summary(target, column, graded)


def _grade_missing(
    items: Iterable[GradingItem],
    loaded: LoadedEvaluator,
    total: int,
    store: PartStore,
    *,
    workers: int | None,
    timeout: float | None,
    max_concurrency: int,
    progress: bool | None,
) -> int:
    """Grade what is wanted, and store it as it comes."""
    done = 0
    with (
        reporter("score", total, show=progress) as bar,
        contextlib.closing(
            grade(items, loaded, workers=workers, timeout=timeout, max_concurrency=max_concurrency)
        ) as results,
    ):
        for batch in _batches(results):
            store.append(batch)
            done += batch.num_rows
            bar.update(done, detail="")
    return done


def _batches(results: Iterable[Graded]) -> Iterator[pa.RecordBatch]:
    """Results as rows of `SCORES`, not held back for long: a judge may take seconds for each."""
    held: list[Result] = []
    began = time.monotonic()
    for graded in results:
        held += zip(graded.key, graded.results, strict=True)
        if len(held) >= _STORED_AT_ONCE or time.monotonic() - began > _HELD_SECONDS:
            yield _batch(held)
            held, began = [], time.monotonic()
    if held:
        yield _batch(held)


def _batch(results: Sequence[Result]) -> pa.RecordBatch:
    said = [result for _, result in results]
    metrics = [msgspec.json.encode(r.metrics).decode() if r.metrics else None for r in said]
    columns = [
        [place[0] for place, _ in results],
        [place[1] for place, _ in results],
        [result.score for result in said],
        [result.reason for result in said],
        metrics,
        [result.error for result in said],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCORES)


def _keeps_old(
    dataset: RolloutDataset, column: str, settings: RewardSettings, *, overwrite: bool
) -> bool:
    """Whether rewards that are in the column stay: they are of the same evaluator."""
    known = dataset.metadata.rewards.get(column)
    if known == settings:
        return True
    if known is not None and not overwrite:
        changed = known.evaluator == settings.evaluator
        why = "an earlier version of its file" if changed else known.evaluator
        raise ScoreError(
            f"{dataset.path}: {column!r} has rewards of {why}. Choose a name (--name) to keep "
            "both, or replace them with --overwrite"
        )
    return False


def _job_id(path: Path, column: str, settings: RewardSettings) -> bytes:
    """Tells whether rewards that an interrupted call left are of the same file and evaluator."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\0{column}\0".encode() + msgspec.json.encode(settings))
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read())
    return digest.hexdigest().encode()


def _summary(target: Path, column: str, graded: int) -> ScoreSummary:
    """What the column holds."""
    dataset = RolloutDataset(target)
    error_column = reward_columns(column)[3]
    scored, failed, total = 0, 0, 0.0
    unscored: Counter[str] = Counter()
    for table in dataset.tables([column, error_column, "error"]):
        rewards = table.column(column)
        scored += len(rewards) - rewards.null_count
        total += float(pc.sum(rewards, min_count=0).as_py())
        failed += len(table) - table.column("error").null_count
        unscored.update(why for why in table.column(error_column).to_pylist() if why)
    return ScoreSummary(
        output=target,
        column=column,
        graded=graded,
        scored=scored,
        mean=total / scored if scored else None,
        unscored=unscored,
        failed=failed,
    )
