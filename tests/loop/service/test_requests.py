"""The log of requests: all of them, and loudly those that nothing answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import fireworks
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eval_protocol_rft.loop.service._requests import FILE, RequestLog, RequestLogMiddleware
from tests.service import KEY, fireworks_service
from tests.serving import running


def entries(folder: Path) -> list[dict[str, Any]]:
    """Of a server that has ended: a line is written once its request was answered."""
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_every_request_is_on_record_with_who_sent_it(tmp_path: Path) -> None:
    with (
        fireworks_service(tmp_path) as server,
        fireworks.Fireworks(api_key=KEY, account_id="acc", base_url=server.url) as client,
    ):
        list(client.deployments.list(page_size=2))
        with pytest.raises(fireworks.NotFoundError):
            client.models.get("no")
    listed, got = entries(tmp_path)
    assert (listed["method"], listed["path"]) == ("GET", "/v1/accounts/acc/deployments")
    assert (listed["query"], listed["status"]) == ("pageSize=2", 200)
    assert listed["who"] == f"Fireworks {fireworks.__version__}"
    assert listed["ms"] > 0
    # What is not there is an answer, and nothing to be loud about.
    assert (got["status"], got["unanswered"]) == (404, False)
    assert server.lines == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/accounts/acc/evaluators"),
        ("POST", "/v1/accounts/acc/models/m:prepare"),
        ("POST", "/v2/anything"),
        ("DELETE", "/verifyApiKey"),
        ("POST", "/api/v1/no_such_call"),
    ],
)
def test_what_nothing_answers_is_said_loudly(tmp_path: Path, method: str, path: str) -> None:
    body = {"apiKey": "very-secret", "text": "x" * 1000}
    headers = {"user-agent": "cookbook/1.2", "authorization": "Bearer very-secret"}
    with fireworks_service(tmp_path) as server:
        url = f"{server.url}{path}?token=very-secret"
        answer = httpx.request(method, url, json=body, headers=headers)
    assert answer.status_code in (404, 405)
    (entry,) = entries(tmp_path)
    assert entry["unanswered"]
    (said,) = server.lines
    assert f"NOTHING HERE ANSWERS {method} {path}" in said
    assert "cookbook/1.2" in said
    assert '"text":"xxx' in said.replace(": ", ":")
    assert len(said) < 600
    assert "very-secret" not in said + json.dumps(entry)


def test_addresses_of_files_are_secrets(tmp_path: Path) -> None:
    with fireworks_service(tmp_path) as server:
        httpx.put(f"{server.url}/uploads/ds/token", content=b"x")
        httpx.get(f"{server.url}/downloads/ds/token")
    assert [entry["path"] for entry in entries(tmp_path)] == [
        "/uploads/ds/...",
        "/downloads/ds/...",
    ]


def test_all_requests_are_shown_where_asked_for_and_failures_too(tmp_path: Path) -> None:
    async def fails(request: Request) -> Response:
        raise RuntimeError("a fault of the server's")

    lines: list[str] = []
    app = Starlette(routes=[Route("/fails", fails), Route("/works", lambda request: Response())])
    app.state.stopping = asyncio.Event()
    log = RequestLog(tmp_path, print_line=lines.append, show_all=True)
    app.add_middleware(RequestLogMiddleware, log=log)
    with running(app) as url:
        httpx.get(f"{url}/works?a=1")
        assert httpx.get(f"{url}/fails").status_code == 500
    assert lines[0].startswith("GET /works?a=1 200 ")
    assert lines[1].startswith("GET /fails cut off ")
    assert [entry["status"] for entry in entries(tmp_path)] == [200, None]
