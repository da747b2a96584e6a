"""Rollout files of what a test says of each completion, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from eval_protocol_rft.data._files import write_rows
from eval_protocol_rft.data._format import (
    CompletionRow,
    FileMetadata,
    RewardSettings,
    SamplingSettings,
    schema,
)
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.record import Score

METADATA = FileMetadata(
    prompt_kind="text",
    sampling=SamplingSettings(model="m", tokenizer="tok", temperature=1.0, top_p=1.0, top_k=0, n=4),
    json_columns=["original_tags"],
    rewards={"reward_style": RewardSettings(evaluator="style", fingerprint="f")},
)
SCHEMA = schema(METADATA, {"level": pa.int64(), "tags": pa.string()})


@dataclass(frozen=True)
class Sampled:
    """One completion. `tokens` are its ids; none of them stands for a failure."""

    reward: float | None = None
    tokens: tuple[int, ...] = (7,)
    truncated: bool = False
    style: float | None = None
    why: str | None = None
    error_kind: str | None = "timeout"

    @property
    def failed(self) -> bool:
        return not self.tokens


FAILED = Sampled(tokens=())


def rows_of(
    groups: Sequence[Sequence[Sampled]], *, prompts: Sequence[str] | None = None
) -> list[CompletionRow]:
    """Data row i has the completions `groups[i]`."""
    return [
        _row(i, k, one, prompts[i] if prompts else f"question {i}")
        for i, group in enumerate(groups)
        for k, one in enumerate(group)
    ]


def table_of(groups: Sequence[Sequence[Sampled]], **options: Any) -> pa.Table:
    return pa.Table.from_batches([to_record_batch(rows_of(groups, **options), SCHEMA)])


def write(path: Path, groups: Sequence[Sequence[Sampled]], **options: Any) -> Path:
    write_rows(path, SCHEMA, rows_of(groups, **options))
    return path


def cut(table: pa.Table, places: Sequence[int]) -> Iterator[pa.Table]:
    """The table in pieces that end anywhere, none of them empty."""
    ends = sorted({place for place in places if 0 < place < len(table)} | {len(table)})
    start = 0
    for end in ends:
        yield table.slice(start, end - start)
        start = end


def groups_of_completions(max_groups: int = 6) -> st.SearchStrategy[list[list[Sampled]]]:
    """Few different values, so that ties and repetitions are common."""
    sampled = st.builds(
        Sampled,
        reward=st.sampled_from([None, 0.0, 0.1, 0.2, 0.3, 1.0, 1.5, -2.0]),
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
        truncated=st.booleans(),
        style=st.sampled_from([None, 0.5]),
        why=st.sampled_from([None, "no answer\nline 2", "crash"]),
    )
    group = st.lists(st.just(FAILED) | sampled, min_size=1, max_size=5)
    return st.lists(group, min_size=1, max_size=max_groups)


def _row(data_idx: int, sample_idx: int, one: Sampled, prompt: str) -> CompletionRow:
    asked: dict[str, Any] = {
        "row_id": f"row-{data_idx}",
        "data_idx": data_idx,
        "sample_idx": sample_idx,
        "prompt": prompt,
        "original": {"level": data_idx, "tags": {"all": ["a", data_idx]}},
        "prompt_ids": np.arange(1, 4, dtype=np.int32),
    }
    if one.failed:
        return CompletionRow(**asked, error="it failed", error_kind=one.error_kind)
    scores = {"reward": Score(reward=one.reward, error=one.why if one.reward is None else None)}
    if one.style is not None:
        scores["reward_style"] = Score(reward=one.style)
    size = len(one.tokens)
    return CompletionRow(
        **asked,
        response="-" * size,
        completion_ids=np.array(one.tokens, np.int32),
        logprobs=np.linspace(-1.0, -0.1, size, dtype=np.float32),
        finish_reason="length" if one.truncated else "stop",
        truncated=one.truncated,
        scores=scores,
    )
