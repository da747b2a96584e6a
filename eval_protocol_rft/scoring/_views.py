"""One row per completion: what the user's evaluator gets to see.

Invariant: a view shares nothing mutable with its row or with another view, so an evaluator may
change what it is given. It looks like the row would if that completion were its answer, and holds
no rollout record, so nothing can score it once per completion again.
"""

from __future__ import annotations

from typing import Any

import msgspec
from eval_protocol.models import EvaluationRow, Message

from eval_protocol_rft._turns import EpisodeRecord
from eval_protocol_rft.record import (
    ARRAY_KEYS,
    PUBLISHED_KEYS,
    SCHEMA_VERSION,
    RecordError,
    has_record,
    is_failure,
    is_marked,
)
from eval_protocol_rft.rollout import (
    as_message,
    assistant_message,
    chat_finish_reason,
    is_same_answer,
    recorded_answers,
)

HIDDEN_KEYS = frozenset(
    {*ARRAY_KEYS, "rft_schema", "rewards", "completion_results", "completion_messages", "episodes"}
)
"""Keys of `extra` that a view has not: token arrays, the record's mark, and earlier scores."""


class _ScoredPart(msgspec.Struct, frozen=True):
    """The part of a rollout record that scoring needs. Reading no more than this leaves the
    token arrays untouched, and rows that were logged without them can be scored."""

    completions_text: list[str]
    finish_reasons: list[str]
    rft_schema: int = SCHEMA_VERSION
    sampling: dict[str, Any] | None = None
    """None where only the published keys are there."""
    completion_messages: list[dict[str, Any] | None] | None = None
    episodes: list[EpisodeRecord] | None = None


def rollout_failed(row: EvaluationRow) -> bool:
    """Whether the row's status is one of the errors."""
    return is_failure(row.rollout_status.code)


def completion_views(row: EvaluationRow) -> list[EvaluationRow] | None:
    """A view of `row` per completion, in order; None where the row has no rollout record, or has
    one that an earlier rollout left and this one failed to replace.

    A view is the row with the completion as its last message, no evaluation_result, that
    completion's finish reason, and an `extra` that has `completion_index` and `finish_reason` but
    none of `HIDDEN_KEYS`. The other fields are deep copies of the row's. Of an episode it has all
    messages, and `extra["episode"]` with its turns, stop reason, step rewards and metrics.

    Raises:
        RecordError: the record is unreadable, or the row's last message is not its first
            completion.
    """
    extra = row.execution_metadata.extra
    if not extra or rollout_failed(row) or not has_record(extra):
        return None
    record = _read(row, extra)
    if record.episodes is not None:
        return _episode_views(row, extra, record.episodes)
    answers = recorded_answers(
        record.completions_text,
        record.completion_messages,
        split_reasoning=_splits_reasoning(row, record),
    )
    messages = [as_message(answer) for answer in answers]
    if messages:
        _check_last_message(row, messages[0])
    template = _template(row, extra)
    return [
        _view(template, index, [message], chat_finish_reason(finish_reason, message.tool_calls))
        for index, (message, finish_reason) in enumerate(
            zip(messages, record.finish_reasons, strict=True)
        )
    ]


def _episode_views(
    row: EvaluationRow, extra: dict[str, Any], episodes: list[EpisodeRecord]
) -> list[EvaluationRow]:
    template = _template(row, extra)
    template.messages = []
    views = []
    for index, episode in enumerate(episodes):
        messages = [Message(**message) for message in episode.messages]
        called = messages[-1].tool_calls if messages else None
        last = chat_finish_reason(episode.last_finish_reason, called)
        view = _view(template, index, messages, last)
        about = {
            "turns": episode.turns,
            "stop_reason": episode.stop_reason,
            "step_rewards": list(episode.step_rewards),
            "metrics": dict(episode.metrics),
        }
        view.execution_metadata.extra = {**(view.execution_metadata.extra or {}), "episode": about}
        views.append(view)
    return views


def _splits_reasoning(row: EvaluationRow, record: _ScoredPart) -> bool:
    """Whether thoughts are apart from content, as in the row's own answer."""
    if record.sampling is not None:
        return bool(record.sampling.get("split_reasoning", True))
    if not row.messages or not record.completions_text:
        return True
    split = assistant_message(record.completions_text[0], split_reasoning=True)
    return is_same_answer(row.messages[-1], split)


def _read(row: EvaluationRow, extra: dict[str, Any]) -> _ScoredPart:
    where = f"row {row.input_metadata.row_id}"
    try:
        fields = extra if is_marked(extra) else {key: extra[key] for key in PUBLISHED_KEYS}
        record = msgspec.convert(fields, _ScoredPart)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: invalid rollout record: {error}") from error
    if record.rft_schema != SCHEMA_VERSION:
        raise RecordError(
            f"{where}: rft_schema is {record.rft_schema}, this version reads {SCHEMA_VERSION}"
        )
    if len(record.completions_text) != len(record.finish_reasons):
        raise RecordError(
            f"{where}: {len(record.completions_text)} completions_text but "
            f"{len(record.finish_reasons)} finish_reasons"
        )
    if len(record.completion_messages or record.completions_text) != len(record.completions_text):
        raise RecordError(
            f"{where}: {len(record.completions_text)} completions_text but "
            f"{len(record.completion_messages or ())} completion_messages"
        )
    return record


def _check_last_message(row: EvaluationRow, first: Message) -> None:
    """The prompt is everything before the last message, so that one must be the completion."""
    last = row.messages[-1] if row.messages else None
    if last is None or not is_same_answer(last, first):
        raise RecordError(
            f"row {row.input_metadata.row_id}: its last message is not its completion 0, so the "
            f"prompt cannot be told from the answer: {_shown(last)} against {_shown(first)}; "
            "restore row.messages as the rollout left them"
        )


def _shown(message: Message | None) -> str:
    return "no message" if message is None else f"{message.role} {str(message.content)[:60]!r}"


def _template(row: EvaluationRow, extra: dict[str, Any]) -> EvaluationRow:
    """What the views of a row have in common; it shares everything with the row."""
    visible = {key: value for key, value in extra.items() if key not in HIDDEN_KEYS}
    metadata = row.execution_metadata.model_copy(update={"extra": visible})
    return row.model_copy(
        update={
            "messages": row.messages[:-1],
            "evaluation_result": None,
            "execution_metadata": metadata,
        }
    )


def _view(
    template: EvaluationRow, index: int, messages: list[Message], finish_reason: str
) -> EvaluationRow:
    view = template.model_copy(deep=True)
    view.messages.extend(messages)
    metadata = view.execution_metadata
    metadata.finish_reason = finish_reason
    metadata.tool_call_count = sum(len(message.tool_calls or []) for message in messages)
    metadata.extra = {
        **(metadata.extra or {}),
        "completion_index": index,
        "finish_reason": finish_reason,
    }
    return view
