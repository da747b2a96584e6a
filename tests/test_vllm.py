"""Against a real vLLM server that serves the bundled model (see CONTRIBUTING.md).

`EP_RFT_VLLM_URL` names one started with `--logprobs-mode processed_logprobs`.
"""

from __future__ import annotations

import asyncio
import os

import pytest
import torch
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig
from transformers import AutoModelForCausalLM

from eval_protocol_rft import FireworksTrainingRolloutProcessor, RolloutRecord
from eval_protocol_rft.local.models import bundled_model_path

URL = os.environ.get("EP_RFT_VLLM_URL", "")
FOLDER = str(bundled_model_path("arithmetic"))
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not URL, reason="EP_RFT_VLLM_URL names no vLLM server"),
]


async def _records(questions: list[str], **params: object) -> list[RolloutRecord]:
    processor = FireworksTrainingRolloutProcessor(tokenizer=FOLDER)
    rows = [EvaluationRow(messages=[Message(role="user", content=q)]) for q in questions]
    config = RolloutProcessorConfig(
        completion_params={"model": "arithmetic", "api_base": URL, "max_tokens": 8, **params},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(64),
    )
    try:
        done = await asyncio.gather(*processor(rows, config))
    finally:
        await processor.acleanup()
    return [RolloutRecord.from_extra(row.execution_metadata.extra) for row in done]


@torch.no_grad()
def _forced(record: RolloutRecord, index: int, temperature: float) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = record.completion_ids[index]
    logits = model(input_ids=torch.tensor([record.prompt_ids + ids])).logits[0]
    scaled = (logits[len(record.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
    return scaled.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_processed_logprobs_equal_a_teacher_forced_forward(temperature: float) -> None:
    [record] = await _records(
        ["17+25="], n=8, seed=1, temperature=temperature, logprobs_mode="processed_logprobs"
    )
    assert len(record) == 8
    assert record.failures == []
    for index, logprobs in enumerate(record.inference_logprobs):
        assert logprobs == pytest.approx(_forced(record, index, temperature), abs=1e-5)


async def test_many_prompts_come_back_whole_and_seeded() -> None:
    questions = [f"{a}+{b}=" for a in range(10, 18) for b in range(30, 38)]
    first = await _records(questions, n=8, seed=7)
    again = await _records(questions, n=8, seed=7)
    assert [len(record) for record in first] == [8] * 64
    assert [r.completion_ids for r in first] == [r.completion_ids for r in again]
    assert any(ids != first[0].completion_ids[0] for ids in first[0].completion_ids)


async def test_unnamed_logprobs_at_another_temperature_are_refused() -> None:
    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"):
        await _records(["17+25="], n=2, temperature=0.7)


async def test_top_p_and_stop_strings() -> None:
    [record] = await _records(
        ["17+25="], n=8, top_p=0.5, stop=["2"], logprobs_mode="processed_logprobs"
    )
    assert record.sampling.support_truncated
    assert all("2" not in text for text in record.completions_text)
