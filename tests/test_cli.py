"""`ep-rft` as a user types it: each test runs the command in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
from importlib import metadata

import httpx
import pytest
import typer
from typer.testing import CliRunner

from eval_protocol_rft.cli import _common, app
from tests.waiting import PATIENCE

EP_RFT = [sys.executable, "-c", "from eval_protocol_rft.cli import app; app(prog_name='ep-rft')"]
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def ep_rft(*arguments: str, program: list[str] = EP_RFT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


def test_help_names_the_commands():
    result = ep_rft("--help")
    assert result.returncode == 0
    assert "serve" in result.stdout


def test_help_of_serve_has_examples_to_copy():
    result = ep_rft("serve", "--help")
    assert result.returncode == 0
    assert "Examples:" in result.stdout
    assert "ep-rft serve --model local/Qwen/Qwen3-0.6B --port 9000" in result.stdout


def test_version_is_that_of_the_package():
    result = ep_rft("--version")
    assert (result.returncode, result.stdout) == (
        0,
        f"ep-rft {metadata.version('eval-protocol-rft')}\n",
    )


def test_help_imports_nothing_heavy():
    heavy = ("eval_protocol", "torch", "transformers", "litellm", "uvicorn", "starlette", "numpy")
    program = f"""
import sys
from eval_protocol_rft.cli import app
for arguments in ["--help"], ["serve", "--help"], ["--version"]:
    try:
        app(arguments)
    except SystemExit:
        print("loaded:", [name for name in {heavy!r} if name in sys.modules])
"""
    result = ep_rft(program=[sys.executable, "-c", program])
    assert result.stdout.count("loaded: []") == 3, result.stdout + result.stderr


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; {EP_RFT[2]}"
    result = ep_rft("serve", program=[sys.executable, "-c", program])
    assert result.returncode == 1
    assert result.stderr == (
        f"ep-rft: serve needs {missing}, which is not installed: "
        "pip install 'eval-protocol-rft[local,serve]'\n"
    )


def test_a_missing_torch_is_a_line_that_says_what_to_install():
    program = f"import sys; sys.modules['torch'] = None; {EP_RFT[2]}"
    result = ep_rft("serve", "--port", "0", program=[sys.executable, "-c", program])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "pip install 'eval-protocol-rft[local]'" in result.stderr.splitlines()[-1]


def test_a_taken_port_is_one_line_and_no_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = ep_rft("serve", "--model", "local/no-such-model", "--port", str(port))
    assert result.returncode == 1
    assert result.stderr == (
        f"ep-rft: cannot listen on 127.0.0.1 port {port}: it is taken; "
        "take another with --port (0 finds a free one)\n"
    )


def test_a_host_that_is_not_this_machine_is_one_line():
    result = ep_rft("serve", "--host", "192.0.2.1")
    assert result.returncode == 1
    assert result.stderr.startswith("ep-rft: cannot listen on 192.0.2.1 port 8000: ")
    assert result.stderr.count("\n") == 1


def test_a_model_that_does_not_load_is_named_without_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.startswith("ep-rft: ")
    assert str(tmp_path) in result.stderr


def test_serve_prints_a_request_that_works_and_ctrl_c_stops_it_with_one_line():
    arguments = ["serve", "--port", "0", "--served-model-name", "m"]
    with subprocess.Popen(
        [*EP_RFT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as server:
        try:
            greeting = server.stdout.readline()
            url = re.search(r"Serving m on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)", greeting)
            assert url, greeting + server.stderr.read()
            example = server.stdout.readline()
            reply = post_as_curl_does(example)
            assert reply["choices"][0]["finish_reason"] in ("stop", "length")
            assert reply["usage"]["prompt_tokens"] > 0
            with socket.create_connection(("127.0.0.1", httpx.URL(url[1]).port)):
                server.send_signal(signal.SIGINT)  # an idle connection does not hold it up
                assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
        assert server.stdout.read() == "Stopped.\n"
        assert "Traceback" not in server.stderr.read()


def post_as_curl_does(command: str) -> dict:
    """Send what `curl -s URL -H HEADER -d BODY` would."""
    curl, silent, url, _, header, flag, body = shlex.split(command)
    assert (curl, silent, flag) == ("curl", "-s", "-d")
    assert json.loads(body)["model"] == "m"
    headers = dict([header.split(": ")])
    return (
        httpx.post(url, content=body, headers=headers, timeout=PATIENCE).raise_for_status().json()
    )


def test_ctrl_c_while_a_command_is_imported_is_one_line(monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval_protocol_rft.cli._with_flags", interrupted)
    result = CliRunner().invoke(app, ["stats", "rollouts.parquet"])
    assert (result.exit_code, result.stderr) == (130, "ep-rft: stopped\n")


def test_where_the_terminal_of_stderr_is_gone_nobody_is_told():
    ours, theirs = pty.openpty()
    os.close(ours)
    with open(theirs, "wb", buffering=0) as file:
        gone = io.TextIOWrapper(file, write_through=True)
        with contextlib.redirect_stderr(gone):
            _common.say("stopped", err=True)
        with contextlib.redirect_stdout(gone), pytest.raises(OSError, match="Input/output error"):
            _common.say("a table that somebody wants")


@pytest.mark.parametrize("ignored", [True, False])
def test_the_end_of_the_terminal_ends_what_was_not_started_with_nohup(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    went_on = False

    @_common.one_line
    def command() -> None:
        nonlocal went_on
        signal.raise_signal(signal.SIGHUP)
        went_on = True

    try:
        with contextlib.nullcontext() if ignored else pytest.raises(typer.Exit) as end:
            command()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert went_on == ignored
    assert ignored or end.value.exit_code == 129
