"""Rows from the JSONL files that Eval Protocol writes, one at a time.

Invariant: a line is a row or an error that names file and line; none is skipped but blank ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from eval_protocol_rft.training.errors import TrainingDataError


def read_rows(*paths: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of one file after the other, as dicts for `build_batch` and `iter_batches`.

    Args:
        paths: files of `EvaluationRow`s, one a line: `<experiment id>.jsonl` in the folder
            `experiment_results`, or what `EP_OUTPUT_DIR` got.

    Raises:
        TrainingDataError: a line is no JSON object of a row. NaN and infinity are no JSON.
        OSError: a file cannot be read.
    """
    decoder = msgspec.json.Decoder(dict[str, Any])
    for path in paths:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise TrainingDataError(f"{path}, line {number}: {error}") from error
                if "execution_metadata" not in row:
                    raise TrainingDataError(
                        f"{path}, line {number}: no row of Eval Protocol, it has no "
                        f"execution_metadata (but {', '.join(list(row)[:8]) or 'nothing'})"
                    )
                _check_shape(row, f"{path}, line {number}")
                yield row


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
