"""`ep-rft doctor` as a user types it: each test runs the command in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from eval_protocol_rft.local.models import bundled_model_path
from tests.doctor.liars import Liar, drop_end, vllm_app
from tests.serving import running
from tests.stub_server import Hang, StubServer
from tests.waiting import wait_until

FOLDER = str(bundled_model_path("arithmetic"))
ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture
def doctor(zygote):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return zygote.run("doctor", *arguments, env={**ENVIRONMENT, **environment})

    return run


@pytest.fixture
def served(zygote):
    """The address of `ep-rft serve`, in a process of its own."""
    arguments = ("serve", "--port", "0", "--served-model-name", "arithmetic")
    server = zygote.start(*arguments, env=ENVIRONMENT)
    try:
        yield server.line().split(" on ")[1].split(" ")[0]
    finally:
        server.kill(signal.SIGINT)


def test_the_help_lists_it(zygote, doctor):
    assert "doctor" in zygote.run("--help", env=ENVIRONMENT).stdout
    assert "ep-rft doctor --model local/arithmetic" in doctor("--help").stdout


def test_the_bundled_model_behind_ep_rft_serve_is_fit_and_the_table_says_so(served, doctor):
    done = doctor(
        "--model", "arithmetic", "--base-url", served, "--tokenizer", FOLDER,
        "--weights", FOLDER, "--requests", "80",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on {served}/v1, temperature 1: fit to train" in done.stdout
    for check in ("tokenizer round trip", "token frequency", "trainer: mean k3"):
        assert check in done.stdout
    assert "G-test" in done.stdout


def test_a_lie_is_exit_code_1_and_json_says_which(doctor):
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
def test_a_wrong_option_is_exit_code_2(arguments, named, doctor):
    done = doctor("--model", "local/arithmetic", *arguments)
    assert done.returncode == 2, done.stdout
    assert named in done.stderr


def test_the_key_appears_nowhere(doctor):
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
def test_told_to_end_it_ends_in_one_line(number, code, zygote):
    with StubServer() as stub:
        stub.script = lambda seen: Hang()
        command = ["--model", "m", "--base-url", stub.url, "--tokenizer", FOLDER, "--quiet"]
        program = zygote.start("doctor", *command, env=ENVIRONMENT)
        wait_until(lambda: bool(stub.requests))
        assert program.kill(number) == code
    assert program.stdout == ""
    assert program.stderr == "ep-rft: stopped; nothing was decided\n"
