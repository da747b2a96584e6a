"""What reports are of: scored rows from the JSONL files that Eval Protocol writes
(`EP_OUTPUT_DIR`), or from rollout files; and what a training run left in its folder.

Invariant: a line that cannot be read is an error with its file and line number; a row without a
record (a failed rollout) is kept and says why. What a run did not measure is NaN, here and in
everything made from it, never 0. Reads without importing Eval Protocol.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from eval_protocol_rft import record as form
from eval_protocol_rft._statistics import LARGEST, Array
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.report._html import ReportError
from eval_protocol_rft.rollout import RemoteRows
from eval_protocol_rft.training import row_key


class ReportRow(NamedTuple):
    """One row of Eval Protocol as a table shows it."""

    group: tuple[Any, ...] | None
    """Of which prompt group it is; None: of one of its own."""
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


def read_rows(file: Path) -> Iterator[ReportRow]:
    """Read a file row by row: JSON lines of Eval Protocol's rows, or rollouts, in Parquet or JSON
    lines, or what is stored of an unfinished job.

    Raises:
        ReportError: a line is not UTF-8 JSON, not a row, or holds a record that contradicts
            itself; or it is Parquet, and not rollouts.
    """
    if is_rollouts(file):
        yield from _rollouts(file)
        return
    remote = RemoteRows()
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _row(*_with_record(msgspec.json.decode(line), remote))
                except (ValueError, RecursionError) as error:
                    raise ReportError(f"{file}:{number}: {error}") from error


def _rollouts(file: Path) -> Iterator[ReportRow]:
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


def _with_record(value: Any, remote: RemoteRows) -> tuple[Any, str | None]:
    """A row that a remote processor brought back with its record, or why it has none."""
    try:
        return (remote.read(value) if isinstance(value, dict) else value), None
    except RecordError as error:
        return value, str(error)


def _row(value: Any, why: str | None = None) -> ReportRow:
    messages = _at(value, "messages", list[dict[str, Any]])
    if messages is None:
        raise ReportError("no row of Eval Protocol: it has no messages")
    extra = _at(value, "execution_metadata.extra", dict[str, Any])
    record = error = None
    if form.has_record(extra) and not form.is_failure(_at(value, "rollout_status.code", int)):
        record = _record(value, extra)
        asked = record.episodes[0].row_messages if record.episodes else -1
        messages = messages[:asked]
    else:
        error = why or _at(value, "rollout_status.message", str) or "no rollout record"
    return ReportRow(
        group=row_key(value) if _at(value, "input_metadata.row_id", str) else None,
        prompt=_text(messages[-1]) if messages else "",
        record=record,
        error=error,
        seconds=_at(value, "execution_metadata.rollout_duration_seconds", float),
    )


def _record(value: Any, extra: dict[str, Any] | None) -> RolloutRecord:
    params = _at(value, "input_metadata.completion_params", dict[str, Any])
    record = RolloutRecord.from_extra(extra, params)
    result = _at(value, "evaluation_result", dict[str, Any])
    if record.rewards is None and len(record) == 1 and result is not None:
        record = msgspec.structs.replace(record, rewards=[form.result_score(result)])
    _refuse_too_large(record.rewards)
    return record


def _at(value: Any, path: str, kind: type | UnionType) -> Any:
    """What stands at a path in a row's JSON; None where nothing does.

    Raises:
        msgspec.ValidationError: it is of another type; the message names the path.
    """
    try:
        for name in path.split("."):
            value = None if value is None else msgspec.convert(value, dict[str, Any]).get(name)
        return None if value is None else msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(f"{path}: {error}") from error


def _refuse_too_large(rewards: Sequence[float | None] | None) -> None:
    for i, reward in enumerate(rewards or ()):
        if reward is not None and abs(reward) > LARGEST:
            raise RecordError(f"completion {i}: reward {reward:g} is beyond {LARGEST:g}")


def _text(message: dict[str, Any]) -> str:
    content: str | list[Any] | None = _at(message, "content", str | list[Any])
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


def is_run_folder(path: Path) -> bool:
    """Whether a training run keeps its files here."""
    return (path / "settings.json").is_file()


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and settings of the run in `folder`, without a last line that a crash cut off.

    Raises:
        ReportError: there are none, or they are damaged.
    """
    if not is_run_folder(folder):
        raise ReportError(f"{folder} holds no training run: it has no settings.json")
    settings = _read_json(_bytes_of(folder / "settings.json"), f"{folder}/settings.json")
    path = folder / "metrics.jsonl"
    whole = _bytes_of(path).rpartition(b"\n")[0] if path.is_file() else b""
    lines = [
        _read_json(line, f"{path}, line {number}")
        for number, line in enumerate(whole.splitlines(), start=1)
    ]
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int) or "kind" not in line:
            raise ReportError(f"{path}, line {number}: no line of a training run (kind, step)")
    return lines, settings


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where}: no JSON object")
    return value


class Measured:
    """What the lines of one kind (`step` or `eval`) say, as series over the steps of a run. What
    was not measured is NaN, never 0."""

    def __init__(self, lines: Iterable[Mapping[str, Any]], kind: str) -> None:
        """Those of `kind`; where a step is told of twice, the later line counts."""
        by_step = {line["step"]: line for line in lines if line.get("kind") == kind}
        self.lines = [by_step[step] for step in sorted(by_step)]

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    def values(self, *path: str) -> Array:
        """[len(steps)] of what lies at `path` in each line."""
        return np.array([_number(line, path) for line in self.lines], np.float64)

    def share(self, part: str, whole: str) -> Array:
        """[len(steps)] of `part` in `whole`; NaN where there is nothing to have a share of."""
        above, below = self.values(part), self.values(whole)
        shares = np.full(above.shape, np.nan)
        np.divide(above, below, out=shares, where=below > 0)
        return shares

    def counts(self, name: str) -> dict[str, Array]:
        """Counts by key, for lines that hold them in a mapping; largest total first.

        A mapping without a key counted none of it: that is a 0. A line without the mapping is NaN.
        """
        counts = {
            key: np.array([_count(line, name, key) for line in self.lines], np.float64)
            for key in self.keys(name)
        }
        return dict(sorted(counts.items(), key=lambda item: (-np.nansum(item[1]), item[0])))

    def keys(self, name: str) -> list[str]:
        """Keys of a mapping in the lines; numbers in their order."""
        keys = {key for line in self.lines for key in _mapping(line, name) or {}}
        return sorted(
            keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
        )


def _mapping(line: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = line.get(name)
    return value if isinstance(value, Mapping) else None


def _count(line: Mapping[str, Any], name: str, key: str) -> float:
    counts = _mapping(line, name)
    if counts is None:
        return math.nan
    return _number(counts, (key,)) if key in counts else 0.0


def _number(line: Mapping[str, Any], path: tuple[str, ...]) -> float:
    value: Any = line
    for key in path:
        if not isinstance(value, Mapping):
            return math.nan
        value = value.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)
