"""Rows of Eval Protocol, one JSON a line: read and written.

Invariant: a line is a row or an error that names file and line; none is skipped but blank ones. A
file is read twice: first every row whole, to see what its rollout file has to be like, so that the
second reading fails at nothing but its storage. A row whose rollout failed stops the conversion,
unless it is to be dropped; then it is counted. What a row becomes, and back, says `_to_ep`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from eval_protocol_rft._durable import replacing
from eval_protocol_rft.data import _format as file_format
from eval_protocol_rft.data import _from_ep as from_ep
from eval_protocol_rft.data._files import JobError
from eval_protocol_rft.data._format import CompletionRow, FileMetadata
from eval_protocol_rft.data._plain_file import NonFinite, Rollouts, Written, split_note, text_notes
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._records import by_prompt
from eval_protocol_rft.data._row_groups import tables_of
from eval_protocol_rft.data._to_ep import FilePart, to_rows
from eval_protocol_rft.data.source._text_files import column_of, see
from eval_protocol_rft.record import RecordError, has_record, is_marked
from eval_protocol_rft.rollout import RemoteRows
from eval_protocol_rft.training import TrainingDataError, row_key


def read_rows(*paths: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of one file after the other, as dicts for `build_batch` and `iter_batches`.

    Args:
        paths: files of `EvaluationRow`s, one a line: `<experiment id>.jsonl` in the folder
            `experiment_results`, or what `EP_OUTPUT_DIR` got.

    Raises:
        TrainingDataError: a line is no JSON object of a row. NaN and infinity are no JSON.
        OSError: a file cannot be read.
    """
    for path in paths:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield _read_line(line, f"{path}, line {number}")


_DECODER = msgspec.json.Decoder(dict[str, Any])


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingDataError(f"{where}: {error}") from error
    if "execution_metadata" not in row:
        raise TrainingDataError(
            f"{where}: no row of Eval Protocol, it has no execution_metadata (but "
            f"{', '.join(list(row)[:8]) or 'nothing'})"
        )
    _check_shape(row, where)
    return row


def _check_shape(row: dict[str, Any], where: str) -> None:
    """Refuse what is no object where Eval Protocol's rows have one."""
    for name in ("input_metadata", "execution_metadata", "rollout_status", "evaluation_result"):
        _check_object(row.get(name), name, where)
    metadata = row["execution_metadata"] or {}
    _check_object(metadata.get("extra"), "execution_metadata.extra", where)
    messages = row.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise TrainingDataError(f"{where}: messages is no list of objects")


def _check_object(value: Any, name: str, where: str) -> None:
    if value is not None and not isinstance(value, dict):
        raise TrainingDataError(f"{where}: {name} is {type(value).__name__}, not an object")


_HOW_SAMPLED = frozenset(file_format.SamplingSettings.__struct_fields__)


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, from 0.

    Raises:
        TrainingDataError: a line is no row; the message names it.
    """
    return enumerate(read_rows(path))


def rows_in_order(path: Path, order: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`numbered_rows` of these numbers, in this order; in memory is one row."""
    with path.open("rb") as lines:
        starts, at = [], 0
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                starts.append((at, number))
            at += len(line)
        for index in order:
            at, number = starts[index]
            lines.seek(at)
            yield index, _read_line(lines.readline(), f"{path}, line {number}")


def line_of(path: Path, index: int) -> int:
    """Number, from 1, of the line that row `index` stands in: there may be blank ones."""
    with path.open("rb") as lines:
        filled = (number for number, line in enumerate(lines, 1) if not line.isspace())
        return next(number for i, number in enumerate(filled) if i == index)


