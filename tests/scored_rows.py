"""Rows as a rollout leaves them, and what Eval Protocol needs to run an evaluator on them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from eval_protocol.dataset_logger.dataset_logger import DatasetLogger
from eval_protocol.models import EvaluateResult, EvaluationRow, Message
from eval_protocol.pytest.rollout_processor import RolloutProcessor

from eval_protocol_rft._segments import turn_trace
from eval_protocol_rft.record import RolloutRecord, SamplingRecord
from eval_protocol_rft.rollout._answers import assistant_message
from eval_protocol_rft.sampling._types import Failure


def record_of(
    texts: Sequence[str],
    *,
    finish_reasons: Sequence[Any] | None = None,
    split_reasoning: bool = True,
    num_failed: int = 0,
    tokens: int = 2,
    first_token: int = 100,
) -> RolloutRecord:
    """A valid record of these completions; the token ids mean nothing."""
    size = len(texts)
    reasons = list(finish_reasons or ["stop"] * size)
    ids = [[first_token + i] * tokens for i in range(size)]
    logprobs = [[-0.5] * tokens for _ in range(size)]
    return RolloutRecord(
        prompt_ids=[11, 12, 13],
        completion_ids=ids,
        inference_logprobs=logprobs,
        completions_text=list(texts),
        truncated=[reason == "length" for reason in reasons],
        finish_reasons=reasons,
        failures=[
            Failure(index=size + i, kind="timeout", message="-", attempts=1, seconds=1.0)
            for i in range(num_failed)
        ],
        token_turn_traces=[turn_trace([11, 12, 13], ids[0], logprobs[0], reasons[0])],
        sampling=SamplingRecord(
            model="m",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            n=size + num_failed,
            indices=list(range(size)),
            seeds=[None] * size,
            policy_versions=[None] * size,
            request_ids=[None] * size,
            attempts=[1] * size,
            seconds=[0.1] * size,
            split_reasoning=split_reasoning,
        ),
    )


def roll_out(row: EvaluationRow, texts: Sequence[str], **options: Any) -> EvaluationRow:
    """Put completions on a row that ends in the user's message."""
    split = options.get("split_reasoning", True)
    record = record_of(texts, **options)
    row.messages = [*row.messages, assistant_message(texts[0], split_reasoning=split)]
    row.execution_metadata.extra = {**(row.execution_metadata.extra or {}), **record.to_extra()}
    row.execution_metadata.finish_reason = record.finish_reasons[0]
    return row


def asked(question: str = "1+1?", **fields: Any) -> EvaluationRow:
    return EvaluationRow(messages=[Message(role="user", content=question)], **fields)


def answered(*texts: str, question: str = "1+1?", **options: Any) -> EvaluationRow:
    """A row with one completion per text."""
    return roll_out(asked(question), texts, **options)


def rewards(row: EvaluationRow) -> list[float | None]:
    extra = row.execution_metadata.extra
    assert extra is not None
    return extra["rewards"]


def results(row: EvaluationRow) -> list[dict[str, Any]]:
    extra = row.execution_metadata.extra
    assert extra is not None
    return extra["completion_results"]


def give(row: EvaluationRow, score: Any, **fields: Any) -> EvaluationRow:
    """The row with this score, as an evaluator returns it; the score may be anything."""
    row.evaluation_result = EvaluateResult(score=0.0, **fields)
    row.evaluation_result.score = score
    return row


def said(row: EvaluationRow) -> str:
    return str(row.messages[-1].content)


class Canned(RolloutProcessor):
    """Answers every row with the texts that `answers` has for its question; None is a rollout that
    fails."""

    def __init__(self, answers: dict[str, Sequence[str] | None], **options: Any) -> None:
        self.answers = answers
        self.options = options

    def __call__(self, rows: list[EvaluationRow], config: Any) -> list[asyncio.Task[EvaluationRow]]:
        async def one(row: EvaluationRow) -> EvaluationRow:
            texts = self.answers[str(row.messages[0].content)]
            if texts is None:
                raise RuntimeError("no completion survived")
            return roll_out(row, texts, **self.options)

        return [asyncio.create_task(one(row)) for row in rows]


class Rows(DatasetLogger):
    """Keeps the rows that Eval Protocol logs, the last state of each."""

    def __init__(self) -> None:
        self.by_rollout: dict[str | None, EvaluationRow] = {}

    def log(self, row: EvaluationRow) -> None:
        self.by_rollout[row.execution_metadata.rollout_id] = row

    def read(self, row_id: str | None = None) -> list[EvaluationRow]:
        return [row for row in self.by_rollout.values() if row.evaluation_result is not None]
