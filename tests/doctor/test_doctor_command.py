"""`ep-rft doctor` as a user types it: each test runs the command in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from eval_protocol_rft.models import bundled_model_path
from tests.doctor.liars import Liar, drop_end, vllm_app
from tests.serving import running
from tests.stub_server import Hang, StubServer

FOLDER = str(bundled_model_path("arithmetic"))
EP_RFT = [sys.executable, "-c", "from eval_protocol_rft.cli import app; app(prog_name='ep-rft')"]
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EP_RFT, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, **environment},
        check=False,
    )


@contextmanager
def served():
    """`ep-rft serve`, in a process of its own."""
    with subprocess.Popen(
        [*EP_RFT, "serve", "--port", "0", "--served-model-name", "arithmetic"],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" on ")[1].split(" ")[0]
        finally:
            process.send_signal(signal.SIGINT)


def test_the_help_lists_it():
    done = subprocess.run(
        [*EP_RFT, "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert "doctor" in done.stdout
    assert "ep-rft doctor --model local/arithmetic" in doctor("--help").stdout


def test_the_bundled_model_behind_ep_rft_serve_is_fit_and_the_table_says_so():
    with served() as url:
        done = doctor(
            "--model", "arithmetic", "--base-url", url, "--tokenizer", FOLDER,
            "--weights", FOLDER, "--requests", "80",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on {url}/v1, temperature 1: fit to train" in done.stdout
    for check in ("tokenizer round trip", "token frequency", "trainer: mean k3"):
        assert check in done.stdout
    assert "G-test" in done.stdout


def test_a_lie_is_exit_code_1_and_json_says_which():
    with running(vllm_app(Liar(drop_end), processed=True, echo=list)) as url:
        done = doctor(
            "--model", "m", "--base-url", url, "--tokenizer", FOLDER, "--json",
            "--requests", "80", "--max-tokens", "32",
        )  # fmt: skip
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["fit"] is False
    [failed] = [f for f in found["findings"] if f["verdict"] == "fail"]
    assert failed["name"] == "end of turn"
    assert failed["numbers"]["without_end"] > 0
    assert set(failed) == {"name", "verdict", "measured", "bar", "advice", "numbers"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "0"], "--temperature"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--weights", "no-such-folder"], "--weights"),
        (["--model", "m", "--base-url", "not-a-url"], "base_url"),
        (["--base-url", "http://127.0.0.1:8000"], "--served-model-name"),
        (["--logprobs-mode", "both"], "logprobs_mode"),
        (["--requests", "3"], "--requests"),
    ],
)
def test_a_wrong_option_is_exit_code_2(arguments, named):
    done = doctor("--model", "local/arithmetic", *arguments)
    assert done.returncode == 2, done.stdout
    assert named in done.stderr


def test_the_key_appears_nowhere():
    with StubServer() as stub:
        secret = "sk-0123456789-secret"
        done = doctor(
            "--model", "m", "--base-url", stub.url, "--tokenizer", FOLDER, "--json",
            "--requests", "40", "--api-key-env", "MY_KEY", MY_KEY=secret,
        )  # fmt: skip
        sent = {seen.headers.get("authorization") for seen in stub.requests}
    assert sent == {f"Bearer {secret}"}
    assert secret not in done.stdout + done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_it_ends_in_one_line(number, code):
    with StubServer() as stub:
        stub.script = lambda seen: Hang()
        command = ["--model", "m", "--base-url", stub.url, "--tokenizer", FOLDER, "--quiet"]
        with subprocess.Popen(
            [*EP_RFT, "doctor", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        ) as process:
            stub.wait_until(lambda: bool(stub.requests), seconds=30)
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert err == "ep-rft: stopped; nothing was decided\n"
