"""An engine ends when the process that started it does, in whatever way, and with it all that it
has started. A stand-in for vLLM: what is tested is the life of processes, which are real."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.engine import stand_in
from tests.programs import Program, Zygote
from tests.waiting import wait_until

CLIENT = """
import os, signal, sys, threading, time
from eval_protocol_rft.local.engine import Engine, VllmOptions

def start():
    global engine
    options = VllmOptions(python=sys.executable)
    engine = Engine.start("vllm/arithmetic", options=options, takes_weights=True)
    engine.ready.result()

thread = threading.Thread(target=start)  # which has ended when the engine is used
thread.start()
thread.join()
supervisor = engine._supervisor.pid
folders = [engine.folder, *engine._weights]
if "fork" in sys.argv and os.fork() == 0:
    print("forked", os.getpid(), flush=True)
    time.sleep(100000)
if "forked-exit" in sys.argv and (child := os.fork()):
    os.waitpid(child, 0)
    print("alive", engine.problem(), flush=True)
elif "forked-exit" in sys.argv:
    sys.exit()
print("ready", supervisor, *folders, flush=True)
if "raise" in sys.argv:
    raise ValueError("of the user's code")
if "end" not in sys.argv:
    time.sleep(100000)
"""


class Running:
    """A client, and the processes of its engine."""

    def __init__(self, zygote: Zygote, folder: Path, *words: str) -> None:
        stand_in.install(folder / "lib")
        self.pids = folder / "pids"
        file = folder / "client.py"
        file.write_text(CLIENT)
        env = {**stand_in.environment(folder / "lib", self.pids, "bare"), "TMPDIR": str(folder)}
        self.client: Program = zygote.start(file, *words, program="python", env=env)

    def ready(self) -> list[str]:
        """Its supervisor, and folders."""
        said = self.client
        wait_until(lambda: "ready" in said.stdout or said.poll() is not None)
        line = next((x for x in said.stdout.splitlines() if x.startswith("ready")), None)
        assert line is not None, said.said
        return line.split()[1:]

    def require_gone(self, told: list[str]) -> None:
        supervisor, *folders = told
        server, core = stand_in.processes(self.pids)
        wait_until(lambda: not any(map(stand_in.is_alive, (server, core, int(supervisor)))))
        assert not any(map(os.path.exists, folders))


@pytest.fixture
def running(zygote, tmp_path):
    started: list[Running] = []

    def start(*words: str) -> Running:
        started.append(Running(zygote, tmp_path, *words))
        return started[-1]

    yield start
    for one in started:
        one.client.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_client_ends_the_engine_and_all_that_it_started(running, number) -> None:
    run = running()
    told = run.ready()
    server, core = stand_in.processes(run.pids)
    assert stand_in.is_alive(server)
    assert stand_in.is_alive(core)
    assert all(map(os.path.exists, told[1:]))
    assert run.client.kill(number) != 0
    run.require_gone(told)


@pytest.mark.parametrize("words", [["end"], ["raise"]])
def test_it_ends_with_the_client(running, words) -> None:
    run = running(*words)
    told = run.ready()
    assert (run.client.wait() == 0) == (words == ["end"])
    run.require_gone(told)


def test_a_fork_that_lives_on_keeps_no_engine(running) -> None:
    run = running("fork")
    told = run.ready()
    wait_until(lambda: "forked" in run.client.stdout)
    fork = int(run.client.stdout.split("forked")[1].split()[0])
    try:
        run.client.kill()
        run.require_gone(told)
        assert stand_in.is_alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_fork_that_ends_stops_no_engine_of_its_parent(running) -> None:
    run = running("forked-exit")
    run.ready()
    assert "alive None" in run.client.stdout
    assert all(map(stand_in.is_alive, stand_in.processes(run.pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
def test_an_engine_ends_with_its_supervisor(running) -> None:
    run = running()
    supervisor, *_ = run.ready()
    server, core = stand_in.processes(run.pids)
    os.kill(int(supervisor), signal.SIGKILL)
    wait_until(lambda: not stand_in.is_alive(server))
    # What it had started is ended by the client, when that ends.
    run.client.kill(signal.SIGINT)
    wait_until(lambda: not stand_in.is_alive(core))
