"""What is waited for on Fireworks is told, with its state; and what is left there, with how to
delete it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

from eval_protocol_rft.data import Waiting, waits
from eval_protocol_rft.loop import Optimizer, TrainerError
from eval_protocol_rft.loop.fireworks import _control_plane, _provisioning, connect
from eval_protocol_rft.loop.fireworks._waiting import left_running
from eval_protocol_rft.sampling import fireworks_address
from tests.service import BASE, KEY, RunningService, fireworks_service
from tests.sums_run import run_sums

JOB, DEPLOYMENT = "accounts/acc/rlorTrainerJobs/job", "accounts/acc/deployments/dep"


class Slow:
    """ASGI middleware: what a job and a deployment are said to be, for some looks."""

    states: dict[str, list[str]]
    """Path -> states of the next looks; the last one stays if `stuck`. Then what is true."""
    stuck = False
    posts: list[str]

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, body, status = Request(scope), bytearray(), 200
        Slow.posts.append(f"{request.method} {request.url.path}")
        left = Slow.states.get(request.url.path) if request.method == "GET" else None
        if not left:
            await self.app(scope, receive, send)
            return

        async def changed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            answer = json.loads(body)
            if status == 200:
                answer["state"] = left[0] if Slow.stuck and len(left) == 1 else left.pop(0)
                answer["status"] = {"code": "X", "message": "as the test says"}
            data = json.dumps(answer).encode()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": data})

        await self.app(scope, receive, changed)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningService]:
    monkeypatch.setattr(Slow, "states", {}, raising=False)
    monkeypatch.setattr(Slow, "posts", [], raising=False)
    monkeypatch.setattr(Slow, "stuck", False)
    # The SDK sleeps 5 to 15 s between two looks, and has no option for it.
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    for name in _provisioning.SLICED:
        monkeypatch.setitem(_provisioning.SLICED, name, 0.02)
    monkeypatch.setattr(_provisioning, "FIRST_LOOK_SECONDS", 0.0)
    with fireworks_service(tmp_path / "state", around=Slow) as running:
        yield running


def connecting(server: RunningService, told: list[Waiting], **options: Any) -> Any:
    return connect(
        base_model=BASE,
        deployment="dep",
        trainer_job="job",
        temperature=1.0,
        optimizer=Optimizer(),
        api_key=KEY,
        base_url=server.url,
        poll_seconds=0.01,
        **{"on_wait": told.append, "training_shape": "ts-arithmetic", **options},
    )


def gone(server: RunningService) -> set[str]:
    """Those of the two that were made that are deleted."""
    rows = {name: server.service.store.get(name.split("/")[2], name) for name in (JOB, DEPLOYMENT)}
    return {n for n, row in rows.items() if row is None or row["state"].endswith("DELETED")}


async def test_who_connects_is_told_what_is_waited_for(server: RunningService) -> None:
    Slow.states[f"/v1/{JOB}"] = ["JOB_STATE_PENDING"] * 8 + ["JOB_STATE_CREATING"] * 8
    Slow.states[f"/v1/{DEPLOYMENT}"] = ["CREATING"] * 12
    told: list[Waiting] = []
    trainer = await connecting(server, told)
    await trainer.aclose()
    seen = {(one.what, one.state) for one in told}
    assert {
        ("trainer job job", "JOB_STATE_PENDING"),
        ("trainer job job", "JOB_STATE_CREATING"),
        ("deployment dep", "CREATING"),
    } <= seen
    assert {one.what for one in told if one.done} == {"trainer job job", "deployment dep"}
    assert all(one.seconds >= 0 for one in told)
    made = [post for post in Slow.posts if post.startswith("POST /v1/accounts/acc/")]
    assert sorted(made) == [
        "POST /v1/accounts/acc/deployments",
        "POST /v1/accounts/acc/rlorTrainerJobs",
    ]


@pytest.mark.parametrize("deletes", [False, True])
async def test_who_stops_is_told_what_is_left_and_how_to_delete_it(
    server: RunningService, caplog: pytest.LogCaptureFixture, deletes: bool
) -> None:
    Slow.states[f"/v1/{JOB}"] = ["JOB_STATE_PENDING"]
    Slow.stuck = True
    waiting = asyncio.Event()
    told: list[Waiting] = []

    def tell(one: Waiting) -> None:
        told.append(one)
        waiting.set()

    task = asyncio.create_task(connecting(server, told, on_wait=tell, delete_on_close=deletes))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(server) == ({JOB, DEPLOYMENT} if deletes else set())
    if deletes:
        assert "left running" not in caplog.text
        return
    assert f"left running at {server.url}: deployment dep, trainer job job" in caplog.text
    # What it says deletes them.
    lines = [line for line in caplog.text.splitlines() if "curl -X DELETE" in line]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
        for line in lines:
            (await http.delete(line.split("'")[1])).raise_for_status()
    assert gone(server) == {JOB, DEPLOYMENT}
    assert KEY not in caplog.text


async def test_a_job_that_fails_while_it_is_waited_for_is_not_resumed(
    server: RunningService,
) -> None:
    Slow.states[f"/v1/{JOB}"] = ["JOB_STATE_PENDING"] * 3 + ["JOB_STATE_FAILED"]
    Slow.stuck = True
    with pytest.raises(TrainerError, match=r"as the test says|[Ff]ailed"):
        await connecting(server, [])
    assert not [post for post in Slow.posts if post.endswith(":resume")]


async def test_a_deployment_that_cannot_be_made_is_told_before_anything_is(
    server: RunningService,
) -> None:
    with pytest.raises(TrainerError, match=r"no deployment dep at .*name a training shape"):
        await connecting(server, [], training_shape=None)
    assert not [post for post in Slow.posts if post.startswith("POST /v1/accounts")]


async def test_iterate_tells_of_the_data_set_and_of_the_job(
    server: RunningService,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Waiting] = []
    training, go_on = threading.Event(), asyncio.Event()
    monkeypatch.setattr(_control_plane, "_LONG_UPLOAD_BYTES", 1)
    Slow.states["/v1/accounts/acc/rlorTrainerJobs/sums-step0"] = ["JOB_STATE_PENDING"]
    Slow.stuck = True

    def tell(one: Waiting) -> None:
        told.append(one)
        if one.what.startswith("job"):
            training.set()
            go_on.set()

    run = asyncio.create_task(
        run_sums(server.url, tmp_path / "run", rows=2, n=2, steps=1, on_wait=tell)
    )
    await go_on.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert ("job sums-step0", "JOB_STATE_PENDING") in {(one.what, one.state) for one in told}
    assert any(one.what == "upload of data set sums-step0" and one.done for one in told)
    text = "stopped in step 0, train. The same call goes on from here; left running at"
    assert text in caplog.text
    assert "accounts/acc/rlorTrainerJobs/sums-step0'" in caplog.text


@pytest.mark.parametrize(
    ("url", "costs"), [("http://127.0.0.1:8000", False), ("https://api.fireworks.ai", True)]
)
def test_what_is_left_costs_money_but_on_this_machine(url: str, costs: bool) -> None:
    text = left_running([JOB], fireworks_address(url))
    assert ("cost money" in text) is costs
    assert f"'{url}/v1/{JOB}'" in text


# On the screen


def seen(state: str, seconds: float, *, done: bool = False) -> Waiting:
    return Waiting(what="deployment d", state=state, seconds=seconds, done=done)


LOOKS = [seen("CREATING", 0.0), seen("CREATING", 5.0), seen("UPDATING", 61.0)]
LOOKS += [seen("READY", 75.0, done=True)]


def test_where_there_is_no_terminal_each_change_is_a_line(capsys) -> None:
    with waits(show=True) as shown:
        for look in LOOKS:
            shown(look)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "waiting for deployment d: CREATING",
        "waiting for deployment d: UPDATING, for 1 min 1 s",
        "deployment d: READY, after 1 min 15 s",
    ]


def test_on_a_terminal_one_line_lives_until_it_is_there(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with waits() as shown:
        for look in LOOKS:
            shown(look)
    text = capsys.readouterr().err
    assert "deployment d: READY, after 1 min 15 s" in text
    assert text.count("READY") == 1


@pytest.mark.parametrize("show", [False, None])
def test_who_wants_quiet_or_has_no_terminal_is_told_nothing(show, capsys) -> None:
    with waits(show) as shown:
        for look in LOOKS:
            shown(look)
    assert capsys.readouterr().err == ""