@dataclass(slots=True)
class EpScan:
    """What all rows together say. `add` every row, then read it."""

    path: Path
    drop_failed_rows: bool
    remote: RemoteRows = field(default_factory=RemoteRows)
    """Gives a record to rows that Eval Protocol's remote processors brought back."""
    num_rows: int = 0
    dropped: set[int] = field(default_factory=set)
    """Numbers of the rows whose rollout failed."""
    continued: dict[int, int] = field(default_factory=dict)
    """Of rows that are more of an earlier row's data row, the number of its first row: other runs
    of it; and `to_rows` makes several of one whose completions have different prompts."""
    firsts: dict[int, int] = field(default_factory=dict)
    """Of further runs of a data row, the `sample_idx` of their first completion."""
    _runs: dict[bytes, list[int]] = field(default_factory=dict)
    """Digest of what runs of a data row have in common -> number of the first one's row, and the
    completions asked for so far."""
    _parts: list[int] = field(default_factory=list)
    """`data_idx` of the data rows that came from a rollout file."""
    _last: tuple[Any, ...] = ()
    """What names the data row of the last row, where it came from a rollout file."""
    _head: int = 0
    """Number of its first row."""
    _places: set[int] = field(default_factory=set)
    """`sample_idx` of its completions so far."""
    _file_wide: FileMetadata | None = None
    one_file: bool = True
    """Whether the rows say alike which rollout file they came from, or that from none."""
    _rewards: dict[str, file_format.RewardSettings] = field(default_factory=dict)
    _mixed_rewards: set[str] = field(default_factory=set)
    _sampling: file_format.SamplingSettings | None = None
    _one_sampling: bool = True
    _episodes: bool = False
    """Whether some completions are episodes."""
    _kinds: dict[str, set[type]] = field(default_factory=dict)
    """Column of the data set, or `ground_truth` -> kinds of its values."""

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Take row `index` into account.

        Raises:
            JobError: it is broken, or its rollout failed and is not to be dropped.
        """
        try:
            row = self.remote.read(row)
            completions = from_ep.from_row(row, index, prompt_kind="messages")
            part = from_ep.read_file_part(from_ep.extra_of(row))
        except from_ep.FailedRolloutError as error:
            if self.drop_failed_rows:
                self.dropped.add(index)
                return
            raise JobError(
                f"{self.path}:{line_of(self.path, index)}: {error}. It has no completions to "
                "convert: --drop-failed-rows leaves such rows out and counts them"
            ) from error
        except RecordError as error:
            raise JobError(f"{self.path}:{line_of(self.path, index)}: {error}") from error
        self.num_rows += 1
        self._add_columns(completions[0])
        self._episodes |= any(one.episode is not None for one in completions)
        if part is None:
            self._add_run(index, row, completions)
        self._add_part(index, part, completions)
        if has_record(from_ep.extra_of(row)):
            self._add_sampling(from_ep.extra_of(row))

    def schema(self) -> pa.Schema:
        """Of the rollout file to be."""
        columns = {name: column_of(name, kinds) for name, kinds in self._kinds.items()}
        json_columns = [name for name, column in columns.items() if column.is_json]
        common = self._file_wide if self.one_file else None
        sampling = self._sampling if self._one_sampling else None
        metadata = FileMetadata(
            prompt_kind="messages" if common is None else common.prompt_kind,
            sampling=sampling if common is None else common.sampling,
            data=None if common is None else common.data,
            episodes=None if common is None else common.episodes,
            rewards=self._rewards,
            json_columns=json_columns,
        )
        types = {name: column.type for name, column in columns.items()}
        truth = types.pop("ground_truth")
        original = {
            name.removeprefix(file_format.ORIGINAL_PREFIX): kind for name, kind in types.items()
        }
        return file_format.schema(metadata, original, ground_truth=truth, episodes=self._episodes)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All rows with their numbers, those of a data row together: Eval Protocol writes runs in
        the order in which they end."""
        heads = [self.continued.get(i, i) for i in range(self.num_rows + len(self.dropped))]
        order = sorted(range(len(heads)), key=heads.__getitem__)
        in_order = order == list(range(len(heads)))
        rows = numbered_rows(self.path) if in_order else rows_in_order(self.path, order)
        return ((index, self.remote.read(row)) for index, row in rows)

    @property
    def renumbered(self) -> bool:
        """Whether `data_idx` is the number of the row in this file, not what the row says."""
        data_rows = self.num_rows - len(self.continued)
        return len(self._parts) < data_rows or len(set(self._parts)) < data_rows

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.dropped:
            notes.append(f"{len(self.dropped)} rows whose rollout failed are not in the output")
        if self._parts and self.renumbered:
            notes.append("rows of several files: data_idx is their number in this one")
        notes += [
            f"{name}: given by different evaluators; the metadata names the first"
            for name in sorted(self._mixed_rewards)
        ]
        return tuple(notes)

    def _add_columns(self, first: CompletionRow) -> None:
        original = {
            file_format.ORIGINAL_PREFIX + name: value for name, value in first.original.items()
        }
        see({**original, "ground_truth": first.ground_truth}, self._kinds)

    def _add_run(
        self, index: int, row: Mapping[str, Any], completions: list[CompletionRow]
    ) -> None:
        """Runs of a data row are completions of it, as in training, where they are one group."""
        if from_ep.row_id_of(row) is None:
            return
        first = completions[0]
        extra = from_ep.extra_of(row)
        sampling = extra["sampling"] if is_marked(extra) else {}
        # An agent makes its prompts and tools of the row, maybe others in each run.
        shown = () if sampling.get("prompts") == "agent" else (first.prompt, first.tools)
        asked = *shown, first.ground_truth, first.original
        text = msgspec.json.encode((row_key(row), asked), enc_hook=str)
        known = self._runs.setdefault(hashlib.blake2b(text, digest_size=16).digest(), [index, 0])
        head, count = known
        if head != index:
            self.continued[index], self.firsts[index] = head, count
        known[1] = count + completions[-1].sample_idx + 1

    def _add_part(
        self, index: int, part: FilePart | None, completions: list[CompletionRow]
    ) -> None:
        file = None if part is None else part.file
        if self.num_rows == 1:
            self._file_wide = file
        self.one_file = self.one_file and file == self._file_wide
        places = {completion.sample_idx for completion in completions}
        data_row = () if part is None else (part.data_idx, completions[0].row_id, file)
        if data_row and data_row == self._last and not places & self._places:
            self.continued[index] = self._head
            self._places |= places
        else:
            self._last, self._places, self._head = data_row, places, index
            if part is not None:
                self._parts.append(part.data_idx)
        if part is not None:
            for name, settings in part.file.rewards.items():
                if self._rewards.setdefault(name, settings) != settings:
                    self._mixed_rewards.add(name)

    def _add_sampling(self, extra: Mapping[str, Any]) -> None:
        sampling = extra["sampling"] if is_marked(extra) else {}
        values = {k: v for k, v in sampling.items() if k in _HOW_SAMPLED}
        if any(values.get(name) is None for name in ("model", "temperature", "top_p", "top_k")):
            self._one_sampling = False  # another program's row, which does not say
            return
        settings = msgspec.convert(values, file_format.SamplingSettings)
        self._sampling = self._sampling or settings
        if settings.seed != self._sampling.seed:  # drawn for each row, where the test names none
            settings = msgspec.structs.replace(settings, seed=None)
            self._sampling = msgspec.structs.replace(self._sampling, seed=None)
        self._one_sampling = self._one_sampling and settings == self._sampling


