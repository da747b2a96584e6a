"""Rows of a rollout file as rows of Eval Protocol; `_from_ep` is the way back. Pure; on plain
dicts, so without importing Eval Protocol.

Invariant: file -> rows -> file gives the same rows. Rows -> file -> rows does so too, but for
logprobs, which a file holds as float32. What a rollout record has no key for travels in
`extra["rollout_file"]`, which is believed only while it is about the completions that are on the
row; what a file has no column for, in `evaluation_row`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft import _segments
from eval_protocol_rft._segments import EpisodeRecord, Segment
from eval_protocol_rft._turn_payloads import episode_traces, turn_payloads
from eval_protocol_rft.data import _records as records
from eval_protocol_rft.data._episodes import EPISODE_KEYS, stored_row
from eval_protocol_rft.data._format import CompletionRow, FileMetadata, without_news
from eval_protocol_rft.record import UNSCORED, RecordError, Score, score_of_result
from eval_protocol_rft.rollout import chat_finish_reason, recorded_answers

FINISHED = 100
INTERNAL = 13
"""The status codes of a rollout that ended well, and of one that failed."""
FILE_KEY = "rollout_file"
"""Key of `extra`. Inside the column `evaluation_row` it holds something else: see `Imported`."""
OPTIONAL_KEYS = (
    "failures", "token_turn_traces", "assistant_turn_payloads", "raw_logprobs", "rewards",
    "completion_results",
)  # fmt: skip
"""Keys that a record may be without."""
_FILE_WIDE = ("prompt_kind", "sampling", "data", "episodes", "rewards")
SHARED_COLUMNS = ("began_at", "temperature", "top_p", "top_k", "max_tokens")
"""What a record says once for all completions, and a file of each."""


class FilePart(msgspec.Struct, frozen=True, kw_only=True):
    """`extra["rollout_file"]`: what the record has no place for."""

    data_idx: int
    first: int = 0
    """`sample_idx` of the first completion of its run of the data row."""
    generated: bool
    """The columns hold all of the row; False where it came from Eval Protocol."""
    has_original: bool
    """`input_metadata.dataset_info` is the data set's columns."""
    file: FileMetadata
    """As much of it as `_FILE_WIDE` names."""
    tokens: int
    """Checksum of the surviving completions' ids, and of all segments of episodes."""
    survived: list[dict[str, Any]]
    """Of each survivor, the columns that a record holds once for all of them, or not at all."""
    failed: list[dict[str, Any]]
    """As in the record, with the same columns and the prompt's ids."""
    scores: dict[str, list[dict[str, Any]]]
    """Further reward columns, by survivor."""


def to_rows(
    group: Sequence[CompletionRow], metadata: FileMetadata, *, tokens: records.Tokens = "lists"
) -> Iterator[dict[str, Any]]:
    """The completions of a data row as rows of Eval Protocol: one, or one for each of its runs, and
    for each prompt where they were sampled behind several, as a record has one prompt for all its
    completions. They share their row id, and so are one prompt group. Arguments and errors are
    those of `to_row`.
    """
    for part in records.by_record(group):
        yield to_row(part, metadata, tokens=tokens)


def to_row(
    group: Sequence[CompletionRow], metadata: FileMetadata, *, tokens: records.Tokens = "lists"
) -> dict[str, Any]:
    """One row of Eval Protocol, as its JSON, of all completions of a data row.

    Args:
        group: in the order of `sample_idx`, all of one run and behind the same prompt ids.
        metadata: of their file.
        tokens: the form of the token data; "none" needs no columns of it.

    Returns:
        Where no completion survived, the row's `rollout_status` is an error, as after a failed
        rollout, and it has no record.

    Raises:
        RecordError: the completions have different prompts, or are of several runs; or nothing says
            at which temperature they were sampled.
    """
    if len(parts := records.by_record(group)) > 1:
        raise RecordError(
            f"row {group[0].row_id!r}: its completions were sampled behind {len(parts)} different"
            " prompts or in as many runs, and a rollout record is of one"
        )
    survivors = [row for row in group if not row.failed]
    row = asked_row(group[0])
    stored = dict(row["execution_metadata"].get("extra") or {})
    imported = stored.pop(FILE_KEY, None)
    first = 0 if imported is None else imported.get("first", 0)
    if survivors:
        record = records.record_fields(
            group, survivors, stored, metadata, first=first, tokens=tokens
        )
        extra = {**_as_it_was(record, group, imported, tokens), **_foreign(stored)}
        moved = imported is None or imported["answer"] != survivors[0].sample_idx
        if "trajectories" in extra and (moved or "token_turn_traces" not in stored):
            _put_traces(extra)
        _put_answer(row, survivors[0], extra, imported, tokens)
        _leave_to_result(row, survivors, extra, imported)
    else:
        extra = stored
        _take_answer_away(row, extra, imported)
        message = records.failed_message(group)
        row["rollout_status"] = {"code": INTERNAL, "message": message, "details": []}
    if tokens != "none":
        extra[FILE_KEY] = _file_part(group, survivors, metadata, first, extra.get("trajectories"))
    row["execution_metadata"]["extra"] = extra
    return row


