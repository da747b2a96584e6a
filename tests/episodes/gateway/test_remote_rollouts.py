"""Eval Protocol's own remote processors against a gateway, the agent in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from eval_protocol.exceptions import UnavailableError
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status
from eval_protocol.pytest import RemoteRolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig
from openai import APIError, AsyncOpenAI

from eval_protocol_rft.episodes.gateway import AgentRolloutProcessor, Gateway
from eval_protocol_rft.record import RecordError, RolloutRecord
from eval_protocol_rft.rollout import read_remote_rows
from eval_protocol_rft.sampling import Completion, RefusedError
from eval_protocol_rft.training import Segment, TrainingBatch, build_batch
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


Agent = Callable[[dict[str, Any], Any], Awaitable[None]]
"""Of a request to begin a rollout and a client for its model."""


@contextlib.asynccontextmanager
async def remote_server(gateway: Gateway, agent: Agent) -> AsyncIterator[str]:
    """A remote server in this process, whose agent says that it is done whatever happens to it."""

    async def roll_out(request: dict[str, Any]) -> None:
        async with AsyncOpenAI(
            base_url=request["model_base_url"], api_key=request["api_key"], max_retries=0
        ) as client:
            with contextlib.suppress(APIError):
                await agent(request, client)
        log = {
            "tags": [f"rollout_id:{request['metadata']['rollout_id']}"],
            "status": {"code": 100, "message": "done", "details": []},
            "message": "done",
        }
        async with aiohttp.ClientSession() as http:
            await http.post(f"{gateway.url}/logs", json=log)

    running: list[asyncio.Task[None]] = []

    async def init(request: web.Request) -> web.Response:
        running.append(asyncio.create_task(roll_out(await request.json())))
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/init", init)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")
        await asyncio.gather(*running)


async def asked(client: Any, *messages: dict[str, Any]) -> dict[str, Any]:
    reply = await client.chat.completions.create(model="m", messages=list(messages))
    return reply.choices[0].message.model_dump(exclude_none=True)


def brought_back(
    monkeypatch: pytest.MonkeyPatch,
    agent: Agent,
    sampler: Any,
    *rows: EvaluationRow,
    **options: Any,
) -> tuple[list[EvaluationRow], list[Segment]]:
    """The rows after their rollouts, and the segments of the first one as the gateway has them."""

    async def run() -> tuple[list[EvaluationRow], list[Segment]]:
        async with (
            serving(monkeypatch, sampler, **options) as gateway,
            remote_server(gateway, agent) as url,
        ):
            processor = RemoteRolloutProcessor(remote_base_url=url, include_payloads=True)
            (back,) = await asyncio.gather(*processor([row(1)], config()))
            await processor.acleanup()
            assert gateway._tracing is not None
            kept = gateway._tracing.store._rollouts["rollout-1"].session
            assert kept is not None
            return back, kept.record().segments

    return asyncio.run(run())


def payloads_alone(row: EvaluationRow) -> EvaluationRow:
    """The row as another proxy's would be: without the gateway's own record."""
    own = {*RolloutRecord.__struct_fields__} - {"assistant_turn_payloads"}
    extra = row.execution_metadata.extra or {}
    kept = {key: value for key, value in extra.items() if key not in own}
    metadata = row.execution_metadata.model_copy(update={"extra": kept})
    return row.model_copy(update={"execution_metadata": metadata})


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
        ours = build_batch(scored(await our_rows()))
        others = [payloads_alone(one) for one in scored(rows)]
        assert same(build_batch(others, tokenizer=TOKENIZER), ours)
        assert same(build_batch(rows), ours)  # by the record that the gateway sent
        for read in read_remote_rows([rows[0], others[0]], tokenizer=TOKENIZER):
            record = RolloutRecord.from_extra(read.execution_metadata.extra)
            assert record.sampling.logprobs == "sampling"
            assert record.episodes is not None
            assert record.episodes[0].metrics["departures"] == [departure]
            assert record.episodes[0].row_messages == 2
            assert "prompt_token_ids" not in read.execution_metadata.extra

    asyncio.run(run())


def test_runs_whose_agents_begin_differently_are_one_prompt_group():
    batch = build_batch(scored(asyncio.run(our_rows(says_run=True))))
    assert (batch.stats.groups, batch.stats.completions) == (1, 2)


def test_what_is_in_no_trace_trains_too():
    replies = iter(("Plan.", "a sub-agent's", "one", "two", "three"))

    async def agent(request: dict[str, Any], client: Any) -> None:
        kept = await asked(client, *ASKED)
        await asked(client, {"role": "system", "content": "B"}, user("a task"))
        await asked(client, *ASKED, kept, user("Go on."))  # whose answer is thrown away
        history = [*ASKED, {"role": "assistant", "content": "The plan, in my words."}]
        last = await asked(client, *history, user("Go on."))
        await asked(client, *history, user("Go on."), last, user("Sure?"))

    with pytest.MonkeyPatch.context() as patch:
        sampler = ScriptedSampler(lambda *_: said(next(replies)))
        back, segments = brought_back(patch, agent, sampler)
    extra = back.execution_metadata.extra
    record = RolloutRecord.from_extra(extra)
    assert record.trajectories == [segments]
    sampled = [
        TOKENIZER.decode(s.tokens[s.loss_mask == 1].tolist()).split("<|im_end|>") for s in segments
    ]
    assert sorted(text for texts in sampled for text in texts if text) == sorted(
        ("Plan.", "a sub-agent's", "one", "two", "three")
    )
    # By its traces alone nobody could tell: the plan is in the agent's words.
    with pytest.raises(RecordError, match="turn 0, an assistant message, has no payload"):
        list(read_remote_rows([payloads_alone(back)], tokenizer=TOKENIZER))


def test_a_rollout_whose_model_failed_is_rolled_out_again_whatever_its_agent_said():
    failing = [True]

    def script(*_: Any) -> Completion:
        if failing:
            raise RefusedError("out of memory")
        return said("It is 42.")

    async def agent(request: dict[str, Any], client: Any) -> None:
        await asked(client, *ASKED)

    async def run(patch: pytest.MonkeyPatch) -> None:
        async with (
            serving(patch, ScriptedSampler(script)) as gateway,
            remote_server(gateway, agent) as url,
        ):
            processor = RemoteRolloutProcessor(remote_base_url=url, include_payloads=True)
            with pytest.raises(UnavailableError, match=r"no completion: .*out of memory"):
                await asyncio.gather(*processor([row(1)], config()))
            failing.clear()
            (back,) = await asyncio.gather(*processor([row(1)], config()))
            await processor.acleanup()
        assert back.rollout_status.code == Status.Code.FINISHED
        assert back.messages[-1].content == "It is 42."

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(patch))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
