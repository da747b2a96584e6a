"""Proxies that the environment names: honoured, or refused by name. And redirects, which lead where
the key does not belong."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from eval_protocol_rft.sampling._endpoint import Endpoint, proxy_for
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._types import (
    Completion,
    RefusedError,
    SamplingError,
    SamplingParams,
)
from tests.stub_server import Status, StubServer
from tests.waiting import PATIENCE

PROMPT = [70, 71]
FAR = "http://far.invalid/v1"
"""Reached by a proxy or not at all."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)


async def outcome_of(endpoint: Endpoint) -> Completion | SamplingError:
    sampler = HttpSampler(endpoint)
    try:
        return await sampler.sample(PROMPT, SamplingParams(model="m", max_tokens=8), seed=1)
    except SamplingError as error:
        return error
    finally:
        await sampler.aclose()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
async def test_requests_go_by_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A proxy gets the whole URL and need not care where it points: the server can be one.
    with StubServer() as proxy:
        monkeypatch.setenv(name, proxy.url.replace("http://", "http://user:pass-word@"))
        assert isinstance(await outcome_of(Endpoint(FAR)), Completion)
        assert proxy.requests[0].headers["Host"] == "far.invalid"
        assert proxy.requests[0].headers["Proxy-Authorization"].startswith("Basic ")


async def test_hosts_that_no_proxy_names_are_asked_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StubServer() as server:
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.0/8")
        assert isinstance(await outcome_of(Endpoint(f"{server.url}/v1")), Completion)


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://api.fireworks.ai/v1", None),
        ({"HTTPS_PROXY": "http://p:1", "ALL_PROXY": "http://q:1"}, "https://a.b/v1", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "https://a.b/v1", None),
        ({"ALL_PROXY": "p:1"}, "https://a.b/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "b"}, "https://a.b/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, "https://a.b/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "a.b:80"}, "https://a.b:81/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "a.b:81"}, "https://a.b:81/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3:80/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "[::1]"}, "http://[::1]:80/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3/v1", "http://p:1"),
    ],
)
def test_which_proxy_a_url_has(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == proxy


async def test_a_socks_proxy_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://user:pass-word@127.0.0.1:1080")
    error = await outcome_of(Endpoint(FAR))
    assert isinstance(error, RefusedError)
    assert "ALL_PROXY names a proxy that is not supported (socks5h://127.0.0.1:1080)" in str(error)


@contextmanager
def refusing_proxy(status: bytes) -> Iterator[str]:
    """Answers one CONNECT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as file:
                while file.readline().strip():
                    pass
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
                file.read()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://someone:pass-word@127.0.0.1:{listener.getsockname()[1]}"
        thread.join(30)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (b"407 Proxy Authentication Required", "refused"),
        (b"503 Service Unavailable", "unavailable"),
    ],
)
async def test_what_a_proxy_refuses_is_said_to_be_the_proxys(
    monkeypatch: pytest.MonkeyPatch, status: bytes, kind: str
) -> None:
    with refusing_proxy(status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        error = await asyncio.wait_for(outcome_of(Endpoint("https://far.invalid/v1")), PATIENCE)
    assert error.kind == kind
    assert isinstance(error, RefusedError) == (kind == "refused")
    assert f"the proxy answered {status.decode()}" in str(error)
    assert "pass-word" not in str(error)


@pytest.mark.parametrize("code", [301, 307, 308])
async def test_a_redirect_says_where_to_and_is_not_followed(code: int) -> None:
    with StubServer() as other, StubServer() as server:
        place = f"{other.url}/v2/completions?token=secret"
        server.script = lambda seen: Status(code, b"<html>moved</html>", {"Location": place})
        error = await outcome_of(Endpoint(f"{server.url}/v1", api_key="the-very-key"))
        assert isinstance(error, RefusedError)
        assert f"HTTP {code}: redirected to {other.url}/v2/completions, which is not" in str(error)
        assert "secret" not in str(error)
        assert not other.requests
