"""Starts programs in processes forked from one that has imported everything, on request.

A line of JSON on stdin per request. `{"program", "arguments", "cwd", "env", "limits", "out",
"err"}` forks a process that runs the program (`ep-rft`, `pytest` or `python`) with its output in
the two files, and answers with its process id. `{"wait": id}` answers with its exit status (below
0: the signal that ended it), or null while it runs. `env` is the whole environment, `limits` are
`resource` limits by name.

Each program has its fork server of grading workers from here too, where it needs one: another
child, forked before the program has threads, that runs the same `main` as one in an interpreter of
its own, which would import Eval Protocol first, for seconds. (Pools within the process of the
tests start theirs as users do.)
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pyarrow.pandas_compat
import pytest
import torch
import transformers
import uvicorn

import eval_protocol_rft.doctor._examination
import eval_protocol_rft.local.server._serving
import eval_protocol_rft.loop._setup
import eval_protocol_rft.loop._train
import eval_protocol_rft.scoring.executors._worker
from eval_protocol_rft.cli import app
from eval_protocol_rft.scoring.executors import _fork_server, _process
from tests.data import graders

# Named so that they are loaded now, once for all programs.
assert transformers.AutoTokenizer
assert transformers.AutoModelForCausalLM
assert torch.nn
assert uvicorn.Server
assert eval_protocol_rft.local.server._serving.Server
assert graders.evaluation_test
assert eval_protocol_rft.scoring.executors._worker.work
assert pyarrow.pandas_compat._pandas_api.is_series(None) is False
assert threading.active_count() == 1, "a thread does not survive a fork"


def run_file(arguments: list[str]) -> None:
    sys.argv[:] = arguments
    runpy.run_path(arguments[0], run_name="__main__")


PROGRAMS = {
    "python": run_file,
    "ep-rft": lambda arguments: app(arguments, prog_name="ep-rft"),
    "pytest": lambda arguments: sys.exit(pytest.main(arguments)),
}


class ForkServer:
    """A fork server that waits to be told where its caller is; as much of a `Popen` as is used."""

    def __init__(self) -> None:
        self.pipe, theirs = socket.socketpair()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self.pipe.close()
            ends(lambda: self._serve(theirs))
        theirs.close()

    @staticmethod
    def _serve(pipe: socket.socket) -> None:
        message, descriptors, _, _ = socket.recv_fds(pipe, 1 << 20, 1)
        pipe.close()
        if not message:
            return
        os.setsid()
        os.dup2(descriptors[0], 0)
        os.close(descriptors[0])
        sys.path[:] = json.loads(message)
        _fork_server.main()

    def begin(self, control: socket.socket) -> None:
        socket.send_fds(self.pipe, [json.dumps(sys.path).encode()], [control.fileno()])
        self.pipe.close()

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutExpired("a fork server", seconds)
            time.sleep(0.005)


def give_fork_server() -> None:
    """Have the first one that this program starts be forked now. Where that dies, the next is
    started as for users."""
    ready = ForkServer()
    server = _process._SERVER

    def begin() -> None:
        del server._start
        server._control, theirs = socket.socketpair()
        server._process = ready
        with theirs:
            ready.begin(theirs)

    server._start = begin


def run(request: dict[str, Any]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    # Whoever runs the tests in the background of a script, or under nohup, has them ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["program"] == "python" or request["arguments"][:1] in (["score"], ["train"]):
        give_fork_server()
    PROGRAMS[request["program"]](request["arguments"])


def ends(work: Callable[[], object]) -> None:
    """Run it, and end as an interpreter ends, but for taking all that was imported apart."""
    status = 1
    try:
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - it must not become a second zygote
            traceback.print_exc()
        threading._shutdown()
        atexit._run_exitfuncs()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        ends(lambda: run(request))
    return pid


def main() -> None:
    gc.freeze()  # what was imported stays shared with the programs
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = fork(request)
        print(json.dumps(answer), flush=True)


assert Path.cwd() == Path(__file__).parents[1]
main()
