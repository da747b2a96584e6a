"""Eval Protocol's own remote processors against a gateway, the agent in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status
from eval_protocol.pytest import RemoteRolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft.episodes.gateway import AgentRolloutProcessor, Gateway
from eval_protocol_rft.rollout import read_remote_rows
from eval_protocol_rft.sampling import Completion
from eval_protocol_rft.training import TrainingBatch, build_batch
from tests.remote_rows import ASKED, CALL, TOKENIZER, said
from tests.rollouts import TOOLS
from tests.serving import ScriptedSampler

ROOT = Path(__file__).parents[3]


def answer(ids: Sequence[int], params: Any, seed: int | None) -> Completion:
    """A call at first, and then what came of it."""
    asked = TOKENIZER.decode(list(ids))
    return said("It is 42." if "tool\n42" in asked else "I will add.\n" + CALL)


def row(number: int) -> EvaluationRow:
    row = EvaluationRow(messages=[Message(**m) for m in ASKED], tools=TOOLS)
    row.input_metadata.row_id = "row-1"
    metadata = row.execution_metadata
    metadata.invocation_id, metadata.experiment_id = "invocation-1", "experiment-1"
    metadata.run_id, metadata.rollout_id = f"run-{number}", f"rollout-{number}"
    return row


def config(**params: Any) -> RolloutProcessorConfig:
    return RolloutProcessorConfig(
        completion_params={"model": "policy", "temperature": 1.0, **params},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(4),
        steps=1,
        kwargs={"poll_interval": 0.02, "timeout_seconds": 60},
    )


@contextlib.contextmanager
def agent_process(gateway_url: str) -> Iterator[str]:
    """The agent's server, which logs to a gateway; yields its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.remote_agent"],
        cwd=ROOT,
        env={**os.environ, "FW_TRACING_GATEWAY_BASE_URL": gateway_url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.communicate("")


@contextlib.asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, sampler: Any) -> AsyncIterator[Gateway]:
    async with Gateway(sampler, TOKENIZER, tracing=True) as gateway:
        port = gateway.url.rpartition(":")[2]
        monkeypatch.setenv("EP_MODEL_BASE_URL", f"http://localhost:{port}")
        monkeypatch.setenv("EP_REMOTE_API_KEY", gateway.api_key)
        yield gateway


def same(batch: TrainingBatch, other: TrainingBatch) -> bool:
    arrays = ("input_tokens", "target_tokens", "logprobs", "advantages", "weights")
    return len(batch) == len(other) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(batch.datums, other.datums, strict=True)
        for name in arrays
    )


def scored(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    for number, one in enumerate(rows):
        one.evaluation_result = EvaluateResult(score=float(number), reason="-")
    return list(rows)


async def our_rows(*, says_run: bool = False) -> list[EvaluationRow]:
    """The same agent as a function of `AgentRolloutProcessor`'s; it may begin each run with another
    message."""

    async def agent(row: EvaluationRow, session: Any) -> None:
        client, messages = session.openai(), list(ASKED)
        if says_run:
            messages[0] = {"role": "system", "content": row.execution_metadata.run_id}
        while True:
            reply = await client.chat.completions.create(
                model="policy", messages=messages, tools=TOOLS
            )
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return
            for call in message.tool_calls:
                numbers = json.loads(call.function.arguments)
                result = str(numbers["a"] + numbers["b"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    processor = AgentRolloutProcessor(
        agent, sampler=ScriptedSampler(answer), tokenizer=TOKENIZER.tokenizer
    )
    try:
        return list(await asyncio.gather(*processor([row(1), row(2)], config())))
    finally:
        await processor.acleanup()


def test_rows_that_eval_protocol_brings_back_train_as_our_own_of_the_same_calls(
    monkeypatch: pytest.MonkeyPatch,
):
    async def run() -> None:
        sampler = ScriptedSampler(answer)
        async with serving(monkeypatch, sampler) as gateway:
            with agent_process(gateway.url) as url:
                processor = RemoteRolloutProcessor(remote_base_url=url, include_payloads=True)
                params = config(base_url="http://elsewhere:8000/v1")
                rows = await asyncio.gather(*processor([row(1), row(2)], params))
                await processor.acleanup()
        for number, back in enumerate(rows, start=1):
            assert back.rollout_status.code == Status.Code.FINISHED
            assert back.execution_metadata.rollout_id == f"rollout-{number}"
            roles = [message.role for message in back.messages]
            assert roles == ["system", "user", "assistant", "tool", "assistant"]
            extra = back.execution_metadata.extra
            assert extra["answer"] == "It is 42."
            (departure,) = extra["gateway"]["departures"]
            assert departure["asked"] == "http://elsewhere:8000/v1"
            assert [p["assistant_turn_index"] for p in extra["assistant_turn_payloads"]] == [0, 1]
            sent = [p["prompt_token_ids"] for p in extra["assistant_turn_payloads"]]
            assert all(ids in [asked for asked, _, _ in sampler.asked] for ids in sent)
        (read, _) = read_remote_rows(rows, tokenizer=TOKENIZER)
        record = read.execution_metadata.extra
        assert record["episodes"][0]["metrics"]["departures"] == [departure]
        assert record["sampling"]["logprobs"] == "sampling"
        theirs = build_batch(scored(rows), tokenizer=TOKENIZER)
        assert same(theirs, build_batch(scored(await our_rows())))

    asyncio.run(run())


def test_runs_whose_agents_begin_differently_are_one_prompt_group():
    batch = build_batch(scored(asyncio.run(our_rows(says_run=True))))
    assert (batch.stats.groups, batch.stats.completions) == (1, 2)
