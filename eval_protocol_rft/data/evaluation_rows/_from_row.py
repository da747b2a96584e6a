"""Rows of Eval Protocol as rows of the file: the way back from `evaluation_rows`. Pure; on plain
dicts, so without importing Eval Protocol.

Invariant: see `evaluation_rows`. No two completions of a row have the same `sample_idx`.

What all completions of a row of Eval Protocol say alike, as columns of the file. Pure.

Invariant: what no column holds is in `evaluation_row`, or the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.data.evaluation_rows._record import (
    EPISODE_KEYS,
    FILE_KEY,
    OPTIONAL_KEYS,
    SAMPLING_BY_PLACE,
    FilePart,
    Imported,
    read_file_part,
    score_of_result,
    trace,
)
from eval_protocol_rft.data.evaluation_rows._to_row import FINISHED, INTERNAL
from eval_protocol_rft.data.rollouts._format import PromptKind
from eval_protocol_rft.data.rollouts._rows import UNSCORED, CompletionRow, Score
from eval_protocol_rft.record import (
    RecordError,
    RolloutRecord,
    SamplingRecord,
    has_record,
    is_marked,
    turn_payloads,
)
from eval_protocol_rft.rollout import answer_fields

_DERIVED = frozenset(RolloutRecord.__struct_fields__) - frozenset(EPISODE_KEYS)
"""Keys of `extra` that the columns hold."""
_PER_COMPLETION = (
    "indices", "seeds", "policy_versions", "first_policy_versions", "request_ids", "attempts",
    "seconds", "past_end",
)  # fmt: skip
_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id")
"""What the file's prompt column holds of a message."""
_OF_A_GENERATED_ROW = frozenset(
    {"messages", "tools", "ground_truth", "input_metadata", "execution_metadata", "rollout_status"}
    | {"created_at", "pid"}
)
_OF_ITS_METADATA = frozenset(
    {"row_id", "dataset_info", "extra", "finish_reason", "tool_call_count"}
    | {"invocation_id", "experiment_id", "rollout_id"}
)
"""What `to_row` writes, and what Eval Protocol's models add by themselves."""


def shared_fields(
    row: Mapping[str, Any],
    record: RolloutRecord | None,
    known: FilePart | None,
    data_idx: int,
    prompt_kind: PromptKind,
    *,
    keep_row: bool,
) -> dict[str, Any]:
    """The columns that all completions of the row have alike."""
    messages = row.get("messages") or []
    answered = record is not None and bool(messages) and messages[-1].get("role") == "assistant"
    prompt: Any = [_message(message) for message in _asked(messages, record, answered=answered)]
    if prompt_kind == "text":
        prompt = _only_text(prompt)
    info = (row.get("input_metadata") or {}).get("dataset_info") or {}
    generated = known is not None and known.generated and not keep_row and _is_bare(row)
    number = data_idx if known is None else known.data_idx
    return {
        "row_id": row_id_of(row) or str(number),
        "data_idx": number,
        "prompt": prompt,
        "tools": row.get("tools"),
        "ground_truth": row.get("ground_truth"),
        "original": dict(info) if known is not None and known.has_original else {},
        "evaluation_row": None if generated else _rest(row, record, answered=answered),
    }


def _asked(
    messages: list[Mapping[str, Any]], record: RolloutRecord | None, *, answered: bool
) -> list[Mapping[str, Any]]:
    """The messages that were there before anything was sampled."""
    if record is not None and record.episodes and record.episodes[0].row_messages is not None:
        return messages[: record.episodes[0].row_messages]
    return messages[:-1] if answered else messages


def _rest(row: Mapping[str, Any], record: RolloutRecord | None, *, answered: bool) -> str:
    """The row without what the columns hold, as JSON text. Its own `FILE_KEY` says which optional
    keys the record had, and whose text the last message is."""
    extra = extra_of(row)
    kept = {k: v for k, v in extra.items() if k not in _DERIVED and k != FILE_KEY}
    sampling: Mapping[str, Any] | None = extra.get("sampling")
    if record is not None and not is_marked(extra):
        # Another program's: what it calls by our names is not what we mean by them.
        kept = {k: v for k, v in kept.items() if k not in EPISODE_KEYS}
        split = _splits_reasoning(row, record) if answered else True
        sampling = {**msgspec.to_builtins(record.sampling), "split_reasoning": split}
    if sampling is not None:
        kept["sampling"] = {
            # An empty list says that no completion has one, and no column would.
            k: v
            for k, v in sampling.items()
            if k not in _PER_COMPLETION or v == []
        }
    if record is not None:
        told = record.sampling
        for name in SAMPLING_BY_PLACE:
            if values := getattr(told, name):
                # By place, as completions may be filtered out of the file.
                kept["sampling"][name] = dict(zip(map(str, told.indices), values, strict=True))
        for key in EPISODE_KEYS:
            if getattr(record, key) is not None:
                kept[key] = dict(zip(map(str, told.indices), extra[key], strict=True))
        traces = extra.get("token_turn_traces") or [_first_trace(extra)]
        if traces != [_first_trace(extra)]:
            kept["token_turn_traces"] = traces
        payloads = extra.get("assistant_turn_payloads")
        if payloads is not None and payloads != turn_payloads(traces, row.get("messages") or []):
            kept["assistant_turn_payloads"] = payloads
        kept[FILE_KEY] = Imported(
            keys=[key for key in OPTIONAL_KEYS if extra.get(key) is not None],
            answer=told.indices[0] if answered or record.episodes else None,
        )
    metadata = {**(row.get("execution_metadata") or {}), "extra": kept}
    return msgspec.json.encode({**row, "execution_metadata": metadata}).decode()


