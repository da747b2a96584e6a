"""`convert`: rollout files into what others read, and back.

Invariant: nothing is lost in silence. What the target has no place for is in the summary's notes,
or the conversion is refused; text is never made into tokens, and token data that goes by can be
trained on. The source is only read, and is of a format only if nothing else would look like it; the
target appears when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eval_protocol_rft._options import Flag
from eval_protocol_rft.data import _convert_ep as ep
from eval_protocol_rft.data import _convert_examples as examples
from eval_protocol_rft.data import _convert_trainers as trainers
from eval_protocol_rft.data._dataset import RolloutDataset, in_order
from eval_protocol_rft.data._episodes import checked_episode
from eval_protocol_rft.data._example_rules import ExampleKind, ExampleRules
from eval_protocol_rft.data._files import JobError, check_target, write_file
from eval_protocol_rft.data._format import EPISODE_COLUMNS, METADATA_KEY, FileMetadata, FormatError
from eval_protocol_rft.data._job_store import parts_folder
from eval_protocol_rft.data._jsonl import METADATA_SUFFIX, count_lines, metadata_path
from eval_protocol_rft.data._plain_file import Rollouts, Written, is_parquet, read_parquet_schema
from eval_protocol_rft.data._progress import Reading
from eval_protocol_rft.data._row_groups import from_record_batch
from eval_protocol_rft.data.source._places import one_place
from eval_protocol_rft.data.source._urls import shown
from eval_protocol_rft.record import RecordError
from eval_protocol_rft.sampling import LOGPROB_NOISE, LOWEST_LOGPROB, token_data_problem

Format = Literal["rollouts", "ep", "verl", "trl"]
"""What rollouts are read from."""
Target = Literal[Format, ExampleKind]
"""What they are written to."""
_EXAMPLES: tuple[ExampleKind, ...] = get_args(ExampleKind)

_ENDINGS: dict[Target, tuple[str, ...]] = {
    "rollouts": (".parquet", ".jsonl", ".ndjson"),
    "ep": (".jsonl",),
    "verl": (".parquet", ".json"),
    "trl": (".parquet", ".jsonl", ".json"),
    **dict.fromkeys(_EXAMPLES, (".parquet", ".jsonl", ".json")),
}
"""What the readers of a format take. verl reads JSON lines, from files called .json alone."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    from_format: Annotated[Literal["auto"] | Format | None, Flag("--from", only=True)] = "auto",
    to_format: Annotated[Target, Flag("--to", only=True)] = "rollouts",
    rules: ExampleRules | None = None,
    drop_failed_rows: Annotated[bool, Flag()] = False,
    tokenizer: Annotated[str | None, Flag(unset="what completion_params name")] = None,
    data_source: Annotated[str | None, Flag(unset="the data set's name")] = None,
    overwrite: Annotated[bool, Flag()] = False,
    progress: bool | None = None,
) -> ConvertSummary:
    """Convert `source` to `target`, in constant memory.

    Args:
        source: a rollout file (Parquet or JSON lines), rows of Eval Protocol (JSON lines), or
            Parquet for verl or TRL that this function wrote; also compressed lines, or a URL.
        target: the file to write; its ending says Parquet or JSON lines.
        from_format: format of the first file; auto: by its content.
        to_format: format of the second file; sft, dpo, kto and reward are examples for TRL's
            trainers.
        rules: which completions become examples for sft, dpo, kto and reward.
        drop_failed_rows: leave out Eval Protocol rows without a rollout, instead of refusing them.
        tokenizer: folder or hub id, for Eval Protocol rows that its remote processors brought back.
        data_source: for verl: what it chooses its reward function by.
        overwrite: replace an output that is there.
        progress: show a bar where it takes long; None: where stderr is a terminal.

    Raises:
        JobError: the file cannot be converted;
            the target must not be written to.
        FormatError: the rollout file is broken.
        TrainingDataError: a line is no row of Eval Protocol.
        OSError: a file cannot be read or written.
    """
    output = check_target(target, source, suffixes=_ENDINGS[to_format], overwrite=overwrite)
    if data_source is not None and to_format != "verl":
        raise JobError("data_source is verl's: convert to verl, or leave it out")
    rules = rules or ExampleRules()
    rules.check_for(to_format)
    with one_place(source).here(METADATA_SUFFIX) as path:
        if from_format is None or from_format == "auto":
            from_format = detect_format(path)
        found: Format = from_format
        with Reading("convert", lambda: _rows_about(path, found), show=progress) as reading:
            rollouts = _read(
                path,
                found,
                drop_failed_rows=drop_failed_rows,
                tokenizer=tokenizer,
                reading=reading,
            )
            number = None
            if to_format in _EXAMPLES:
                data_rows, completions, notes, number = examples.write_examples(
                    rollouts, output, to_format, rules
                )
            elif to_format == "ep":
                data_rows, completions, notes = ep.write(rollouts, output)
            elif to_format == "verl":
                data_rows, completions, notes = trainers.write_verl(
                    rollouts, output, data_source=data_source
                )
            elif to_format == "trl":
                data_rows, completions, notes = trainers.write_trl(rollouts, output)
            else:
                data_rows, completions, notes = _write_rollouts(rollouts, output)
    return ConvertSummary(
        source=shown(source),
        target=output,
        from_format=found,
        to_format=to_format,
        data_rows=data_rows,
        completions=completions,
        examples=number,
        notes=(*rollouts.notes, *notes),
    )


