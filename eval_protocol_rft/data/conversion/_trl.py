"""TRL's conversational prompt-completion data set: one row per completion.

`prompt` and `completion` are lists of messages, `tools` is JSON text, as TRL's trainers read them
(huggingface.co/docs/trl/dataset_formats); `prompt_ids`, `completion_ids` and `logprobs` have the
names of what a `rollout_func` returns. Further columns reach reward functions as they are.

Invariant: `completion` is the text as sampled; ids and logprobs beside it are exact. Where it was
read as more than text (calls, thinking), `message` says as what. An episode of several turns is
refused, as there is a place for one answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eval_protocol_rft.data.conversion import _plain_file as plain_file
from eval_protocol_rft.data.conversion._plain_file import (
    as_prompt,
    check_one_turn,
    from_json_text,
    json_text,
    read_truth,
    stored_truth,
)
from eval_protocol_rft.data.conversion._types import Rollouts, Survey, Written
from eval_protocol_rft.data.rollouts._format import FileMetadata, reward_columns
from eval_protocol_rft.data.rollouts._records import as_messages
from eval_protocol_rft.data.rollouts._rows import UNSCORED, CompletionRow, Score

_KEPT = (
    "row_id", "data_idx", "sample_idx", "prompt_ids", "completion_ids", "logprobs",
    "raw_logprobs", "finish_reason", "truncated", "temperature", "top_p", "top_k", "max_tokens",
    "seed", "policy_version", "first_policy_version", "past_end",
)  # fmt: skip
"""Columns that are the same there."""
_COMPLETION = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_NEEDED = ("prompt_ids", "completion_ids", "logprobs", "prompt", "completion", *_KEPT[:3])
_ARRAYS = dict.fromkeys(("prompt_ids", "completion_ids", "past_end"), np.int32) | dict.fromkeys(
    ("logprobs", "raw_logprobs"), np.float32
)


def write(rollouts: Rollouts, target: Path) -> Written:
    """One row per completion that did not fail."""
    survey = Survey.of(rollouts)
    metadata = rollouts.metadata
    rewards = {name: reward_columns(name)[0] for name in ("reward", *metadata.rewards)}
    carried = [*_KEPT, "prompt", "response", "message", "tools", "ground_truth", *rewards.values()]
    types: dict[str, pa.DataType] = {"prompt": survey.messages, "completion": _COMPLETION}
    known = {name: rollouts.schema.field(name).type for name in rollouts.schema.names}
    own = [name for name in carried if name not in ("prompt", "response")]
    types |= {name: known[name] for name in own if name in survey.held}
    data_rows = completions = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal data_rows, completions
        for group in rollouts.groups():
            survivors = [row for row in group if not row.failed]
            check_one_turn(survivors, rollouts.path, "TRL")
            data_rows += bool(survivors)
            completions += len(survivors)
            yield from (_row(row, list(types), metadata) for row in survivors)

    lost = plain_file.write_rows(target, pa.schema(list(types.items())), metadata, rows())
    return data_rows, completions, (*survey.notes(carried, metadata), *lost)


def read(path: Path) -> Rollouts:
    """The completions of a file that `write` made.

    Raises:
        JobError: it has no token ids, or does not say how they were sampled.
    """
    file = plain_file.ConvertedFile.open(path, needed=_NEEDED)
    has_truth = "ground_truth" in file.schema.names
    return file.rollouts(
        lambda row: [_completion(row, file.metadata)],
        ground_truth=file.schema.field("ground_truth").type if has_truth else None,
    )


def _row(row: CompletionRow, names: list[str], metadata: FileMetadata) -> dict[str, Any]:
    return {
        "prompt": as_messages(row.prompt),
        "completion": [{"role": "assistant", "content": row.response}],
        **{name: getattr(row, name) for name in _KEPT if name in names},
        "tools": json_text(row.tools),
        "message": json_text(row.message),
        "ground_truth": stored_truth(row.ground_truth, metadata),
        **{name: score.reward for name, score in row.scores.items()},
    }


def _completion(row: dict[str, Any], metadata: FileMetadata) -> CompletionRow:
    values: dict[str, Any] = {name: row.get(name) for name in _KEPT}
    for name, dtype in _ARRAYS.items():
        values[name] = None if values[name] is None else np.array(values[name], dtype)
    scores = {name: Score(reward=row.get(name)) for name in ("reward", *metadata.rewards)}
    return CompletionRow(
        **values,
        prompt=as_prompt(row["prompt"], metadata.prompt_kind),
        response=row["completion"][0]["content"],
        message=from_json_text(row.get("message")),
        tools=from_json_text(row.get("tools")),
        ground_truth=read_truth(row.get("ground_truth"), metadata),
        scores={name: score for name, score in scores.items() if score != UNSCORED},
    )
