"""`ep-rft gateway` without its process: sessions that are opened, used and ended over HTTP alone,
and the rows that they leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from eval_protocol.models import EvaluationRow

from eval_protocol_rft.episodes.gateway import SessionSettings
from eval_protocol_rft.episodes.gateway._standalone import StandaloneGateway
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.record import RolloutRecord, is_failure
from eval_protocol_rft.rollout import parse_completion_params
from eval_protocol_rft.sampling import RetryPolicy, SamplingError
from eval_protocol_rft.training import build_batch
from tests.episodes.gateway.models import Model

KEY = "the gateway's own"


class Standalone:
    """A gateway, what it said, and a client with its key."""

    def __init__(self, output: Path) -> None:
        self.model = Model(lambda prompt: "Yes.")
        self.output = output
        self.lines: list[str] = []
        request = parse_completion_params({"model": "local/arithmetic", "seed": 5})
        self.gateway = StandaloneGateway(
            self.model,
            LoadedTokenizer.wrap(self.model.tokenizer),
            request=request,
            output=output,
            api_key=KEY,
            say=self.lines.append,
            settings=SessionSettings(params=replace(request.params, max_tokens=None)),
            retry=RetryPolicy(max_attempts=1),
        )

    async def post(self, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {key}"}
        url = self.gateway.url + path
        async with self.http.post(url, json=body or {}, headers=headers) as response:
            return response.status, await response.json()

    async def ask(self, name: str, key: str = KEY) -> int:
        said = [{"role": "user", "content": "Well?"}]
        status, _ = await self.post(
            f"/s/{name}/v1/chat/completions", {"model": "m", "messages": said}, key
        )
        return status

    def rows(self) -> list[EvaluationRow]:
        return [EvaluationRow(**json.loads(line)) for line in self.output.read_text().splitlines()]


@pytest.fixture
async def standalone(tmp_path: Path) -> AsyncIterator[Standalone]:
    world = Standalone(tmp_path / "rows.jsonl")
    async with aiohttp.ClientSession() as world.http, world.gateway:
        yield world


async def test_sessions_of_one_row_are_a_group_to_train_on(standalone: Standalone) -> None:
    for name, reward in (("a", 0.0), ("b", 1.0)):
        status, opened = await standalone.post("/sessions", {"name": name, "row_id": "row"})
        assert status == 201
        assert opened["base_url"].endswith(f"/s/{name}/v1")
        assert await standalone.ask(name, opened["api_key"]) == 200
        status, row = await standalone.post(f"/s/{name}/finish", {"reward": reward})
        assert status == 200
        assert row["evaluation_result"]["score"] == reward
    rows = standalone.rows()
    assert [row.messages[-1].content for row in rows] == ["Yes.", "Yes."]
    batch = build_batch(rows)
    assert [datum.reward for datum in batch.datums] == [0.0, 1.0]
    assert len(set(standalone.model.seeds)) == 2


async def test_a_session_is_written_once_however_often_it_is_finished(
    standalone: Standalone,
) -> None:
    assert await standalone.ask("x") == 200
    answers = await asyncio.gather(*(standalone.post("/s/x/finish") for _ in range(4)))
    assert sorted(status for status, _ in answers)[0] == 200
    assert [status for status, _ in answers].count(200) == 1
    assert len(standalone.rows()) == 1
    assert await standalone.ask("x") == 403  # a call that comes late begins no other rollout
    assert (await standalone.post("/sessions", {"name": "x"}))[0] == 201
    assert await standalone.ask("x") == 200


async def test_a_row_begins_on_a_line_of_its_own(standalone: Standalone) -> None:
    standalone.output.write_bytes(b'{"half of a')
    assert await standalone.ask("x") == 200
    assert (await standalone.post("/s/x/finish"))[0] == 200
    assert json.loads(standalone.output.read_text().splitlines()[1])["messages"]


async def test_open_sessions_are_written_when_it_stops(standalone: Standalone) -> None:
    assert await standalone.ask("x") == 200
    await standalone.post("/sessions", {"name": "unused"})
    await standalone.gateway.aclose()
    (row,) = standalone.rows()
    record = RolloutRecord.from_extra(row.execution_metadata.extra)
    assert [episode.stop_reason for episode in record.episodes or ()] == ["closed"]
    assert any("'unused' is no rollout" in line for line in standalone.lines)


async def test_a_rollout_whose_model_failed_is_a_failed_row(standalone: Standalone) -> None:
    assert await standalone.ask("x") == 200
    standalone.model.failing = SamplingError("gone", kind="unavailable")
    assert await standalone.ask("x") == 502
    status, reply = await standalone.post("/s/x/finish", {"reward": 0.0})
    assert (status, "gone" in reply["error"]["message"]) == (409, True)
    (row,) = standalone.rows()
    assert is_failure(row.rollout_status.code)


async def test_a_row_that_cannot_be_written_waits_for_the_next(standalone: Standalone) -> None:
    assert await standalone.ask("x") == 200
    folder = standalone.output.parent / "away"
    folder.write_text("no folder")
    standalone.gateway._output = folder / "rows.jsonl"
    status, reply = await standalone.post("/s/x/finish")
    assert (status, "1 rows wait" in reply["error"]["message"]) == (507, True)
    folder.unlink()
    assert await standalone.ask("y") == 200
    assert (await standalone.post("/s/y/finish"))[0] == 200
    standalone.output = standalone.gateway._output
    assert [row.input_metadata.row_id for row in standalone.rows()] == ["x", "y"]


async def test_what_is_asked_wrongly_is_refused(standalone: Standalone) -> None:
    assert (await standalone.post("/sessions", {}, key="another"))[0] == 401
    assert (await standalone.post("/sessions", {"nmae": "x"}))[0] == 400
    assert (await standalone.post("/sessions", {"name": "x"}))[0] == 201
    assert (await standalone.post("/sessions", {"name": "x"}))[0] == 409
    assert (await standalone.post("/sessions", {"name": "../x"}))[0] == 400
    assert await standalone.ask("so%20odd") == 400
    assert (await standalone.post("/s/nobody/finish"))[0] == 404
    assert (await standalone.post("/s/x/finish", {"reward": "much"}))[0] == 400
    assert (await standalone.post("/s/x/finish"))[0] == 409  # it made no call