def _splits_reasoning(row: Mapping[str, Any], record: RolloutRecord) -> bool:
    """Whether the row's answer has its thoughts apart."""
    split = answer_fields(record.completions_text[0], split_reasoning=True)
    answer = row["messages"][-1]
    return all(answer.get(k) == split.get(k) for k in ("content", "reasoning_content"))


def _is_bare(row: Mapping[str, Any]) -> bool:
    """Whether the row says nothing but what `to_row` wrote, so that the columns hold it all."""
    metadata = row.get("execution_metadata") or {}
    asked = row.get("input_metadata") or {}
    return (
        _said(row) <= _OF_A_GENERATED_ROW
        and _said(metadata) <= _OF_ITS_METADATA
        and _said(metadata["extra"]) <= _DERIVED | {FILE_KEY}
        and (_said(asked) - {"row_id", "dataset_info"} <= {"completion_params"})
        and not asked.get("completion_params")
        and (row.get("rollout_status") or {}).get("code") in (FINISHED, INTERNAL)
    )


def _said(values: Mapping[str, Any]) -> set[str]:
    return {key for key, value in values.items() if value is not None}


def _first_trace(extra: Mapping[str, Any]) -> dict[str, Any]:
    ids, logprobs = extra["completion_ids"][0], extra["inference_logprobs"][0]
    return trace(extra["prompt_ids"], ids, logprobs, extra["finish_reasons"][0])


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the fields that the file's prompt column has."""
    kept = {name: message[name] for name in _MESSAGE_FIELDS if message.get(name) is not None}
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(_text(part) for part in kept["content"])
    return kept