def _read(
    path: Path,
    found: Format,
    *,
    drop_failed_rows: bool,
    tokenizer: str | None,
    reading: Reading,
) -> Rollouts:
    """The rollouts of a file; what cannot be trained on is an error where it is read."""
    where = str(path)
    if found == "ep":
        rollouts = ep.read(
            path, drop_failed_rows=drop_failed_rows, tokenizer=tokenizer, reading=reading
        )
    elif found == "verl":
        rollouts = trainers.read_verl(path)
    elif found == "trl":
        rollouts = trainers.read_trl(path)
    else:
        data = RolloutDataset(path)
        unfinished = () if data.finished else ("the job of this file is not finished",)
        rollouts = Rollouts(path, data.schema, data.tables, unfinished)

    def tables() -> Iterator[pa.Table]:
        tables = rollouts.read()
        if found != "ep":  # whose reader counts rows
            tables = reading(tables)
        if found != "rollouts":  # whose reader looks at the order itself
            tables = in_order(tables, where)
        return with_token_data(tables, where)

    return replace(rollouts, read=tables)


def _rows_about(path: Path, found: Format) -> int | None:
    """What `_read` counts: completions, or rows of Eval Protocol."""
    if found == "ep":
        return count_lines(path)
    return RolloutDataset(path).rows_about() if found == "rollouts" else None


def _write_rollouts(rollouts: Rollouts, target: Path) -> Written:
    data_rows, last = 0, None

    def counted() -> Iterator[pa.Table]:
        nonlocal data_rows, last
        for table in rollouts.read():
            numbers = table.column("data_idx").to_numpy()  # those of a data row stand together
            data_rows += int(np.count_nonzero(np.diff(numbers))) + int(numbers[0] != last)
            last = int(numbers[-1])
            yield table

    completions = write_file(target, rollouts.schema, counted())
    return data_rows, completions, ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertSummary:
    """What a conversion did."""

    source: str
    """As it was named, without what is secret of a URL."""
    target: Path
    from_format: Format
    to_format: Target
    data_rows: int
    """Written to the target."""
    completions: int
    """Written to the target; of a rollout file and of rows, failed ones too."""
    examples: int | None = None
    """Rows of the target, where it is for sft, dpo, kto or reward."""
    notes: tuple[str, ...]
    """What the target does not hold, and what was changed."""

    def __str__(self) -> str:
        done = f"{self.completions} completions of {self.data_rows} data rows"
        if self.examples is not None:
            done = f"{self.examples} examples of {done}"
        return "\n".join([f"{self.target} ({self.to_format}): {done}", *self.notes])


_MARKS: Mapping[Format, frozenset[str]] = {
    "ep": frozenset({"messages", "execution_metadata"}),
    "rollouts": frozenset({"data_idx", "sample_idx", "completion_ids", "response"}),
    "verl": frozenset({"data_source", "prompt"}),
    "trl": frozenset({"prompt", "completion"}),
}
"""Columns that a format has, the more telling formats first."""


def detect_format(path: Path) -> Format:
    """The format of a file, or of the unfinished job that is to write it.

    Raises:
        JobError: there is no such file, or it may be anything.
    """
    if path.is_dir():
        raise JobError(f"{path}: a folder; name the file in it")
    if not path.is_file():
        if parts_folder(path).is_dir():
            return "rollouts"
        raise JobError(f"{path}: no such file")
    if is_parquet(path):
        schema = read_parquet_schema(path)
        if METADATA_KEY in (schema.metadata or {}):
            return "rollouts"
        return _by_columns(path, schema.names)
    if metadata_path(path).is_file():
        return "rollouts"
    return _by_columns(path, list(_first_line(path)))


def _by_columns(path: Path, names: Sequence[str]) -> Format:
    for name, marks in _MARKS.items():
        if marks <= set(names):
            return name
    raise JobError(
        f"{path}: which format is this? It has {', '.join(names) or 'no columns'}; say --from "
        f"{', '.join(_MARKS)}"
    )


