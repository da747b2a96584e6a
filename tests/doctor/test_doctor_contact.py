"""What `ep-rft doctor` says of a server that gives no completion: the right cause and advice."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from eval_protocol_rft.doctor._examination import SETUP, aexamine
from eval_protocol_rft.doctor._probe import Setup
from eval_protocol_rft.local.models import bundled_model_path
from eval_protocol_rft.rollout._params import parse_completion_params
from tests.serving import running

TOKENIZER = str(bundled_model_path("arithmetic"))


async def failure_of(url: str, model: str = "m"):
    """The one finding that failed."""
    request = parse_completion_params(
        {"model": model, "base_url": url, "tokenizer": TOKENIZER, "timeout": 20}
    )
    diagnosis = await aexamine(Setup(request=request, weights=None), progress=False)
    [failed] = [finding for finding in diagnosis.findings if finding.verdict == "fail"]
    assert failed.name != SETUP
    assert diagnosis.findings[-1].verdict == "skipped"
    return failed


def answering(status: int, *, models: list[str] | None = None, headers=None):
    async def complete(request):
        body = {"error": {"message": "its words"}}
        return JSONResponse(body, status_code=status, headers=headers)

    async def list_models(request):
        if models is None:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return JSONResponse({"object": "list", "data": [{"id": name} for name in models]})

    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", list_models),
        ]
    )
    app.state.stopping = contextlib.nullcontext()
    app.state.stopping.set = lambda: None
    return running(app)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "Change what the message names."),
        (401, "--api-key-env NAME says which variable"),
        (403, "another key"),
        (404, "--base-url names the server without /completions"),
        (429, "over a quota"),
        (500, "its log says why"),
        (502, "A proxy answered for the server"),
        (503, "loading or overloaded"),
        (504, "too slow or away"),
    ],
)
async def test_each_status_has_its_own_advice_and_the_servers_words(status, advice):
    with answering(status, headers={"retry-after": "0"}) as url:
        failed = await failure_of(url)
    assert advice in failed.advice
    assert f"HTTP {status}: its words" in failed.measured


async def test_a_server_that_asks_to_wait_longer_than_anyone_would_is_not_waited_for():
    with answering(503, headers={"retry-after": "300"}) as url:
        failed = await failure_of(url)
    assert "HTTP 503" in failed.measured
    assert "loading or overloaded" in failed.advice


async def test_a_model_that_is_not_there_is_told_with_those_that_are():
    served = [f"org/model-{i}" for i in range(11)]
    with answering(404, models=served) as url:
        failed = await failure_of(url, model="org/model-99")
    assert failed.advice == (
        "The server has no model org/model-99. Name with --model what it serves: "
        + ", ".join(served[:8])
        + ", and 3 more."
    )


async def test_a_model_that_is_listed_and_not_completed_is_still_loading():
    with answering(404, models=["m"]) as url:
        assert "is it still loading?" in (await failure_of(url)).advice


async def test_a_server_without_tls_is_told_apart_from_one_that_is_away():
    with answering(200) as url:
        failed = await failure_of(url.replace("http://", "https://"))
    assert failed.advice == "What answers there speaks no TLS: write http:// in --base-url."
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    failed = await failure_of(f"http://127.0.0.1:{port}")
    assert failed.advice == "Is the server running, and is --base-url its address?"


@pytest.fixture
def self_signed(tmp_path) -> ssl.SSLContext:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
            "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def test_a_certificate_that_nobody_vouches_for_is_told(self_signed):
    async def hang_up(reader, writer):
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=self_signed)
    async with server:
        failed = await failure_of(f"https://localhost:{server.sockets[0].getsockname()[1]}")
    assert "SSL_CERT_FILE" in failed.advice
