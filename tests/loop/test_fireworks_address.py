"""A wrong key or address of Fireworks is told at once, and by its name: before anything is made."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("fireworks.training.sdk", reason="needs the extra `fireworks`")

import fireworks

from eval_protocol_rft.cli import app
from eval_protocol_rft.loop import Optimizer, TrainerError
from eval_protocol_rft.loop.fireworks import ControlPlaneError, StepSettings, connect, iterate
from eval_protocol_rft.sampling import _http as http_sampler
from examples.arithmetic import test_arithmetic as example

KEY = "fw-a-key-that-nobody-may-see"
BASE = "accounts/fireworks/models/arithmetic"
TEST = "examples/arithmetic/test_arithmetic.py::test_arithmetic"
TRAIN = ["train", TEST, "--model", BASE, "--deployment", "d", "-n", "2"]


@contextlib.contextmanager
def answering(status: int, kind: str, body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything so; its URL, and the methods of its requests."""
    methods: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            methods.append(self.command)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", methods
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def nobody() -> Iterator[tuple[str, list[str]]]:
    """A port that is bound and not listened on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}", []


JSON, HTML = "application/json", "text/html"
WRONG = {
    "401": (
        lambda: answering(401, JSON, b'{"error": {"message": "no such key: %s"}}' % KEY.encode()),
        r"URL \(SOURCE\) refuses the API key \(KEY\): HTTP 401: no such key: \*\*\*",
    ),
    "403": (
        lambda: answering(403, JSON, b'{"code": 7, "message": "of another account"}'),
        r"URL \(SOURCE\) refuses the API key \(KEY\): HTTP 403: of another account",
    ),
    "another kind": (
        lambda: answering(404, HTML, b"<html><h1>404</h1><p>nginx</p></html>"),
        r"URL \(SOURCE\) is no Fireworks: GET /v1/acc\S+ .*HTTP 404 \(text/html\): 404 nginx",
    ),
    "a page": (
        lambda: answering(200, HTML, b"<html>Welcome</html>"),
        r"URL \(SOURCE\) is no Fireworks: .*: Welcome",
    ),
    "a vLLM": (
        lambda: answering(404, JSON, b'{"detail": "Not Found"}'),
        r"URL \(SOURCE\) is no Fireworks: .* HTTP 404",
    ),
    "closed": (nobody, r"nothing answers at URL \(SOURCE\): .*[Cc]onnect"),
}
wrong_server = pytest.mark.parametrize(("server", "message"), WRONG.values(), ids=WRONG)


def expected(message: str, *, url: str, source: str, key: str) -> str:
    return message.replace("URL", url).replace("SOURCE", source).replace("KEY", key)


@wrong_server
async def test_connect_makes_nothing_there(server, message, monkeypatch) -> None:
    with server() as (url, methods):
        monkeypatch.setenv("FIREWORKS_BASE_URL", url)
        with pytest.raises(
            TrainerError,
            match=expected(message, url=url, source="FIREWORKS_BASE_URL", key="api_key"),
        ) as raised:
            await connect(
                base_model=BASE,
                deployment="d",
                temperature=1.0,
                optimizer=Optimizer(),
                api_key=KEY,
            )
    assert set(methods) <= {"GET"}
    assert KEY not in str(raised.value)


@wrong_server
async def test_iterate_makes_nothing_there(server, message, tmp_path: Path) -> None:
    with server() as (url, methods):
        async with fireworks.AsyncFireworks(
            api_key=KEY, account_id="acc", base_url=f"{url}/"
        ) as client:
            with pytest.raises(
                ControlPlaneError,
                match=expected(
                    message, url=url, source="the client's base_url", key="the client's"
                ),
            ) as raised:
                await iterate(
                    example.test_arithmetic,
                    [],
                    client=client,
                    run="sums",
                    folder=tmp_path / "run",
                    steps=1,
                    base_model=BASE,
                    deployment="d",
                    settings=StepSettings(learning_rate=1e-4, lora_rank=8),
                )
    assert set(methods) <= {"GET"}
    assert KEY not in str(raised.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("given", ["--base-url", "FIREWORKS_BASE_URL"])
def test_the_command_says_where_the_address_comes_from(given, tmp_path, monkeypatch) -> None:
    server, message = WRONG["401"]
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    with server() as (url, _):
        # The option goes before the variable.
        by_variable = given == "FIREWORKS_BASE_URL"
        monkeypatch.setenv("FIREWORKS_BASE_URL", url if by_variable else "http://127.0.0.1:1")
        options = [] if by_variable else ["--base-url", f"{url}/inference"]
        result = CliRunner().invoke(
            app,
            [*TRAIN, "-o", str(tmp_path / "run"), *options],
        )
    assert result.exit_code == 1
    wanted = expected(message, url=url, source=given, key="FIREWORKS_API_KEY")
    assert re.search(wanted, result.stderr)
    assert KEY not in result.output + result.stderr


def test_a_direct_route_is_no_address_of_fireworks(tmp_path) -> None:
    result = CliRunner().invoke(
        app,
        [*TRAIN, "-o", str(tmp_path / "run"), "--base-url", "https://x.direct.fireworks.ai/v1"],
    )
    assert result.exit_code == 1
    assert "--base-url" in result.stderr
    assert "direct route" in result.stderr


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_commands_that_sample_do_not_wait_for_who_was_never_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ["examples/arithmetic/problems.jsonl"] if command == "generate" else [TEST]
    source += ["-o", str(tmp_path / "o.parquet")] if command == "generate" else ["--steps", "1"]
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    monkeypatch.setattr(http_sampler, "_REACH_PAUSES", (0.01,))
    with nobody() as (url, _):
        monkeypatch.setenv("FIREWORKS_BASE_URL", url)
        result = CliRunner().invoke(app, [command, *source, "--model", BASE])
    assert result.exit_code == 1
    assert f"no connection to {url}/v1 (FIREWORKS_BASE_URL): " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_the_variable_that_leads_nowhere(monkeypatch) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
    tokenizer = "eval_protocol_rft/local/models/arithmetic"
    with nobody() as (url, _):
        monkeypatch.setenv("FIREWORKS_BASE_URL", url)
        result = CliRunner().invoke(
            app, ["doctor", "--model", BASE, "--tokenizer", tokenizer, "--json"]
        )
    assert result.exit_code == 1
    assert "is FIREWORKS_BASE_URL its address?" in result.stdout