def read(
    path: Path, *, drop_failed_rows: bool, tokenizer: str | None, reading: Reading
) -> Rollouts:
    """The completions of all rows. Reads the file once here, and once each time they are read.
    `tokenizer` is for rows of remote processors, see `read_remote_rows`.

    Raises:
        JobError: a row is broken or its rollout failed; the message names the line.
        TrainingDataError: a line is no row.
    """
    scan = EpScan(path, drop_failed_rows, RemoteRows(tokenizer))
    for index, row in reading(numbered_rows(path), lambda row: 1):
        scan.add(index, row)
    if not scan.num_rows:
        raise JobError(f"{path}: no row with a rollout in it")
    schema = scan.schema()

    def tables() -> Iterator[pa.Table]:
        try:
            yield from tables_of(_rows(scan, schema, reading), schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise JobError(f"{path}: a value does not fit its column: {error}") from error

    return Rollouts(path, schema, tables, scan.notes)


def write(rollouts: Rollouts, target: Path) -> Written:
    """One row per data row, or per run and prompt of it."""
    metadata = rollouts.metadata
    non_finite = NonFinite()
    watched = Rollouts(rollouts.path, rollouts.schema, lambda: non_finite.watch(rollouts.read()))
    encoder = msgspec.json.Encoder(enc_hook=str)
    data_rows = completions = split = 0
    with replacing(target) as file:
        for group in watched.groups():
            rows = list(to_rows(group, metadata))
            file.write(encoder.encode_lines(rows))
            split += len(by_prompt(group)) > 1
            data_rows += 1
            completions += len(group)
    notes = (*text_notes(rollouts.schema), *non_finite.notes, *split_note(split))
    return data_rows, completions, notes


def _rows(scan: EpScan, schema: pa.Schema, reading: Reading) -> Iterator[CompletionRow]:
    prompt_kind = file_format.metadata_of(schema).prompt_kind
    renumbered = scan.renumbered
    group: list[CompletionRow] = []
    for index, row in reading(scan.rows(), lambda row: 1):
        if index in scan.dropped:
            continue
        number = scan.continued.get(index, index)
        first = scan.firsts.get(index, 0)
        own = from_ep.from_row(
            row, number, prompt_kind=prompt_kind, first=first, keep_row=not scan.one_file
        )
        if number == index:
            yield from _in_order(group)
            group = []
        if renumbered:
            for completion in own:
                completion.data_idx = number
        group += own
    yield from _in_order(group)


def _in_order(group: list[CompletionRow]) -> list[CompletionRow]:
    """One data row's completions, which may have come as several rows."""
    return sorted(group, key=lambda completion: completion.sample_idx)
