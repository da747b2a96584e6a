"""Rows of the file as rows of Eval Protocol. Pure; on plain dicts, so without importing Eval
Protocol. `from_row` is the way back.

Invariant: file -> rows -> file gives the same rows. Rows -> file -> rows does so too, but for
logprobs, which a file holds as float32. What a rollout record has no key for travels in
`extra["rollout_file"]`; what a file has no column for, in `evaluation_row`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from eval_protocol_rft._episode_record import EpisodeRecord
from eval_protocol_rft.data.evaluation_rows._record import (
    EPISODE_KEYS,
    FILE_KEY,
    Imported,
    episode_traces,
    file_part,
    record_of,
    sampling_of,
    score_of_result,
    trace,
)
from eval_protocol_rft.data.rollouts._format import FileMetadata, FormatError
from eval_protocol_rft.data.rollouts._rows import CompletionRow, by_prompt
from eval_protocol_rft.record import RecordError, turn_payloads
from eval_protocol_rft.rollout import chat_finish_reason, recorded_answers

FINISHED = 100
INTERNAL = 13
"""The status codes of a rollout that ended well, and of one that failed."""


def to_rows(
    group: Sequence[CompletionRow], metadata: FileMetadata, *, arrays: bool = False
) -> Iterator[dict[str, Any]]:
    """The completions of a data row as rows of Eval Protocol: one, or one for each prompt where
    they were sampled behind several, as a record has one prompt for all its completions. They share
    their row id, and so are one prompt group. Arguments and errors are those of `to_row`.
    """
    for part in by_prompt(group):
        yield to_row(part, metadata, arrays=arrays)


def to_row(
    group: Sequence[CompletionRow], metadata: FileMetadata, *, arrays: bool = False
) -> dict[str, Any]:
    """One row of Eval Protocol, as its JSON, of all completions of a data row.

    Args:
        group: in the order of `sample_idx`, all sampled behind the same prompt ids.
        metadata: of their file.
        arrays: leave token data as numpy arrays, which `training` reads without a copy.

    Returns:
        Where no completion survived, the row's `rollout_status` is an error, as after a failed
        rollout, and it has no record.

    Raises:
        RecordError: the completions have different prompts; or nothing says at which temperature
            they were sampled.
    """
    if len(prompts := by_prompt(group)) > 1:
        raise RecordError(
            f"row {group[0].row_id!r}: its completions were sampled behind {len(prompts)} different"
            " prompts, and a rollout record has one"
        )
    survivors = [row for row in group if not row.failed]
    row = _base(group[0], metadata)
    extra = dict(row["execution_metadata"].get("extra") or {})
    imported = extra.pop(FILE_KEY, None) or {}
    own = extra.pop("sampling", None)
    if survivors:
        sampling = sampling_of(own, group, metadata)
        split = bool(sampling.get("split_reasoning", True))
        record = record_of(group, survivors, sampling, imported.get("keys"), arrays=arrays)
        for key in EPISODE_KEYS:
            if key in extra:
                extra[key] = [_of_place(extra[key], row, key) for row in survivors]
        extra = {**record, **extra}
        if "episodes" in extra:
            _put_episode(row, survivors[0], extra, imported)
        else:
            _put_answer(row, survivors[0], imported, split=split)
        _put_payloads(row, survivors[0], extra, imported)
        _leave_to_result(row, survivors, extra, imported)
    else:
        if own is not None:
            extra["sampling"] = own
        if "episodes" in extra:
            _drop_episodes(row, extra)
        elif imported.get("answer") is not None:
            row["messages"] = row["messages"][:-1]
        message = f"none of {len(group)} completions survived; the first: {group[0].error}"
        row["rollout_status"] = {"code": INTERNAL, "message": message, "details": []}
    extra[FILE_KEY] = file_part(group, survivors, metadata, extra.get("trajectories"))
    row["execution_metadata"]["extra"] = extra
    return row


def _base(first: CompletionRow, metadata: FileMetadata) -> dict[str, Any]:
    """The row without what is said per completion."""
    if first.evaluation_row is not None:
        return stored_row(first)
    prompt = first.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    row = {
        # Eval Protocol reads a message without content as one of empty text.
        "messages": [{"content": None, **message} for message in messages],
        "input_metadata": {"row_id": first.row_id, "dataset_info": dict(first.original)},
        "execution_metadata": {},
        "rollout_status": {"code": FINISHED, "message": "Rollout finished", "details": []},
    }
    if first.tools is not None:
        row["tools"] = first.tools
    if first.ground_truth is not None:
        row["ground_truth"] = first.ground_truth
    return row


def stored_row(completion: CompletionRow) -> dict[str, Any]:
    """What a row that came from Eval Protocol has kept in `evaluation_row`.

    Raises:
        FormatError: it is nothing that a conversion writes.
    """
    text = completion.evaluation_row or ""
    try:
        msgspec.json.decode(text, type=_StoredRow)
        row: dict[str, Any] = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(
            f"data row {completion.data_idx}, completion {completion.sample_idx}: evaluation_row "
            f"is none that `ep-rft convert` wrote: {error}"
        ) from error
    return row


def _of_place(values: Mapping[str, Any], completion: CompletionRow, key: str) -> Any:
    try:
        return values[str(completion.sample_idx)]
    except KeyError:
        raise FormatError(
            f"data row {completion.data_idx}, completion {completion.sample_idx}: evaluation_row "
            f"has no {key} of it"
        ) from None


class _StoredExtra(msgspec.Struct):
    rollout_file: Imported | None = None
    sampling: dict[str, Any] | None = None
    episodes: dict[str, EpisodeRecord] | None = None
    trajectories: dict[str, list[dict[str, Any]]] | None = None


class _StoredExecution(msgspec.Struct):
    extra: _StoredExtra | None = None


class _StoredRow(msgspec.Struct):
    """As much of it as is looked at here."""

    execution_metadata: _StoredExecution
    messages: list[dict[str, Any]] = []


def _put_episode(
    row: dict[str, Any],
    first: CompletionRow,
    extra: dict[str, Any],
    imported: Mapping[str, Any],
) -> None:
    """Let the row's conversation be the first surviving episode's, and the traces in `extra` its
    turns. In a row that was imported they are, unless that episode is gone."""
    if imported.get("answer") == first.sample_idx:
        return
    episode = msgspec.convert(extra["episodes"][0], EpisodeRecord)
    row["messages"] = [{"content": None, **message} for message in episode.messages]
    calls = sum(len(message.get("tool_calls") or []) for message in episode.messages)
    last = episode.last_finish_reason
    shown = chat_finish_reason(last, episode.messages[-1].get("tool_calls"))
    row["execution_metadata"] |= {"finish_reason": shown, "tool_call_count": calls}
    extra["token_turn_traces"] = episode_traces(extra["trajectories"][0], last)


def _drop_episodes(row: dict[str, Any], extra: dict[str, Any]) -> None:
    """Let the row be one that was asked and not answered."""
    told = [msgspec.convert(episode, EpisodeRecord) for episode in extra.pop("episodes").values()]
    for key in ("trajectories", "token_turn_traces", "assistant_turn_payloads"):
        extra.pop(key, None)
    for key in ("finish_reason", "tool_call_count", "usage"):
        row["execution_metadata"].pop(key, None)
    row["messages"] = row["messages"][: told[0].row_messages]


def _put_answer(
    row: dict[str, Any], first: CompletionRow, imported: Mapping[str, Any], *, split: bool
) -> None:
    """Let the row's last message be the first survivor's text. In a row that was imported it is,
    unless the completion that it was is gone."""
    answer = imported.get("answer")
    if first.evaluation_row is not None and answer in (None, first.sample_idx):
        return
    asked = row["messages"] if answer is None else row["messages"][:-1]
    (said,) = recorded_answers([first.response or ""], [first.message], split_reasoning=split)
    row["messages"] = [*asked, said]
    calls = said.get("tool_calls") or []
    metadata = row["execution_metadata"]
    metadata["finish_reason"] = chat_finish_reason(first.finish_reason or "stop", calls)
    metadata["tool_call_count"] = len(calls)


def _put_payloads(
    row: dict[str, Any],
    first: CompletionRow,
    extra: dict[str, Any],
    imported: Mapping[str, Any],
) -> None:
    """Say what was sampled for the row's answers; of an imported row, where it did."""
    if imported and "assistant_turn_payloads" not in imported["keys"]:
        return
    answer = imported.get("answer")
    if "assistant_turn_payloads" in extra and answer in (None, first.sample_idx):
        return  # what it said was not what its turns say
    ids, logprobs = extra["completion_ids"][0], extra["inference_logprobs"][0]
    own = [trace(extra["prompt_ids"], ids, logprobs, first.finish_reason)]
    traces = extra.get("token_turn_traces") or own
    extra["assistant_turn_payloads"] = turn_payloads(traces, row["messages"])


def _leave_to_result(
    row: dict[str, Any],
    survivors: Sequence[CompletionRow],
    extra: dict[str, Any],
    imported: Mapping[str, Any],
) -> None:
    """Let an imported row whose only completion has its score as `evaluation_result` be as it was,
    unless it was scored since."""
    result = row.get("evaluation_result")
    if not imported or result is None or len(survivors) != 1:
        return
    if {"rewards", "completion_results"}.intersection(imported["keys"]):
        return
    if survivors[0].scores.get("reward") == score_of_result(result):
        extra.pop("rewards", None)
        extra.pop("completion_results", None)
