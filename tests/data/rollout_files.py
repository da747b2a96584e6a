"""Rollout files to score: what each completion says, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import (
    CompletionRow,
    DataSettings,
    FileMetadata,
    SamplingSettings,
    schema,
)

METADATA = FileMetadata(
    prompt_kind="messages",
    sampling=SamplingSettings(
        model="m", tokenizer="tok", temperature=1.0, top_p=1.0, top_k=0, n=3, seed=1
    ),
    data=DataSettings(name="d", fingerprint="f", num_rows=9, prompt_key="prompt"),
)
SCHEMA = schema(METADATA, {"level": pa.int64()})


def write_rollouts(
    path: Path, said: Sequence[Sequence[str | None]], *, order: Sequence[int] | None = None
) -> Path:
    """Data row i has completions that say `said[i]`; None is one that failed. The ground truth of a
    row is its number. `order`: of the data rows in the file."""
    order = range(len(said)) if order is None else order
    rows = [completion_row(i, k, text) for i in order for k, text in enumerate(said[i])]
    write_rows(path, SCHEMA, rows)
    return path


def completion_row(i: int, k: int, text: str | None) -> CompletionRow:
    row = CompletionRow(
        row_id=f"d-{i}",
        data_idx=i,
        sample_idx=k,
        prompt=[{"role": "user", "content": f"question {i}"}],
        ground_truth=str(i),
        prompt_ids=np.arange(4, dtype=np.int32),
        seed=100 * i + k,
        attempts=1,
        seconds=0.5,
        began_at=1.5,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        original={"level": 10 * i},
    )
    if text is None:
        row.error, row.error_kind = "HTTP 400: too long", "refused"
        return row
    size = len(text) + 1
    row.response = text
    row.completion_ids = np.arange(size, dtype=np.int32)
    row.logprobs = row.raw_logprobs = np.linspace(-2, -0.1, size, dtype=np.float32)
    row.finish_reason, row.truncated = "stop", False
    return row