def asked_row(first: CompletionRow) -> dict[str, Any]:
    """The row without what is said per completion."""
    if first.evaluation_row is not None:
        return stored_row(first)
    row = {
        # Eval Protocol reads a message without content as one of empty text.
        "messages": [{"content": None, **message} for message in records.as_messages(first.prompt)],
        "input_metadata": {"row_id": first.row_id, "dataset_info": dict(first.original)},
        "execution_metadata": {},
        "rollout_status": {"code": FINISHED, "message": "Rollout finished", "details": []},
    }
    optional = {"tools": first.tools, "ground_truth": first.ground_truth}
    return row | {name: value for name, value in optional.items() if value is not None}


def _foreign(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in stored.items() if k not in ("sampling", *EPISODE_KEYS)}


def _as_it_was(
    record: dict[str, Any],
    group: Sequence[CompletionRow],
    imported: Mapping[str, Any] | None,
    tokens: records.Tokens,
) -> dict[str, Any]:
    """The record; of an imported row with those of the optional keys that it had, or that have
    something to say now."""
    survivors = [row for row in group if not row.failed]
    raw = [row.raw_logprobs for row in survivors]
    if tokens == "lists":
        record["raw_logprobs"] = [None if values is None else values.tolist() for values in raw]
    elif tokens == "arrays":
        record["raw_logprobs"] = raw
    scored = any("reward" in row.scores for row in survivors)
    wanted = {
        "failures": bool(record["failures"]) or imported is None,
        "token_turn_traces": imported is None,
        "completion_messages": any(row.message is not None for row in survivors),
        "raw_logprobs": any(values is not None for values in raw),
        "rewards": scored,
        "completion_results": any(map(_explained, survivors)) or (scored and imported is None),
    }
    keys = imported["keys"] if imported is not None else ()
    return {k: v for k, v in record.items() if wanted.get(k, True) or k in keys}


def _explained(row: CompletionRow) -> bool:
    score = row.scores.get("reward", UNSCORED)
    return not (score.reason is None and score.error is None and not score.metrics)


def _put_answer(
    row: dict[str, Any],
    first: CompletionRow,
    extra: dict[str, Any],
    imported: Mapping[str, Any] | None,
    tokens: records.Tokens,
) -> None:
    """Let the row's conversation be the first survivor's, and say what was sampled for it. In a row
    that was imported it is, unless the completion, or the episode, that it was is gone."""
    answer = imported["answer"] if imported is not None else None
    stays = first.evaluation_row is not None and answer in (None, first.sample_idx)
    if "episodes" in extra:
        if answer != first.sample_idx:
            episode = msgspec.convert(extra["episodes"][0], EpisodeRecord)
            _put_messages(row, [], episode.messages, episode.last_finish_reason)
    elif not stays:
        split = bool(extra["sampling"].get("split_reasoning", True))
        said = recorded_answers([first.response or ""], [first.message], split_reasoning=split)
        asked = row["messages"] if answer is None else row["messages"][:-1]
        _put_messages(row, asked, said, first.finish_reason or "stop")
    if tokens == "none" or (
        imported is not None and "assistant_turn_payloads" not in imported["keys"]
    ):
        return
    if "assistant_turn_payloads" in extra and answer in (None, first.sample_idx):
        return  # what it said was not what its turns say
    traces = extra.get("token_turn_traces") or [first_trace(extra)]
    extra["assistant_turn_payloads"] = turn_payloads(traces, row["messages"])


