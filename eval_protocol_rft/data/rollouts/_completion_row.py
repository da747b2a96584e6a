"""`CompletionRow`: one row of a rollout file as an object.

Invariant: a completion that did not fail has its own prompt ids, sampled ids and logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from eval_protocol_rft.record import UNSCORED, Score

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
ChatMessages = list[dict[str, Any]]


class CompletionRow(msgspec.Struct, kw_only=True, eq=False):
    """One completion that was asked for; docs/format.md says what each field means. Of an episode,
    what is sampled is its first turn, and how it ended is of its last one."""

    row_id: str
    data_idx: int
    sample_idx: int
    prompt: str | ChatMessages
    tools: list[dict[str, Any]] | None = None
    ground_truth: Any = None
    response: str | None = None
    message: dict[str, Any] | None = None
    """The assistant's, where it is not what `response` alone says; see `completion_messages`."""
    prompt_ids: Ids | None = None
    completion_ids: Ids | None = None
    logprobs: Logprobs | None = None
    raw_logprobs: Logprobs | None = None
    finish_reason: str | None = None
    truncated: bool | None = None
    past_end: Ids | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    policy_version: str | None = None
    first_policy_version: str | None = None
    attempts: int | None = None
    seconds: float | None = None
    began_at: float | None = None
    request_id: str | None = None
    error: str | None = None
    """Why there is no completion; None where there is one."""
    error_kind: str | None = None
    error_status: int | None = None
    evaluation_row: str | None = None
    segments: list[dict[str, Any]] | None = None
    """Of an episode: `tokens`, `logprobs` and `loss_mask` of each, arrays of int32, float32 and
    int8; in files of version 1 what JSON text says."""
    episode: dict[str, Any] | None = None
    """Of an episode: how it went, as `episodes` of a record says it."""
    first_finish_reason: str | None = None
    """Of an episode's first turn."""
    scores: dict[str, Score] = {}
    """Reward column -> what it holds here; `reward` is the main one."""
    original: dict[str, Any] = {}
    """Columns of the data set."""

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def reward(self) -> float | None:
        """The main reward."""
        return self.scores.get("reward", UNSCORED).reward

    @property
    def num_tokens(self) -> int:
        """Sampled tokens; of an episode, of all its turns."""
        if self.segments is not None:
            return sum(int(np.sum(segment["loss_mask"])) for segment in self.segments)
        return 0 if self.completion_ids is None else len(self.completion_ids)


def by_prompt(group: Sequence[CompletionRow]) -> list[list[CompletionRow]]:
    """The completions of a data row, apart by the prompt ids that they were sampled behind; in one
    list where these are the same, which they are unless a chat template that says the date rendered
    the row again when its job went on. A failure stands with the completions of its prompt, or with
    the first ones.
    """
    parts: dict[bytes | None, list[CompletionRow]] = {}
    for row in group:
        if not row.failed:
            parts.setdefault(_prompt_key(row), [])
    if len(parts) < 2:
        return [list(group)]
    first = next(iter(parts.values()))
    for row in group:
        parts.get(_prompt_key(row), first).append(row)
    return list(parts.values())


def by_record(group: Sequence[CompletionRow]) -> list[list[CompletionRow]]:
    """The completions of a data row, apart by the rollout record that they can be of: as
    `by_prompt`, and by the run of Eval Protocol that they came from."""
    runs: dict[str | None, list[CompletionRow]] = {}
    for row in group:
        runs.setdefault(row.evaluation_row, []).append(row)
    return [part for run in runs.values() for part in by_prompt(run)]


def _prompt_key(row: CompletionRow) -> bytes | None:
    return None if row.prompt_ids is None else row.prompt_ids.tobytes()
