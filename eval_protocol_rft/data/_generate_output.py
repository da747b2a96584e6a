"""The output of a job: finding out what is there of it, adding to it, and finishing it.

Invariant: an output of another job (see `_job_settings`) is refused, with what differs, unless it
may be replaced; and then only when the new one is complete.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, check_room, write_file
from eval_protocol_rft.data._format import FormatError
from eval_protocol_rft.data._job_settings import (
    is_same,
    job_schema,
    n_of,
    refuse_foreign_columns,
    same_job,
)
from eval_protocol_rft.data._job_store import JobStore
from eval_protocol_rft.data._questions import Questions
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import RolloutRequest
from eval_protocol_rft.sampling import TokenIds

logger = logging.getLogger(__name__)
_COMPARED_ROWS = 16
"""Data rows whose prompts are rendered again when a job goes on."""


FailedFor = tuple[str | None, int | None]
"""`error_kind` and `error_status` of a completion."""
_REASON = ["error_kind", "error_status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputJob:
    """A job and where its rows go. Made by `find_job`."""

    target: Path
    schema: pa.Schema
    questions: Questions
    request: RolloutRequest
    """With the seed of the job."""
    tokenizer: LoadedTokenizer
    base: RolloutDataset | None
    """The job's finished file, where there is one."""
    anew: bool
    """Parts that are there are another job's, and may go."""
    version: tuple[int, ...] | None
    """Of the file at `target` when it was looked at; None: there was none."""

    @property
    def total(self) -> int:
        """Completions asked for."""
        return self.questions.count * self.request.n

    @property
    def episodes(self) -> file_format.EpisodeSettings | None:
        """What its completions are like where they are episodes."""
        return file_format.metadata_of(self.schema).episodes

    @property
    def is_scored(self) -> bool:
        """Whether the rewards of the file that is there are an evaluator's."""
        return "reward" in file_format.metadata_of(self.schema).rewards

    @property
    def data_name(self) -> str:
        """What the data set was called when the job began: row ids are made of it."""
        data = file_format.metadata_of(self.schema).data
        return self.questions.source.name if data is None else data.name

    @contextlib.contextmanager
    def open(self) -> Iterator[Output]:
        """Take hold of the output.

        Raises:
            BusyError: another process has it.
            JobError: another process just finished the file;
            the disk has no room for the file.
        """
        keys_of = functools.partial(job_store.row_keys, position=self._position())
        store = JobStore(job_store.parts_folder(self.target), self.schema, keys_of, anew=self.anew)
        try:
            if _version(self.target) != self.version:
                raise JobError(f"{self.target} was written just now: run the same command again")
            replaced = 0 if self.base is None else self.target.stat().st_size
            check_room(self.target, replaced + store.loose[1] + store.packed[1])
            done = self._finished()
            for stored in store.stored():
                done.add(*stored)
            yield Output(self, store, done)
        finally:
            store.close()

    def is_finished(self, *, retry_failed: bool) -> bool:
        """Whether the finished file has all that is asked for: nothing is to be sampled."""
        done = self._finished()
        return done.done + (0 if retry_failed else done.failed) == self.total

    def _finished(self) -> DoneIndex:
        """What the finished file has."""
        position = self._position()
        done = DoneIndex(self.questions.data.num_rows, self.request.n, position)
        if self.base is not None:
            for table in self.base.tables([*job_store.KEY_COLUMNS, "error"]):
                keys = job_store.row_keys(table, position=position)
                done.add(keys, job_store.failed_rows(table))
        return done

    def _position(self) -> job_store.Keys | None:
        """Where each row of the data set stands, if they are shuffled."""
        data = self.questions.data
        if data.shuffle_seed is None:
            return None
        order = np.random.default_rng(data.shuffle_seed).permutation(data.num_rows)
        position = np.empty(data.num_rows, np.int64)
        position[order] = np.arange(data.num_rows)
        return position


