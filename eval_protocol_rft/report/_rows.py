"""Scored rows from the JSONL files that Eval Protocol writes (`EP_OUTPUT_DIR`), and from rollout
files.

Invariant: a line that cannot be read is an error with its file and line number; a row without a
record (a failed rollout) is kept and says why. Reads without importing Eval Protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft._statistics import LARGEST
from eval_protocol_rft.record import RecordError, RolloutRecord, has_record, result_score
from eval_protocol_rft.report._html import ReportError


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row as a report needs it."""

    row_id: str
    prompt: str
    """Content of the last message before the answer, or before the episode."""
    record: RolloutRecord | None
    """None where the rollout failed."""
    error: str | None
    """Why there is no record."""
    seconds: float | None
    """How long the rollout took."""


def newest_rows_file(path: Path) -> Path:
    """`path` itself, or the newest JSONL file below it where it is a folder of Eval Protocol's.

    Raises:
        ReportError: nothing is there.
    """
    if path.is_file() or is_rollouts(path):
        return path
    if not path.is_dir():
        raise ReportError(f"{path}: no such file or folder")
    visible = [file for file in path.rglob("*.jsonl") if not file.name.startswith((".", "_"))]
    files = sorted(visible, key=lambda file: file.stat().st_mtime)
    if not files:
        raise ReportError(
            f"{path}: no .jsonl file inside. Eval Protocol writes one per test case when "
            "EP_OUTPUT_DIR names a folder"
        )
    return files[-1]


def is_rollouts(path: Path) -> bool:
    """Whether `path` is a rollout file, that of an unfinished job, or such a job's folder."""
    from eval_protocol_rft.data import metadata_path, parts_folder, read_schema

    if path.is_file():
        return path.suffix == ".parquet" or metadata_path(path).is_file()
    return read_schema(path if path.is_dir() else parts_folder(path)) is not None


def read_rows(file: Path) -> Iterator[StoredRow]:
    """Read a file row by row: JSON lines of Eval Protocol's rows, or rollouts, in Parquet or JSON
    lines, or what is stored of an unfinished job.

    Raises:
        ReportError: a line is not UTF-8 JSON, not a row, or holds a record that contradicts
            itself; or it is Parquet, and not rollouts.
    """
    if is_rollouts(file):
        yield from _rollouts(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _row(msgspec.json.decode(line))
                except (ValueError, RecursionError) as error:
                    raise ReportError(f"{file}:{number}: {error}") from error


def _rollouts(file: Path) -> Iterator[StoredRow]:
    from eval_protocol_rft.data import FormatError, RolloutDataset, to_rows

    try:
        dataset = RolloutDataset(file)
        for group in dataset.groups():
            row_id = group[0].row_id
            yield from map(_row, to_rows(group, dataset.metadata, tokens="arrays"))
    except FormatError as error:
        raise ReportError(str(error)) from error
    except RecordError as error:
        raise ReportError(f"{file}: row {row_id!r}: {error}") from error


def _row(value: Any) -> StoredRow:
    row = msgspec.convert(value, _Row)
    extra = row.execution_metadata.extra
    if not has_record(extra):
        record, error = None, row.rollout_status.message or "no rollout record"
    else:
        params = row.input_metadata.completion_params
        record, error = RolloutRecord.from_extra(extra, params), None
        if record.rewards is None and len(record) == 1 and row.evaluation_result is not None:
            score = result_score(row.evaluation_result)
            record = msgspec.structs.replace(record, rewards=[score])
        _refuse_too_large(record.rewards)
    asked = row.messages[:-1] if record is not None else row.messages
    if record is not None and record.episodes:
        asked = row.messages[: record.episodes[0].row_messages]
    return StoredRow(
        row_id=row.input_metadata.row_id or "",
        prompt=_text(asked[-1].content) if asked else "",
        record=record,
        error=error,
        seconds=row.execution_metadata.rollout_duration_seconds,
    )


def _refuse_too_large(rewards: Sequence[float | None] | None) -> None:
    for i, reward in enumerate(rewards or ()):
        if reward is not None and abs(reward) > LARGEST:
            raise RecordError(f"completion {i}: reward {reward:g} is beyond {LARGEST:g}")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None


class _Input(msgspec.Struct):
    row_id: str | None = None
    completion_params: dict[str, Any] | None = None


class _Status(msgspec.Struct):
    message: str | None = None


class _Execution(msgspec.Struct):
    extra: dict[str, Any] | None = None
    rollout_duration_seconds: float | None = None


class _Row(msgspec.Struct):
    messages: list[_Message]
    input_metadata: _Input = msgspec.field(default_factory=_Input)
    evaluation_result: dict[str, Any] | None = None
    rollout_status: _Status = msgspec.field(default_factory=_Status)
    execution_metadata: _Execution = msgspec.field(default_factory=_Execution)
