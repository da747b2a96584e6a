"""Rows of the file as rows of Eval Protocol, and back. Pure; on plain dicts, so without importing
Eval Protocol.

Invariant: file -> rows -> file gives the same rows. Rows -> file -> rows does so too, but for
logprobs, which a file holds as float32. What a rollout record has no key for travels in
`extra["rollout_file"]`; what a file has no column for, in `evaluation_row`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.batch.format import FileMetadata, SamplingSettings
from eval_protocol_rft.batch.rows import UNSCORED, CompletionRow, Score
from eval_protocol_rft.prompts import answer_fields
from eval_protocol_rft.record import SCHEMA_VERSION, RecordError, RolloutRecord, SamplingRecord

FILE_KEY = "rollout_file"
"""Key of `extra` for what only the file knows."""
_FINISHED = {"code": 100, "message": "Rollout finished", "details": []}
_INTERNAL = 13
_DERIVED = frozenset(RolloutRecord.__struct_fields__)
"""Keys of `extra` that the columns hold."""
_PER_COMPLETION = ("indices", "seeds", "policy_versions", "request_ids", "attempts", "seconds")


def to_row(
    group: Sequence[CompletionRow], metadata: FileMetadata, *, arrays: bool = False
) -> dict[str, Any]:
    """One row of Eval Protocol, as its JSON, of all completions of a data row.

    Args:
        group: in the order of `sample_idx`.
        metadata: of their file.
        arrays: leave token data as numpy arrays, which `training` reads without a copy.

    Returns:
        Where no completion survived, the row's `rollout_status` is an error, as after a failed
        rollout, and it has no record.
    """
    first = group[0]
    survivors = [row for row in group if not row.failed]
    row = _base(first, metadata)
    extra = dict(row["execution_metadata"].get("extra") or {})
    sampling = extra.pop("sampling", None)
    extra[FILE_KEY] = _file_part(group, survivors)
    if survivors:
        extra |= _record(group, survivors, _sampling(sampling, group, metadata), arrays=arrays)
        split = bool(extra["sampling"].get("split_reasoning", True))
        if first.evaluation_row is None:
            answer = answer_fields(survivors[0].response or "", split_reasoning=split)
            row["messages"] = [*row["messages"], answer]
            row["rollout_status"] = dict(_FINISHED)
            row["execution_metadata"]["finish_reason"] = survivors[0].finish_reason
    elif first.evaluation_row is None:
        message = f"none of {len(group)} completions survived; the first: {first.error}"
        row["rollout_status"] = {"code": _INTERNAL, "message": message, "details": []}
    row["execution_metadata"]["extra"] = extra
    return row


def from_row(row: Mapping[str, Any], data_idx: int, *, prompt_kind: str) -> list[CompletionRow]:
    """The completions of one row of Eval Protocol, given as its JSON.

    Args:
        row: with a rollout record, or one whose rollout failed.
        data_idx: its number, where it did not come from a rollout file.
        prompt_kind: of the file to be; `text` needs prompts of a single user message.

    Raises:
        RecordError: the record is missing or invalid.
    """
    extra = dict((row.get("execution_metadata") or {}).get("extra") or {})
    known = extra.get(FILE_KEY)
    if "rft_schema" in extra:
        rows = _from_record(row, extra, known or {})
    elif known is not None:
        rows = [_failed(failure) for failure in known["failed"]]
    else:
        raise RecordError(
            f"row {_row_id(row)}: it has no rollout record; its rollout status is "
            f"{(row.get('rollout_status') or {}).get('message')!r}"
        )
    shared = _shared(row, extra, known, data_idx, prompt_kind)
    for completion in rows:
        for name, value in shared.items():
            setattr(completion, name, value)
    return sorted(rows, key=lambda completion: completion.sample_idx)


def _base(first: CompletionRow, metadata: FileMetadata) -> dict[str, Any]:
    """The row without what is said per completion."""
    if first.evaluation_row is not None:
        row: dict[str, Any] = msgspec.json.decode(first.evaluation_row)
        return row
    prompt = first.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    row = {
        "messages": messages,
        "input_metadata": {"row_id": first.row_id, "dataset_info": dict(first.original)},
        "execution_metadata": {},
    }
    if first.tools is not None:
        row["tools"] = first.tools
    if first.ground_truth is not None:
        row["ground_truth"] = first.ground_truth
    return row


def _sampling(
    own: Mapping[str, Any] | None, group: Sequence[CompletionRow], metadata: FileMetadata
) -> dict[str, Any]:
    """How the group was sampled, as the record says it, but for the lists per completion."""
    if own is not None:
        return dict(own)
    settings = metadata.sampling or SamplingSettings(
        model="unknown",
        temperature=_or(group[0].temperature, 1.0),
        top_p=_or(group[0].top_p, 1.0),
        top_k=int(_or(group[0].top_k, 0)),
        n=len(group),
    )
    values: dict[str, Any] = msgspec.to_builtins(settings)
    for name in ("chat_template_kwargs", "system", "seed_given"):
        values.pop(name)
    began = [row.began_at for row in group if row.began_at is not None]
    return {**values, "n": len(group), "began_at": min(began, default=0.0)}


def _record(
    group: Sequence[CompletionRow],
    survivors: Sequence[CompletionRow],
    sampling: Mapping[str, Any],
    *,
    arrays: bool,
) -> dict[str, Any]:
    """The keys of a rollout record."""

    def numbers(array: Any) -> Any:
        return array if arrays or array is None else array.tolist()

    prompt_ids = numbers(survivors[0].prompt_ids)
    ids = [numbers(row.completion_ids) for row in survivors]
    logprobs = [numbers(row.logprobs) for row in survivors]
    raw = [numbers(row.raw_logprobs) for row in survivors]
    record: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "inference_logprobs": logprobs,
        "completions_text": [row.response for row in survivors],
        "truncated": [row.truncated for row in survivors],
        "finish_reasons": [row.finish_reason for row in survivors],
        "failures": [_failure(row) for row in group if row.failed],
        "token_turn_traces": [
            {
                "prompt_ids": prompt_ids,
                "completion_ids": ids[0],
                "completion_logprobs": logprobs[0],
                "finish_reason": survivors[0].finish_reason,
            }
        ],
        "sampling": {
            **sampling,
            "indices": [row.sample_idx for row in survivors],
            "seeds": [row.seed for row in survivors],
            "policy_versions": [row.policy_version for row in survivors],
            "request_ids": [row.request_id for row in survivors],
            "attempts": [_or(row.attempts, 1) for row in survivors],
            "seconds": [_or(row.seconds, 0.0) for row in survivors],
        },
        "rft_schema": SCHEMA_VERSION,
    }
    if any(values is not None for values in raw):
        record["raw_logprobs"] = raw
    scores = [row.scores.get("reward", UNSCORED) for row in survivors]
    if any(score != UNSCORED for score in scores):
        record["rewards"] = [score.reward for score in scores]
        record["completion_results"] = [
            {
                "score": score.reward,
                "reason": score.reason,
                "metrics": score.metrics or {},
                "error": score.error,
            }
            for score in scores
        ]
    return record


def _file_part(
    group: Sequence[CompletionRow], survivors: Sequence[CompletionRow]
) -> dict[str, Any]:
    """What the record has no place for."""
    others = {name for row in group for name in row.scores if name != "reward"}
    return {
        "data_idx": group[0].data_idx,
        "generated": group[0].evaluation_row is None,
        "survived": [_extras(row) for row in survivors],
        "failed": [{**_extras(row), **_failure(row)} for row in group if row.failed],
        "scores": {
            name: [msgspec.to_builtins(row.scores.get(name, UNSCORED)) for row in survivors]
            for name in sorted(others)
        },
    }


def _extras(row: CompletionRow) -> dict[str, Any]:
    prompt_ids = None if row.prompt_ids is None or not row.failed else row.prompt_ids.tolist()
    values = {
        "began_at": row.began_at,
        "temperature": row.temperature,
        "top_p": row.top_p,
        "top_k": row.top_k,
        "max_tokens": row.max_tokens,
        "prompt_ids": prompt_ids,
    }
    return {name: value for name, value in values.items() if value is not None}


def _failure(row: CompletionRow) -> dict[str, Any]:
    return {
        "index": row.sample_idx,
        "kind": row.error_kind or "internal",
        "message": row.error,
        "attempts": _or(row.attempts, 0),
        "seconds": _or(row.seconds, 0.0),
        "seed": row.seed,
        "status": row.error_status,
    }


def _from_record(
    row: Mapping[str, Any], extra: Mapping[str, Any], known: Mapping[str, Any]
) -> list[CompletionRow]:
    try:
        record = RolloutRecord.from_extra(extra)
    except RecordError as error:
        raise RecordError(f"row {_row_id(row)}: {error}") from error
    rows = [_survivor(record, i, known) for i in range(len(record))]
    failed = known.get("failed") or [
        {**msgspec.to_builtins(failure), **_params(record.sampling)} for failure in record.failures
    ]
    return [*rows, *(_failed(failure) for failure in failed)]


def _survivor(record: RolloutRecord, i: int, known: Mapping[str, Any]) -> CompletionRow:
    sampling = record.sampling
    raw = record.raw_logprobs[i] if record.raw_logprobs is not None else None
    scores: dict[str, Score] = {}
    if record.completion_results is not None:
        said = record.completion_results[i]
        scores["reward"] = Score(
            reward=said.score, reason=said.reason, metrics=said.metrics or None, error=said.error
        )
    elif record.rewards is not None:
        scores["reward"] = Score(reward=record.rewards[i])
    for name, values in (known.get("scores") or {}).items():
        scores[name] = msgspec.convert(values[i], Score)
    own = dict(known["survived"][i]) if "survived" in known else _params(sampling)
    return CompletionRow(
        **_NO_KEYS,
        sample_idx=sampling.indices[i],
        response=record.completions_text[i],
        prompt_ids=np.array(record.prompt_ids, np.int32),
        completion_ids=np.array(record.completion_ids[i], np.int32),
        logprobs=np.array(record.inference_logprobs[i], np.float32),
        raw_logprobs=None if raw is None else np.array(raw, np.float32),
        finish_reason=record.finish_reasons[i],
        truncated=record.truncated[i],
        seed=sampling.seeds[i],
        policy_version=sampling.policy_versions[i],
        request_id=sampling.request_ids[i],
        attempts=sampling.attempts[i],
        seconds=sampling.seconds[i],
        scores={name: score for name, score in scores.items() if score != UNSCORED},
        **own,
    )


def _failed(failure: Mapping[str, Any]) -> CompletionRow:
    values = dict(failure)
    prompt_ids = values.pop("prompt_ids", None)
    return CompletionRow(
        **_NO_KEYS,
        sample_idx=values.pop("index"),
        error=values.pop("message"),
        error_kind=values.pop("kind"),
        error_status=values.pop("status"),
        prompt_ids=None if prompt_ids is None else np.array(prompt_ids, np.int32),
        **values,
    )


def _params(sampling: SamplingRecord) -> dict[str, Any]:
    names = ("began_at", "temperature", "top_p", "top_k", "max_tokens")
    return {name: getattr(sampling, name) for name in names}


def _shared(
    row: Mapping[str, Any],
    extra: Mapping[str, Any],
    known: Mapping[str, Any] | None,
    data_idx: int,
    prompt_kind: str,
) -> dict[str, Any]:
    """What all completions of a row say alike."""
    generated = bool(known and known.get("generated"))
    failed = (row.get("rollout_status") or {}).get("code") == _INTERNAL
    answered = not failed and "rft_schema" in extra
    messages = [_message(message) for message in row.get("messages") or []]
    prompt: Any = messages[:-1] if answered else messages
    if prompt_kind == "text":
        [only] = prompt
        prompt = only["content"]
    info = (row.get("input_metadata") or {}).get("dataset_info") or {}
    return {
        "row_id": _row_id(row) or str(data_idx),
        "data_idx": known["data_idx"] if known else data_idx,
        "prompt": prompt,
        "tools": row.get("tools"),
        "ground_truth": row.get("ground_truth"),
        "original": dict(info) if generated else {},
        "evaluation_row": None if generated else _rest(row, extra),
    }


def _rest(row: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """The row without what the columns hold, as JSON text."""
    kept = {k: v for k, v in extra.items() if k not in _DERIVED and k != FILE_KEY}
    sampling = extra.get("sampling")
    if sampling is not None:
        kept["sampling"] = {k: v for k, v in sampling.items() if k not in _PER_COMPLETION}
    metadata = {**(row.get("execution_metadata") or {}), "extra": kept}
    return msgspec.json.encode({**row, "execution_metadata": metadata}).decode()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the fields that the file's prompt column has."""
    names = ("role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id")
    kept = {name: message[name] for name in names if message.get(name) is not None}
    if isinstance(kept.get("content"), list):
        parts = kept["content"]
        kept["content"] = "".join(str(part.get("text", "")) for part in parts)
    return kept


def _row_id(row: Mapping[str, Any]) -> str | None:
    return (row.get("input_metadata") or {}).get("row_id")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


_NO_KEYS: dict[str, Any] = {"row_id": "", "data_idx": 0, "prompt": ""}
"""Stand in until `_shared` is known."""
