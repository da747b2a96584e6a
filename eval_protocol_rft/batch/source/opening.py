"""Reading a data set of prompts, whatever its format.

Invariant: what can be wrong with a data set is found when it is opened, before anything is paid
for, and each row keeps its number however often and in whichever order the set is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from eval_protocol_rft.batch.source.csv import open_csv
from eval_protocol_rft.batch.source.folder import open_folder, open_parquet
from eval_protocol_rft.batch.source.json import open_json, open_jsonl
from eval_protocol_rft.batch.source.prompt import (
    PromptKind,
    check_prompt,
    messages_in,
    prompt_column,
    tools_in,
    without_absent,
)
from eval_protocol_rft.batch.source.types import Source, SourceColumn, SourceError, SourceRow

__all__ = [
    "PromptKind",
    "Source",
    "SourceColumn",
    "SourceError",
    "SourceRow",
    "check_prompt",
    "messages_in",
    "open_source",
    "prompt_column",
    "tools_in",
    "without_absent",
]

FORMATS: dict[str, Callable[[Path], Source]] = {
    ".parquet": open_parquet,
    ".jsonl": open_jsonl,
    ".ndjson": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a data set and look at all of it: content, number of rows, columns and their types.

    Args:
        path: a file (.parquet; .jsonl or .ndjson: an object per line; .json: an array of objects;
            .csv: with a header, all values text), a folder of Parquet files, or a folder that
            `Dataset.save_to_disk` of Hugging Face wrote.

    Raises:
        SourceError: it is nothing of this, cannot be read, or has no rows. In Parquet, damage
            inside a file shows when the rows are read.
        OSError: a file cannot be opened.
    """
    # Only the absolute path of "." has the folder's name.
    path = Path(os.path.abspath(path))
    if path.is_dir():
        source: Source = open_folder(path)
    elif not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    elif path.suffix.lower() in FORMATS:
        source = FORMATS[path.suffix.lower()](path)
    else:
        raise SourceError(
            f"{path}: not a format that can be read. There are {', '.join(FORMATS)}, a folder of "
            "Parquet files, and a folder written by Dataset.save_to_disk"
        )
    if source.num_rows == 0:
        raise SourceError(f"{path}: no rows")
    return source