def _put_traces(extra: dict[str, Any]) -> None:
    """Let the turns on record be those of the first episode, where they are."""
    if "token_turn_traces" in extra:
        episode = msgspec.convert(extra["episodes"][0], EpisodeRecord)
        read = [Segment(**segment) for segment in extra["trajectories"][0]]
        extra["token_turn_traces"] = episode_traces(read, episode.last_finish_reason)


def _put_messages(
    row: dict[str, Any], asked: list[Any], said: Sequence[dict[str, Any]], finish_reason: Any
) -> None:
    row["messages"] = [*asked, *({"content": None, **message} for message in said)]
    row["execution_metadata"] |= {
        "finish_reason": chat_finish_reason(finish_reason, said[-1].get("tool_calls") or []),
        "tool_call_count": sum(len(message.get("tool_calls") or []) for message in said),
    }


def _take_answer_away(
    row: dict[str, Any], extra: dict[str, Any], imported: Mapping[str, Any] | None
) -> None:
    """Let the row be one that was asked and not answered."""
    own = None if imported is None else imported.get("row_messages")
    if "trajectories" in extra and "episodes" in extra:  # as version 1 keeps them
        own = next(iter(extra["episodes"].values())).get("row_messages")
    if own is not None or "episodes" in extra:
        for key in (*EPISODE_KEYS, "token_turn_traces", "assistant_turn_payloads"):
            extra.pop(key, None)
        for key in ("finish_reason", "tool_call_count", "usage"):
            row["execution_metadata"].pop(key, None)
        row["messages"] = row["messages"][:own]
    elif imported is not None and imported["answer"] is not None:
        row["messages"] = row["messages"][:-1]


def _leave_to_result(
    row: dict[str, Any],
    survivors: Sequence[CompletionRow],
    extra: dict[str, Any],
    imported: Mapping[str, Any] | None,
) -> None:
    """Let an imported row whose only completion has its score as `evaluation_result` be as it was,
    unless it was scored since."""
    result = row.get("evaluation_result")
    if imported is None or result is None or len(survivors) != 1:
        return
    if {"rewards", "completion_results"}.isdisjoint(imported["keys"]) and survivors[0].scores.get(
        "reward"
    ) == score_of_result(result):
        extra.pop("rewards", None)
        extra.pop("completion_results", None)


def _file_part(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    metadata: FileMetadata,
    first: int,
    trajectories: Any,
) -> dict[str, Any]:
    others = sorted({name for row in group for name in row.scores if name != "reward"})
    part = FilePart(
        file=metadata,
        data_idx=group[0].data_idx,
        first=first,
        generated=group[0].evaluation_row is None,
        has_original=bool(group[0].original),
        tokens=checksum([row.completion_ids for row in survivors], trajectories),
        survived=[_columns_of(row) for row in survivors],
        failed=[{**records.failure(row, first), **_columns_of(row)} for row in group if row.failed],
        scores={
            name: [_plain_score(row.scores.get(name, UNSCORED)) for row in survivors]
            for name in others
        },
    )
    values: dict[str, Any] = msgspec.to_builtins(part)
    file = {name: values["file"][name] for name in _FILE_WIDE}
    for name in ("sampling", "data"):
        file[name] = None if file[name] is None else without_news(file[name])
    values["file"] = {k: v for k, v in file.items() if k != "episodes" or v is not None}
    if not first:
        del values["first"]
    return values


def _plain_score(score: Score) -> dict[str, Any]:
    return {name: getattr(score, name) for name in score.__struct_fields__}


def checksum(completions: Sequence[Any], trajectories: Any) -> int:
    """Of the ids of all completions [G][T_i], and of all segments where they are episodes."""
    checksum = 0
    segments = (segment["tokens"] for episode in trajectories or () for segment in episode)
    for ids in (*completions, *segments):
        checksum = zlib.crc32(np.asarray(ids, "<i4").tobytes(), checksum)
    return checksum


def _columns_of(row: CompletionRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in SHARED_COLUMNS if getattr(row, name) is not None}
    if row.failed:
        values["kind"] = row.error_kind
        values["prompt_ids"] = None if row.prompt_ids is None else row.prompt_ids.tolist()
    # A record has no way to say that these are not known.
    return values | {name: None for name in ("attempts", "seconds") if getattr(row, name) is None}


def first_trace(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The turn that the first completion was."""
    ids, logprobs = extra["completion_ids"][0], extra["inference_logprobs"][0]
    return _segments.turn_trace(extra["prompt_ids"], ids, logprobs, extra["finish_reasons"][0])