@dataclass(frozen=True, slots=True)
class Output:
    """An output that this process holds."""

    job: OutputJob
    store: JobStore
    done: DoneIndex
    """What was there when it was opened."""

    def warn_of_other_prompts(self) -> None:
        """Say where the first data rows that are stored render to other prompts now."""
        job, stored = self.job, self._first_prompts()
        changed = job.questions.rendered_otherwise(stored, job.tokenizer, job.request)
        if changed:
            logger.warning(
                "%s: the job goes on, and %d of the first %d data rows render to another prompt "
                "than before (data row %d first): their chat template says the date or time, or "
                "the tokenizer was changed. Each completion keeps the prompt ids that it was "
                "sampled behind; for one prompt throughout, begin a new output",
                job.target,
                len(changed),
                len(stored),
                changed[0],
            )

    def _first_prompts(self) -> dict[int, TokenIds]:
        """Their prompt ids, by `data_idx`."""
        prompts: dict[int, TokenIds] = {}
        table = next(self._rows(), None) if self.done.done else None
        if table is not None:
            columns = (table.column(name) for name in ("data_idx", "prompt_ids"))
            for number, ids in zip(*columns, strict=True):
                if ids.is_valid and len(prompts) < _COMPARED_ROWS:
                    prompts.setdefault(number.as_py(), TokenIds(ids.as_py()))
        return prompts

    def finish(self) -> Counter[FailedFor]:
        """Make the file of what is stored, and return why completions of it failed: how many for
        each kind and HTTP status."""
        job = self.job
        for stored in self.store.stored():
            self.done.add(*stored)
        if self.done.done + self.done.failed != job.total:
            raise AssertionError("a completion is neither stored nor failed")
        if len(self.store):
            write_file(job.target, job.schema, self._rows())
        self.store.remove()
        reasons: Counter[FailedFor] = Counter()
        if self.done.failed:
            for table in RolloutDataset(job.target).tables(["error", *_REASON]):
                failed = table.filter(table.column("error").is_valid()).select(_REASON)
                reasons.update(tuple(row.values()) for row in failed.to_pylist())
        return reasons

    def _rows(self) -> Iterator[pa.Table]:
        """All rows that are there, in the order of the file."""
        return self.store.merged(() if self.job.base is None else self.job.base.tables())


def find_job(
    target: Path,
    questions: Questions,
    request: RolloutRequest,
    tokenizer: LoadedTokenizer,
    *,
    dtype: str | None,
    n_given: bool,
    seed: int | None,
    overwrite: bool,
    episodes: file_format.EpisodeSettings | None,
) -> OutputJob:
    """What is there of the job.

    Args:
        target: where the file is to be.
        questions: what is asked.
        request: how it is sampled. Without a seed, that of the job which is there is taken.
        tokenizer: what rendered the prompts.
        dtype: what the model computes in, where that is known.
        n_given: whether the user gave n; else that of the job which is there is taken.
        seed: drawn for a new job that has none; None where it needs none.
        overwrite: let the job take the place of another.
        episodes: what its completions are like where they are episodes.

    Raises:
        JobError: there is another job, or something else.
    """
    version = _version(target)
    folder = job_store.parts_folder(target)
    parts, finished = job_store.read_schema(folder), None
    if target.exists():
        try:
            finished = RolloutDataset(target)
        except FormatError as error:
            if not overwrite:
                raise JobError(f"{error}. Choose another output, or --overwrite") from error
    known = None if finished is None else finished.schema
    given = request.seed is not None

    def asked_with(n: int) -> pa.Schema:
        wanted = replace(request, n=n)
        return job_schema(
            questions, wanted, tokenizer, dtype=dtype, seed_given=given, episodes=episodes
        )

    if not n_given:
        like_it = (n for s in (parts, known) if (n := n_of(s)) and is_same(s, asked_with(n)))
        request = replace(request, n=max(like_it, default=request.n))
    asked = asked_with(request.n)
    begun = same_job(folder, parts, asked, overwrite=overwrite)
    base = same_job(target, known, asked, overwrite=overwrite)
    if base is not None:
        refuse_foreign_columns(target, base, asked)
    there = begun if base is None else base
    if there is not None:
        sampling = file_format.metadata_of(there).sampling
        assert sampling is not None  # noqa: S101 - differences() compared it
        request = replace(request, seed=sampling.seed)
    elif seed is not None and not given:
        request = replace(request, seed=seed)
        asked = job_schema(
            questions, request, tokenizer, dtype=dtype, seed_given=False, episodes=episodes
        )
    return OutputJob(
        target=target,
        schema=asked if there is None else there,
        questions=questions,
        request=request,
        tokenizer=tokenizer,
        base=None if base is None else finished,
        anew=begun is None,
        version=version,
    )


def _version(path: Path) -> tuple[int, ...] | None:
    """Changes when the file is replaced."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


_MISSING, _DONE, _FAILED = 0, 1, 2


class DoneIndex:
    """Which completions a job has: one byte for each, whatever they hold.

    Args:
        num_rows: of the data set.
        n: completions per row.
        position: `data_idx` -> place in the run; None where that is `data_idx` itself.
    """

    def __init__(self, num_rows: int, n: int, position: job_store.Keys | None = None) -> None:
        self._states = np.zeros((num_rows, n), np.uint8)
        self._position = position

    def add(self, keys: job_store.Keys, failed: NDArray[np.bool_]) -> None:
        """Take up rows that are stored, by their `row_keys`; later ones count."""
        self._states[job_store.split_keys(keys)] = np.where(failed, _FAILED, _DONE)

    def missing(self, data_idx: int, *, retry_failed: bool) -> list[int]:
        """The `sample_idx` that are to be sampled."""
        place = data_idx if self._position is None else self._position[data_idx]
        states = self._states[place]
        wanted = states != _DONE if retry_failed else states == _MISSING
        return [int(i) for i in np.flatnonzero(wanted)]

    @property
    def done(self) -> int:
        """Completions that are there."""
        return int(np.count_nonzero(self._states == _DONE))

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(self._states == _FAILED))
