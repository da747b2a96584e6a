"""The output of a job: what it was asked to do, finding out what is there of it, adding to it, and
finishing it.

Invariant: whatever changes what is sampled is in the metadata, so a job is continued only with the
same data, model and parameters; what does not (concurrency, timeouts, the server's address) is not.
An output of another job is refused, with what differs, unless it may be replaced; and then only
when the new one is complete.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _job_store as job_store
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._files import JobError, check_room, write_file
from eval_protocol_rft.data._format import FileMetadata, FormatError
from eval_protocol_rft.data._job_store import JobStore
from eval_protocol_rft.data._questions import Questions
from eval_protocol_rft.data.source._columns import SourceColumn
from eval_protocol_rft.data.source._urls import SourceError
from eval_protocol_rft.local import LoadedTokenizer, models
from eval_protocol_rft.rollout import RolloutRequest, redact_params
from eval_protocol_rft.sampling import TokenIds, support_truncated

logger = logging.getLogger(__name__)
_FREE_TO_CHANGE = frozenset(
    {
        "data.name",
        "sampling.seed_given",
        "sampling.split_reasoning",  # follows from `raw`
        "schema_version",
        "package_version",
        "rewards",
    }
)
"""What two jobs may differ in and still be one."""


def job_schema(
    questions: Questions,
    request: RolloutRequest,
    tokenizer: LoadedTokenizer,
    *,
    seed_given: bool,
    episodes: file_format.EpisodeSettings | None,
) -> pa.Schema:
    """Schema and metadata of the file that the job writes.

    Raises:
        SourceError: a column cannot be stored under its name.
    """
    source, data = questions.source, questions.data
    columns = {column.name: column for column in source.columns}
    truth = columns.get(data.ground_truth_key or "")
    json_columns = [file_format.ORIGINAL_PREFIX + c.name for c in source.columns if c.is_json]
    if truth is not None and truth.is_json:
        json_columns.append("ground_truth")
    params = request.params
    metadata = FileMetadata(
        prompt_kind=questions.asked_kind,
        sampling=file_format.SamplingSettings(
            model=params.model,
            model_fingerprint=model_fingerprint(params.model),
            tokenizer=tokenizer.name,
            chat_template_hash=None if request.raw else tokenizer.chat_template_hash,
            raw=request.raw,
            add_special_tokens=request.add_special_tokens,
            split_reasoning=not request.raw,
            chat_template_kwargs=redact_params(request.chat_template_kwargs),
            system=questions.system,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            stop=list(params.stop),
            n=request.n,
            seed=request.seed,
            seed_given=seed_given,
            support_truncated=support_truncated(params),
            other=redact_params(params.extra),
        ),
        data=data,
        episodes=episodes,
        json_columns=json_columns,
    )
    _check_names(source.columns)
    types = {column.name: column.type for column in source.columns}
    return file_format.schema(
        metadata,
        types,
        ground_truth=None if truth is None else truth.type,
        episodes=episodes is not None,
    )


def differences(known: FileMetadata, asked: FileMetadata) -> list[str]:
    """What two jobs differ in, as `temperature: 1.0 there, 0.7 asked for`. A seed that nobody gave
    makes no difference."""
    there, here = (_flat(msgspec.to_builtins(metadata)) for metadata in (known, asked))
    free = set(_FREE_TO_CHANGE)
    if not there.get("sampling.seed_given") and not here.get("sampling.seed_given"):
        free.add("sampling.seed")
    return [
        _difference(name, there.get(name), here.get(name))
        for name in dict.fromkeys([*there, *here])
        if name not in free and there.get(name) != here.get(name)
    ]


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "episodes.code" and there and here:
        changed = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        return f"the environment is an earlier version of it (changed: {', '.join(changed)})"
    return f"{name.removeprefix('sampling.')}: {there!r} there, {here!r} asked for"


def model_fingerprint(model: str) -> str | None:
    """Tells the weights of a local folder apart; None for a model behind a server or a hub id."""
    folder = models.folder_here(model)  # None too: of a sampler of the caller's, under any name
    return None if folder is None else models.model_folder_fingerprint(folder)


def _check_names(columns: tuple[SourceColumn, ...]) -> None:
    seen = [column.name for column in columns]
    double = {name for name in seen if seen.count(name) > 1}
    if double:
        raise SourceError(f"the data set has two columns called {min(double)!r}: rename one")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if prefix == "" and isinstance(value, Mapping) and key not in _FREE_TO_CHANGE:
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


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
        data = self.questions.data
        num_rows = data.num_rows
        position: job_store.Keys | None = None
        if data.shuffle_seed is not None:
            order = np.random.default_rng(data.shuffle_seed).permutation(num_rows)
            position = np.empty(num_rows, np.int64)
            position[order] = np.arange(num_rows)
        keys_of = functools.partial(job_store.row_keys, position=position)
        store = JobStore(job_store.parts_folder(self.target), self.schema, keys_of, anew=self.anew)
        try:
            if _version(self.target) != self.version:
                raise JobError(f"{self.target} was written just now: run the same command again")
            replaced = 0 if self.base is None else self.target.stat().st_size
            check_room(self.target, replaced + store.loose[1] + store.packed[1])
            done = DoneIndex(num_rows, self.request.n, position)
            if self.base is not None:
                for table in self.base.tables([*job_store.KEY_COLUMNS, "error"]):
                    done.add(keys_of(table), job_store.failed_rows(table))
            for stored in store.stored():
                done.add(*stored)
            yield Output(self, store, done)
        finally:
            store.close()


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
        seed: drawn for a new job that has none; None where it needs none.
        overwrite: let the job take the place of another.
        episodes: what its completions are like where they are episodes.

    Raises:
        JobError: there is another job, or something else.
    """
    version = _version(target)
    given = request.seed is not None
    asked = job_schema(questions, request, tokenizer, seed_given=given, episodes=episodes)
    folder = job_store.parts_folder(target)
    begun = _same_job(folder, job_store.read_schema(folder), asked, overwrite=overwrite)
    finished = None
    if target.exists():
        try:
            finished = RolloutDataset(target)
        except FormatError as error:
            if not overwrite:
                raise JobError(f"{error}. Choose another output, or --overwrite") from error
    known = None if finished is None else finished.schema
    base = _same_job(target, known, asked, overwrite=overwrite)
    if base is not None:
        _refuse_foreign_columns(target, base, asked)
    there = begun if base is None else base
    if there is not None:
        sampling = file_format.metadata_of(there).sampling
        assert sampling is not None  # noqa: S101 - differences() compared it
        request = replace(request, seed=sampling.seed)
    elif seed is not None and not given:
        request = replace(request, seed=seed)
        asked = job_schema(questions, request, tokenizer, seed_given=False, episodes=episodes)
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


def _refuse_foreign_columns(target: Path, known: pa.Schema, asked: pa.Schema) -> None:
    rewards = file_format.metadata_of(known).rewards
    ours = {
        *asked.names,
        *(name for column in rewards for name in file_format.reward_columns(column)),
    }
    foreign = [name for name in known.names if name not in ours]
    if foreign:
        raise JobError(
            f"{target} has columns that this job does not write: {', '.join(foreign)}. Move the "
            "file elsewhere to keep them, or take them out to continue it"
        )


def _same_job(
    where: Path, known: pa.Schema | None, asked: pa.Schema, *, overwrite: bool
) -> pa.Schema | None:
    """`known` where it is of the job that is asked for."""
    if known is None:
        return None
    differ = differences(
        file_format.metadata_of(known, where=str(where)), file_format.metadata_of(asked)
    )
    if not differ:
        return known
    if overwrite:
        return None
    raise JobError(
        f"{where} is of another job. {'; '.join(differ)}. Ask for the same to continue it, choose "
        "another output, or replace it with --overwrite"
    )


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
