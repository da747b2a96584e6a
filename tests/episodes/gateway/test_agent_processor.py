"""`AgentRolloutProcessor`: agents of every kind on rows, and whatever they do wrong."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow, Message, Status
from eval_protocol.pytest.default_agent_rollout_processor import (
    AgentRolloutProcessor as EvalProtocolsAgent,
)
from eval_protocol.pytest.rollout_processor import RolloutProcessor

from eval_protocol_rft import AgentRolloutProcessor, ascore_rows, score_each_completion
from eval_protocol_rft.data._from_ep import from_row
from eval_protocol_rft.episodes.gateway import Command, Session, SessionLimits
from eval_protocol_rft.record import RolloutRecord
from eval_protocol_rft.rollout import RolloutError
from eval_protocol_rft.sampling import RetryPolicy, SamplingError
from eval_protocol_rft.training import build_batch
from tests.episodes.gateway.models import Model, tool_model
from tests.rollouts import TOOLS, config_of, row_of
from tests.waiting import wait_until


def tool_agent(row: EvaluationRow, session: Session) -> Any:
    """An agent as people write it: one loop, the client of the `openai` package."""
    client = session.openai()
    messages: list[Any] = [{"role": m.role, "content": m.content} for m in row.messages]
    while True:
        answer = client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
        message = answer.choices[0].message
        if not message.tool_calls:
            return {"answer": message.content}
        messages.append(message.model_dump(exclude_none=True))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "42"}
            for call in message.tool_calls
        ]


async def async_agent(row: EvaluationRow, session: Session) -> None:
    async with session.openai() as client:
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}]
        )


ASKS = """
import json, os, sys, urllib.request
row = json.load(open(os.environ["RFT_ROW"]))
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps({"model": "m", "messages": row["messages"]}).encode(),
    {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
"""
"""A program that asks the model for an answer to its row."""


def processor_of(agent: Any, model: Model, **options: Any) -> AgentRolloutProcessor:
    return AgentRolloutProcessor(agent, tokenizer=model.tokenizer, sampler=model, **options)


async def rolled_out(
    agent: Any, model: Model | None = None, *, n: int = 2, rows: int = 1, **options: Any
) -> list[EvaluationRow]:
    processor = processor_of(agent, model or tool_model(), **options)
    config = config_of({"model": "policy", "n": n, "temperature": 1.0, "seed": 3})
    try:
        given = [row_of(f"add {i}", row_id=f"row-{i}") for i in range(rows)]
        return list(await asyncio.gather(*processor(given, config)))
    finally:
        await processor.acleanup()


def record_of(row: EvaluationRow) -> RolloutRecord:
    return RolloutRecord.from_extra(row.execution_metadata.extra)


async def test_n_agents_of_a_row_are_scored_and_trained() -> None:
    model = tool_model()
    rows = await rolled_out(tool_agent, model, n=3, rows=2)

    @score_each_completion
    def judge(row: EvaluationRow) -> EvaluationRow:
        last = row.messages[-1]
        assert [m.role for m in row.messages] == ["user", "assistant", "tool", "assistant"]
        row.evaluation_result = EvaluateResult(score=float(last.content == "It is 42."))
        return row

    scored = await ascore_rows(rows, judge, mode="pointwise")
    for row in scored:
        record = record_of(row)
        assert record.rewards == [1.0, 1.0, 1.0]
        assert row.tools == TOOLS
        assert row.execution_metadata.tool_call_count == 1
        assert [episode.turns for episode in record.episodes or ()] == [2, 2, 2]
        metrics = [episode.metrics["returned"] for episode in record.episodes or ()]
        assert metrics == [{"answer": "It is 42."}] * 3
    sampled = [c for _, c in model.wire]
    kept = [s for row in scored for segments in record_of(row).trajectories or () for s in segments]
    assert sum(s.num_sampled for s in kept) == sum(len(c.token_ids) for c in sampled)
    ours = {tuple(s.logprobs[s.loss_mask == 1].tolist()) for s in kept}
    theirs = {
        tuple(np.array(one.logprobs + two.logprobs, np.float32).tolist())
        for one in sampled
        for two in sampled
    }
    assert ours <= theirs


async def test_the_same_seed_gives_the_same_seeds_whatever_the_order() -> None:
    one, two = tool_model(), tool_model()
    await rolled_out(tool_agent, one, n=2, rows=2)
    await rolled_out(tool_agent, two, n=2, rows=2)
    assert None not in one.seeds
    assert sorted(map(str, one.seeds)) == sorted(map(str, two.seeds))
    assert len(set(one.seeds)) == len(one.seeds)


async def test_an_agent_that_blocks_its_event_loop_keeps_no_one_waiting() -> None:
    barrier = threading.Barrier(4)

    async def blocking(row: EvaluationRow, session: Session) -> None:
        barrier.wait(timeout=60)  # all four are in it at once
        client = openai.OpenAI(base_url=session.base_url, api_key=session.api_key)
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    (row,) = await rolled_out(blocking, n=4)
    assert len(record_of(row)) == 4


async def test_what_was_sampled_before_an_agent_failed_is_kept() -> None:
    async def crashing(row: EvaluationRow, session: Session) -> None:
        await async_agent(row, session)
        raise ValueError("boom")

    (row,) = await rolled_out(crashing)
    for episode in record_of(row).episodes or ():
        assert episode.stop_reason == "crashed"
        assert episode.turns == 1
        assert episode.metrics["agent_error"] == "crashing() raised ValueError: boom"


async def test_an_agent_that_hangs_ends_with_its_time() -> None:
    freed = threading.Event()

    async def hanging(row: EvaluationRow, session: Session) -> None:
        await async_agent(row, session)
        await asyncio.Event().wait()

    def stuck(row: EvaluationRow, session: Session) -> None:
        tool_agent(row, session)
        freed.wait(60)

    limits = SessionLimits(seconds=4.0)
    both = await asyncio.gather(*(rolled_out(one, n=1, limits=limits) for one in (hanging, stuck)))
    freed.set()
    for (row,) in both:
        (episode,) = record_of(row).episodes or ()
        assert episode.stop_reason == "seconds"


async def test_a_rollout_without_a_call_is_a_failure_that_says_what_to_do() -> None:
    def elsewhere(row: EvaluationRow, session: Session) -> None:
        pass

    with pytest.raises(RolloutError, match="base URL and the key"):
        await rolled_out(elsewhere)


async def test_a_model_that_cannot_be_sampled_fails_rollouts_and_gives_no_reward() -> None:
    model = tool_model()

    def forgiving(row: EvaluationRow, session: Session) -> None:
        tool_agent(row, session)
        model.failing = SamplingError("the engine is gone", kind="unavailable")
        client = session.openai()
        with pytest.raises(openai.APIStatusError, match="the engine is gone"):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])

    with pytest.raises(RolloutError, match="the engine is gone") as raised:
        await rolled_out(forgiving, model, n=1, retry=RetryPolicy(max_attempts=1))
    assert raised.value.failures[0].kind == "unavailable"


async def test_agents_may_begin_with_other_prompts() -> None:
    def naming(row: EvaluationRow, session: Session) -> None:
        client = session.openai()
        for text in (f"I am {session.name}.", "Next."):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])

    model = Model(lambda prompt: "Hello.")
    rows = await rolled_out(naming, model, n=3)
    record = record_of(rows[0])
    prompts = [episode.prompt_ids or list(record.prompt_ids) for episode in record.episodes or ()]
    assert len(set(map(tuple, prompts))) == 3
    sent = [prompt for prompt, _ in model.wire]
    assert all(prompt in sent for prompt in prompts)
    rows[0].execution_metadata.extra |= {"rewards": [0.0, 1.0, 0.5]}
    batch = build_batch(rows)
    assert len(batch.datums) == 6
    dumped = rows[0].model_dump(mode="json")
    for completion in from_row(dumped, 0, prompt_kind="messages"):
        assert completion.prompt_ids.tolist() in prompts


async def test_a_row_is_rolled_out_again_from_its_own_messages() -> None:
    seen = []

    def rewording(row: EvaluationRow, session: Session) -> None:
        seen.append([m.content for m in row.messages])
        session.openai().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "in other words"}]
        )

    model = Model(lambda prompt: "Yes.")
    processor = processor_of(rewording, model)
    row = row_of("as asked")
    for _ in range(2):
        (row,) = await asyncio.gather(*processor([row], config_of({"model": "policy"})))
        assert [m.content for m in row.messages] == ["in other words", "Yes."]
    await processor.acleanup()
    assert seen == [["as asked"]] * 2


async def test_a_command_is_an_agent(tmp_path: Path) -> None:
    program = tmp_path / "agent.py"
    program.write_text(
        ASKS
        + textwrap.dedent("""
        assert row["messages"][0]["content"] == sys.argv[1]
        print(os.environ["OPENAI_API_KEY"])
        sys.exit(int(sys.argv[2]))
        """)
    )
    for status in (0, 3):
        agent = [sys.executable, str(program), "{prompt}", str(status)]
        (row,) = await rolled_out(agent, Model(lambda prompt: "Done."), n=1)
        (episode,) = record_of(row).episodes or ()
        assert episode.stop_reason == ("crashed" if status else "done")
        assert episode.metrics["output"] == "Done.\n[key]\n"
        assert episode.metrics["exit_status"] == status


async def test_a_command_leaves_no_process_behind(tmp_path: Path) -> None:
    script = "sleep 1000 & echo $! > child; echo $$ > self; wait"
    agent = Command(["sh", "-c", script], cwd=tmp_path)
    with pytest.raises(RolloutError, match="no model call"):
        await rolled_out(agent, n=1, limits=SessionLimits(seconds=1.0))
    for name in ("child", "self"):
        number = int((tmp_path / name).read_text())
        wait_until(lambda number=number: not runs(number))


def exists(path: str) -> bool:
    return Path(path).exists()


def runs(number: int) -> bool:
    """Whether a process runs: one that nobody has waited for does not."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{number}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (["no-such-program-at-all"], "no program"),
        ("node agent.mjs", "not a str"),
        (3, "not a int"),
        ([], "a list of a program"),
    ],
)
def test_what_is_no_agent_is_said_at_once(agent: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AgentRolloutProcessor(agent)


async def test_eval_protocols_own_agent_is_run_as_it_is() -> None:
    model = Model(lambda prompt: "It is 42.")
    rows = await rolled_out(EvalProtocolsAgent(), model, n=3, rows=2)
    assert len(model.wire) == 6  # litellm's cache answered none of them
    for row in rows:
        (episode, *_) = record_of(row).episodes or ()
        assert [m["role"] for m in episode.messages] == ["user", "assistant"]
        assert episode.metrics["departures"][0]["field"] == "temperature"


async def test_eval_protocols_agent_calls_tools_of_mcp_servers(tmp_path: Path) -> None:
    model = tool_model()
    server = Path(__file__).parents[3] / "examples" / "mcp_tools" / "server.py"
    servers = {"tools": {"command": sys.executable, "args": [str(server)]}}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    processor = processor_of(EvalProtocolsAgent(), model)
    config = config_of({"model": "policy"}, mcp_config_path=str(tmp_path / "mcp.json"))
    (row,) = await asyncio.gather(*processor([row_of()], config))
    await processor.acleanup()
    assert [m.role for m in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert "42" in str(row.messages[2].content)
    (episode,) = record_of(row).episodes or ()
    assert (episode.turns, episode.stop_reason) == (2, "done")


async def test_each_rollout_is_scored_while_its_folder_is_there(tmp_path: Path) -> None:
    """By what each agent wrote: afterwards all folders are gone."""
    program = tmp_path / "agent.py"
    program.write_text(ASKS + 'open("answer", "w").write(str(os.getpid()))')

    def judge(row: EvaluationRow) -> EvaluateResult:
        folder = row.execution_metadata.extra["episode"]["metrics"]["folder"]
        return EvaluateResult(score=float((Path(folder) / "answer").read_text()))

    (row,) = await rolled_out([sys.executable, str(program)], n=3, score=judge)
    record = record_of(row)
    assert len(set(record.rewards or ())) == 3
    for episode in record.episodes or ():
        assert not exists(episode.metrics["folder"])
        assert episode.metrics["scored_alive"]["by"].endswith("judge")


async def test_a_function_that_hands_on_a_coroutine_blocks_no_one() -> None:
    """As a decorator that is not `async` does."""
    barrier = threading.Barrier(2)

    async def blocking(row: EvaluationRow, session: Session) -> None:
        barrier.wait(timeout=60)
        tool_agent(row, _Blocking(session))

    handing_on = lambda row, session: blocking(row, session)  # noqa: E731, PLW0108
    (row,) = await rolled_out(handing_on, n=2)
    assert len(record_of(row)) == 2


class _Blocking:
    """A session whose clients block."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self._session.base_url, api_key=self._session.api_key)


async def test_no_key_reaches_the_record_by_what_an_agent_says() -> None:
    def telling(row: EvaluationRow, session: Session) -> Any:
        tool_agent(row, session)
        if "0" in str(row.messages[0].content):
            raise ValueError(f"with {session.api_key}")
        return {"used": session.api_key}

    rows = await rolled_out(telling, n=1, rows=2)
    told = [(record_of(row).episodes or ())[0].metrics for row in rows]
    assert told[0]["agent_error"] == "telling() raised ValueError: with [key]"
    assert told[1]["returned"] == {"used": "[key]"}


async def test_what_a_command_leaves_running_is_not_waited_for() -> None:
    script = f"{sys.executable} -c '{ASKS}'; sleep 1000 & exit 0"
    (row,) = await rolled_out(["sh", "-c", script], n=1, limits=SessionLimits(seconds=500.0))
    (episode,) = record_of(row).episodes or ()
    assert episode.stop_reason == "done"


class Processor(RolloutProcessor):
    """One of Eval Protocol's kind, which asks once and then does what a test says."""

    def __init__(self, end: Callable[[EvaluationRow], None]) -> None:
        self.end = end
        self.hooks: list[str] = []

    def setup(self) -> None:
        self.hooks.append("setup")

    async def acleanup(self) -> None:
        self.hooks.append("acleanup")

    def __call__(self, rows: Any, config: Any) -> Any:
        async def run(row: EvaluationRow) -> EvaluationRow:
            params = config.completion_params
            base_url, key = params["base_url"], params["api_key"]
            async with openai.AsyncOpenAI(base_url=base_url, api_key=key) as client:
                said = [{"role": "user", "content": "hi"}]
                await client.chat.completions.create(model="m", messages=said)
            self.end(row)
            return row

        return [asyncio.create_task(run(row)) for row in rows]


def cancels(row: EvaluationRow) -> None:
    raise asyncio.CancelledError


def fails(row: EvaluationRow) -> None:
    row.rollout_status = Status.rollout_internal_error("went wrong")


@pytest.mark.parametrize(("end", "error"), [(cancels, "CancelledError"), (fails, "went wrong")])
async def test_a_processors_own_end_is_its_rollouts(end: Any, error: str) -> None:
    model = Model(lambda prompt: "Yes.")
    inner = Processor(end)
    processor = processor_of(inner, model)
    processor.setup()
    params = {"model": "policy", "n": 2}
    config = config_of(params, steps=8, server_script_path="server.py", kwargs={"port": 1})
    (row,) = await asyncio.gather(*processor([row_of()], config))
    await processor.acleanup()
    assert inner.hooks == ["setup", "acleanup"]
    for episode in record_of(row).episodes or ():
        assert episode.stop_reason == "crashed"
        assert error in episode.metrics["agent_error"]


async def test_a_row_with_an_image_that_the_agent_does_not_send_is_kept() -> None:
    def wordy(row: EvaluationRow, session: Session) -> None:
        said = [{"role": "user", "content": "What is in the picture?"}]
        session.openai().chat.completions.create(model="m", messages=said)

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    processor = processor_of(wordy, Model(lambda prompt: "A cat."))
    row = EvaluationRow(messages=[Message(role="user", content=[image])])
    row.input_metadata.row_id = "row"
    (row,) = await asyncio.gather(*processor([row], config_of({"model": "policy"})))
    await processor.acleanup()
    assert [m.content for m in row.messages] == ["What is in the picture?", "A cat."]


async def test_a_gateway_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = socket.create_server, [OSError(24, "Too many open files")]

    def create_server(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments, **named)

    model = tool_model()
    processor = processor_of(tool_agent, model)
    config = config_of({"model": "policy"})
    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_server", create_server)
        with pytest.raises(RolloutError, match="Too many open files"):
            await asyncio.gather(*processor([row_of()], config))
        (row,) = await asyncio.gather(*processor([row_of()], config))
    await processor.acleanup()
    assert len(record_of(row)) == 1
