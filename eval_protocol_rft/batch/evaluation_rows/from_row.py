"""Rows of Eval Protocol as rows of the file: the way back from `evaluation_rows`. Pure; on plain
dicts, so without importing Eval Protocol.

Invariant: see `evaluation_rows`. No two completions of a row have the same `sample_idx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from eval_protocol_rft.batch.evaluation_rows.file_part import FilePart, read_file_part
from eval_protocol_rft.batch.evaluation_rows.record import score_of_result
from eval_protocol_rft.batch.evaluation_rows.rest import extra_of, row_id_of, shared_fields
from eval_protocol_rft.batch.evaluation_rows.to_row import INTERNAL
from eval_protocol_rft.batch.rollouts.format import PromptKind
from eval_protocol_rft.batch.rollouts.rows import UNSCORED, CompletionRow, Score
from eval_protocol_rft.record import RecordError, RolloutRecord, SamplingRecord, has_record


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
