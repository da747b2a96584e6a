"""An iterative run on sums, as tests start it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.loop.fireworks import StepReport, StepSettings
from eval_protocol_rft.loop.fireworks._iterate import iterate
from tests.fireworks_clients import client
from tests.service import BASE, arithmetic_base


def right_sum(row: EvaluationRow) -> EvaluationRow:
    right = str(row.messages[-1].content).strip() == row.ground_truth
    row.evaluation_result = EvaluateResult(score=float(right))
    return row


def sums(count: int) -> list[EvaluationRow]:
    pairs = [(10 + 7 * i % 90, 13 + 11 * i % 77) for i in range(count)]
    return [
        EvaluationRow(
            messages=[Message(role="user", content=f"{a}+{b}=")],
            ground_truth=str(a + b),
            input_metadata=InputMetadata(row_id=f"{a}+{b}"),
        )
        for a, b in pairs
    ]


async def run_sums(
    url: str,
    folder: Path,
    *,
    rows: int,
    n: int,
    transport: Any = None,
    evaluator: Any = right_sum,
    **options: Any,
) -> list[StepReport]:
    """`iterate` with its own client, and little waiting between looks."""
    given: dict[str, Any] = {
        "run": "sums",
        "steps": 2,
        "base_model": BASE,
        "deployment": "dep",
        "settings": StepSettings(learning_rate=5e-4, lora_rank=8, epochs=4),
        "poll_seconds": 0.02,
        **options,
    }
    async with client(url, transport=transport) as fireworks:
        return await iterate(
            evaluator,
            sums(rows),
            client=fireworks,
            folder=folder,
            completion_params={"n": n, "max_tokens": 6, "seed": 7},
            processor=FireworksTrainingRolloutProcessor(tokenizer=arithmetic_base().tokenizer),
            **given,
        )
