"""Sessions on their row: the record of each rollout, and the conversation of the first one.

Invariant: as for single completions: everything is built before the row is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._segments import EpisodeRecord
from eval_protocol_rft.episodes._alive import alive_score
from eval_protocol_rft.episodes._conversation import traces_of
from eval_protocol_rft.episodes.gateway._trajectory import SessionRecord
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.record import UNSCORED, RolloutRecord, SamplingRecord

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message


MOST_TRACED = 1 << 20
"""Prompt tokens in `token_turn_traces`, each turn with its whole prompt; of a longer conversation
they would grow with the square of it, and are left out. Segments hold each token once."""


def put_on_row(
    row: EvaluationRow,
    group: sampling.Group,
    sessions: Sequence[SessionRecord],
    *,
    request: rollout.RolloutRequest,
    tokenizer: LoadedTokenizer,
    asked: Sequence[Message],
    split_reasoning: bool,
    began_at: float,
    seconds: float,
) -> None:
    """Put rollouts on their row.

    Args:
        row: whose messages become the conversation of the first rollout.
        group: the first turn of each, and the rollouts that failed.
        sessions: [G] those that did not, in the same order.
        request: what the model was asked with.
        tokenizer: the model's.
        asked: the row's own messages.
        split_reasoning: whether thinking stands in a field of its own.
        began_at: Unix seconds.
        seconds: that all took.
    """
    from eval_protocol.models import Message

    first = sessions[0]
    messages = [Message(**{"content": None, **m}) for m in first.record.messages]
    begins = len(asked) <= len(messages) and all(map(_is_same, asked, messages))
    record = record_of(
        group,
        sessions,
        request=request,
        tokenizer=tokenizer,
        own=len(asked) if begins else None,
        split_reasoning=split_reasoning,
        began_at=began_at,
    )
    row.tools = None if first.tools is None else [dict(tool) for tool in first.tools]
    rollout.put_on_row(
        row,
        record,
        messages,
        prompt_tokens=sum(done.sent_tokens for done in sessions),
        completion_tokens=sum(done.sampled_tokens for done in sessions),
        finish_reason=first.path[-1].completion.finish_reason,
        tool_calls=sum(len(message.tool_calls or []) for message in messages),
        seconds=seconds,
    )
    # For a rollout of this row again: its conversation need not begin with its own messages.
    extra = row.execution_metadata.extra
    assert extra is not None  # noqa: S101 - a record was put there
    extra.pop(rollout.ASKED_KEY, None)
    if not begins:
        extra[rollout.ASKED_KEY] = [m.model_dump(exclude_none=True) for m in asked]


def record_of(
    group: sampling.Group,
    sessions: Sequence[SessionRecord],
    *,
    request: rollout.RolloutRequest,
    tokenizer: LoadedTokenizer,
    own: int | None,
    split_reasoning: bool,
    began_at: float,
) -> RolloutRecord:
    """The record of rollouts of one row; `own` is how many messages of the first one are the
    row's, None where it does not begin with these."""
    first = sessions[0]
    record = rollout.build_record(
        group,
        first.first_prompt,
        request,
        tokenizer,
        reader=None,
        asked=(),
        split_reasoning=split_reasoning,
        began_at=began_at,
    )
    alive = [alive_score(done.record) for done in sessions]
    if any(score is not None for score in alive):
        scores = [score or UNSCORED for score in alive]
        record = msgspec.structs.replace(
            record, rewards=[score.reward for score in scores], completion_results=scores
        )
    return msgspec.structs.replace(
        record,
        sampling=_drawn(
            record.sampling, [params for done in sessions for params in done.sampled_with]
        ),
        trajectories=[done.segments for done in sessions],
        episodes=[_episode(done, first.first_prompt, own) for done in sessions],
        token_turn_traces=traces_of(first.path) if _sent(first) <= MOST_TRACED else [],
    )


def _sent(done: SessionRecord) -> int:
    return sum(turn.prompt.size for turn in done.path)


def asked_first(done: SessionRecord) -> list[dict[str, Any]]:
    """What the conversation begins with, up to its first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", done.record.messages))


def _drawn(told: SamplingRecord, used: Sequence[sampling.SamplingParams]) -> SamplingRecord:
    """What calls were really sampled with: agents ask for settings of their own. Where they asked
    for several, it is not one number."""

    def one(name: str) -> Any:
        values = {getattr(params, name) for params in used}
        return values.pop() if len(values) == 1 else None

    return msgspec.structs.replace(
        told,
        prompts="agent",
        temperature=one("temperature"),
        top_p=one("top_p"),
        top_k=one("top_k"),
        support_truncated=any(map(sampling.support_truncated, used)),
    )


def _episode(done: SessionRecord, prompt: sampling.TokenIds, own: int | None) -> EpisodeRecord:
    """How a rollout went; agents of a row may begin with other prompts than `prompt`."""
    is_same = done.first_prompt == prompt
    return msgspec.structs.replace(
        done.record,
        row_messages=own,
        prompt_ids=None if is_same else list(done.first_prompt),
    )


def _is_same(message: Message, other: Message) -> bool:
    try:
        return message.role == other.role and rollout.text_of(0, message.content) == other.content
    except rollout.PromptError:  # images and the like, which no agent has sent
        return False