def _first_line(path: Path) -> dict[str, Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                values: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise JobError(
                    f"{path}:{number}: neither Parquet nor JSON lines: {error}"
                ) from error
            return values
    raise JobError(f"{path}: an empty file")


_NEEDED = ("response", "prompt_ids", "completion_ids", "logprobs", "finish_reason", "truncated")
"""What every completion that did not fail has."""


def with_token_data(tables: Iterable[pa.Table], where: str) -> Iterator[pa.Table]:
    """The same tables, of which none is empty.

    Raises:
        FormatError: a completion that did not fail lacks something, its arrays differ in length, or
            a number in them is no token id or no logprob to train on.
    """
    for table in tables:
        if _may_be_wrong(table):
            for row in table.select(_columns(table)).to_pylist():
                if problem := row["error"] is None and _problem(row):
                    raise FormatError(
                        f"{where}: data row {row['data_idx']}, completion {row['sample_idx']}: "
                        f"{problem}"
                    )
        if "turns" in table.schema.names:
            _check_episodes(table, where)
        yield table


def _check_episodes(table: pa.Table, where: str) -> None:
    """Look at the episodes of a table, one after the other."""
    episodes = table.filter(table.column("turns").is_valid())
    names = [name for name in table.schema.names if name in _OF_EPISODES]
    for row in from_record_batch(episodes.select(names), FileMetadata(), where=where):
        try:
            checked_episode(row)
        except RecordError as error:
            raise FormatError(
                f"{where}: data row {row.data_idx}, completion {row.sample_idx}: {error}"
            ) from error


_OF_EPISODES = frozenset(
    {"row_id", "data_idx", "sample_idx", "prompt", "error", *_NEEDED, *EPISODE_COLUMNS}
)


def _may_be_wrong(table: pa.Table) -> bool:
    """Whether a row of the table may be wrong; false where none is."""
    survived = table.filter(pc.is_null(table.column("error")))
    if any(name not in survived.schema.names for name in _NEEDED):
        return bool(len(survived))
    if any(survived.column(name).null_count for name in _NEEDED):
        return True
    lengths = pc.list_value_length(survived.column("completion_ids"))
    raw = survived.column("raw_logprobs") if "raw_logprobs" in survived.schema.names else None
    return (
        bool(pc.any(pc.equal(lengths, 0)).as_py())
        or bool(pc.any(pc.equal(pc.list_value_length(survived.column("prompt_ids")), 0)).as_py())
        or _differs(lengths, pc.list_value_length(survived.column("logprobs")))
        or (raw is not None and _differs(lengths, pc.list_value_length(raw)))
        or any(_ids_outside(survived.column(name)) for name in ("prompt_ids", "completion_ids"))
        or any(_logprobs_outside(c) for c in (survived.column("logprobs"), raw) if c is not None)
        or not set(pc.unique(survived.column("finish_reason")).to_pylist()) <= {"stop", "length"}
    )


def _differs(lengths: pa.ChunkedArray, others: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.not_equal(lengths, others)).as_py())


def _ids_outside(column: pa.ChunkedArray) -> bool:
    values = pc.list_flatten(column)
    return bool(values.null_count) or bool(len(values) and pc.min(values).as_py() < 0)


def _logprobs_outside(column: pa.ChunkedArray) -> bool:
    values = pc.list_flatten(column)
    if values.null_count:
        return True
    numbers = values.to_numpy()
    return bool(len(numbers)) and not (  # NaN is the least and the greatest of its array
        numbers.min() >= LOWEST_LOGPROB and numbers.max() <= LOGPROB_NOISE
    )


def _columns(table: pa.Table) -> list[str]:
    wanted = ("data_idx", "sample_idx", "error", *_NEEDED, "raw_logprobs")
    return [name for name in wanted if name in table.schema.names]


def _problem(row: dict[str, object]) -> str | None:
    """Say what is wrong with the row of a completion that did not fail, or None."""
    for name in _NEEDED:
        if row.get(name) is None:
            return f"it has no {name}"
    for name in ("prompt_ids", "completion_ids", "logprobs", "raw_logprobs"):
        values = row.get(name)
        if isinstance(values, list) and None in values:
            return f"{name}[{values.index(None)}] is null"
    prompt, ids, logprobs = (row[name] for name in ("prompt_ids", "completion_ids", "logprobs"))
    assert isinstance(prompt, list)  # noqa: S101 - the column's type
    if not prompt:
        return "prompt_ids is empty"
    if min(prompt) < 0:
        index = next(i for i, token in enumerate(prompt) if token < 0)
        return f"prompt_ids[{index}] is {prompt[index]}: not a token id"
    if row["finish_reason"] not in ("stop", "length"):
        return f"finish_reason is {row['finish_reason']!r}, not 'stop' or 'length'"
    return token_data_problem(ids, logprobs, row.get("raw_logprobs"))  # type: ignore[arg-type]