def _text(part: Mapping[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise RecordError(
            f"a message holds {part.get('type')!r}, and the file's prompts are text: keep "
            "such rows as Eval Protocol wrote them"
        )
    return str(part["text"])


def _only_text(prompt: list[dict[str, Any]]) -> str:
    if len(prompt) != 1 or set(prompt[0]) != {"role", "content"} or prompt[0]["role"] != "user":
        raise RecordError(
            f"its prompt is {len(prompt)} messages, and the file's prompts are text: one "
            "message of the user"
        )
    return str(prompt[0]["content"])


def extra_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`execution_metadata.extra`."""
    return (row.get("execution_metadata") or {}).get("extra") or {}


def row_id_of(row: Mapping[str, Any]) -> str | None:
    """`input_metadata.row_id`."""
    return (row.get("input_metadata") or {}).get("row_id")


class FailedRolloutError(RecordError):
    """The rollout of the row failed, or it never had one."""


def from_row(
    row: Mapping[str, Any], data_idx: int, *, prompt_kind: PromptKind, keep_row: bool = False
) -> list[CompletionRow]:
    """The completions of one row of Eval Protocol, given as its JSON, by `sample_idx`.

    Args:
        row: with a rollout record, or one that `to_row` made of completions that all failed.
        data_idx: its number, where it did not come from a rollout file.
        prompt_kind: of the file to be; `text` needs prompts of a single user message.
        keep_row: keep in `evaluation_row` also what the file that the row came from says of all
            its rows, where the file to be does not say so.

    Raises:
        FailedRolloutError: there is no record, or it is not of this row's last rollout.
        RecordError: the record is invalid, or the prompt has no place in the file.
    """
    try:
        return _completions(row, data_idx, prompt_kind, keep_row=keep_row)
    except RecordError as error:
        raise type(error)(f"row {row_id_of(row)!r}: {error}") from error


def _completions(
    row: Mapping[str, Any], data_idx: int, prompt_kind: PromptKind, *, keep_row: bool
) -> list[CompletionRow]:
    extra = extra_of(row)
    status = row.get("rollout_status") or {}
    failed = status.get("code") == INTERNAL
    params = (row.get("input_metadata") or {}).get("completion_params")
    recorded = has_record(extra) and not failed
    record = RolloutRecord.from_extra(extra, params) if recorded else None
    known = read_file_part(extra)
    if record is not None:
        rows = _from_record(record, known)
        result = row.get("evaluation_result")
        if result is not None and len(record) == 1 and not _has_scores(record):
            rows[0].scores["reward"] = score_of_result(result)
    elif known is not None and failed and not known.survived:
        rows = [_failed(failure) for failure in known.failed]
    else:
        raise FailedRolloutError(
            f"it has no rollout; its rollout status is {status.get('message')!r}"
        )
    _check_places(rows)
    shared = shared_fields(row, record, known, data_idx, prompt_kind, keep_row=keep_row)
    for completion in rows:
        for name, value in shared.items():
            setattr(completion, name, value)
    return sorted(rows, key=lambda completion: completion.sample_idx)


def _from_record(record: RolloutRecord, known: FilePart | None) -> list[CompletionRow]:
    prompt_ids = _ids(record.prompt_ids, "prompt_ids")
    rows = [_survivor(record, i, prompt_ids, known) for i in range(len(record))]
    if known is not None:
        failed = known.failed
    else:
        params = _params(record.sampling)
        failed = [{**msgspec.to_builtins(failure), **params} for failure in record.failures]
    return [*rows, *(_failed(failure) for failure in failed)]


def _has_scores(record: RolloutRecord) -> bool:
    return record.rewards is not None or record.completion_results is not None


def _survivor(
    record: RolloutRecord, i: int, prompt_ids: Any, known: FilePart | None
) -> CompletionRow:
    sampling, firsts = record.sampling, record.sampling.first_policy_versions
    raw = record.raw_logprobs[i] if record.raw_logprobs is not None else None
    past_end = sampling.past_end[i] if sampling.past_end else None
    own = _params(sampling) if known is None else known.survived[i]
    values = {"attempts": sampling.attempts[i], "seconds": sampling.seconds[i], **own}
    return CompletionRow(
        **_NO_KEYS,
        sample_idx=sampling.indices[i],
        response=record.completions_text[i],
        message=record.completion_messages[i] if record.completion_messages else None,
        prompt_ids=prompt_ids,
        completion_ids=_ids(record.completion_ids[i], f"completion {i}: completion_ids"),
        logprobs=np.array(record.inference_logprobs[i], np.float32),
        raw_logprobs=None if raw is None else np.array(raw, np.float32),
        finish_reason=record.finish_reasons[i],
        truncated=record.truncated[i],
        past_end=_ids(past_end, f"completion {i}: past_end") if past_end else None,
        seed=sampling.seeds[i],
        policy_version=sampling.policy_versions[i],
        first_policy_version=firsts[i] if firsts else None,
        request_id=sampling.request_ids[i],
        scores=_scores(record, i, known),
        **values,
    )


def _scores(record: RolloutRecord, i: int, known: FilePart | None) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    if record.completion_results is not None:
        said = record.completion_results[i]
        scores["reward"] = Score(
            reward=said.score, reason=said.reason, metrics=said.metrics or None, error=said.error
        )
    elif record.rewards is not None:
        scores["reward"] = Score(reward=record.rewards[i])
    if known is not None:
        scores |= {name: values[i] for name, values in known.scores.items()}
    return {name: score for name, score in scores.items() if score != UNSCORED}


def _failed(failure: Mapping[str, Any]) -> CompletionRow:
    values = dict(failure)
    prompt_ids = values.pop("prompt_ids", None)
    return CompletionRow(
        **_NO_KEYS,
        sample_idx=values.pop("index"),
        error=values.pop("message"),
        error_kind=values.pop("kind"),
        error_status=values.pop("status"),
        prompt_ids=None if prompt_ids is None else _ids(prompt_ids, "prompt_ids"),
        **values,
    )


def _params(sampling: SamplingRecord) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "max_tokens")
    return {name: getattr(sampling, name) for name in names} | {
        "began_at": sampling.began_at or None
    }


def _check_places(rows: list[CompletionRow]) -> None:
    places = [row.sample_idx for row in rows]
    if not rows:
        raise RecordError("the record holds no completions")
    if len(set(places)) < len(places):
        double = next(place for place in places if places.count(place) > 1)
        raise RecordError(f"two completions have the index {double}")


def _ids(values: list[int], where: str) -> Any:
    try:
        return np.array(values, np.int32)
    except OverflowError as error:
        raise RecordError(f"{where}: {max(values, key=abs)} is no token id") from error


_NO_KEYS: dict[str, Any] = {"row_id": "", "data_idx": 0, "prompt": ""}
"""Stand in until `shared_fields` is known."""
