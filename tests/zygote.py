"""Starts programs in processes forked from one that has imported everything, on request.

A line of JSON on stdin per request. `{"program", "arguments", "cwd", "env", "limits", "out",
"err"}` forks a process that runs the program (`ep-rft` or `pytest`) with its output in the two
files, and answers with its process id. `{"wait": id}` answers with its exit status (below 0: the
signal that ended it), or null while it runs. `env` is the whole environment, `limits` are
`resource` limits by name.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pyarrow.pandas_compat
import pytest
import torch
import transformers
import uvicorn

import eval_protocol_rft.doctor._examination
import eval_protocol_rft.local.server._run
import eval_protocol_rft.loop._setup
import eval_protocol_rft.loop._train
from eval_protocol_rft.cli import app
from tests.data import graders

# Named so that they are loaded now, once for all programs.
assert transformers.AutoTokenizer
assert transformers.AutoModelForCausalLM
assert torch.nn
assert uvicorn.Server
assert eval_protocol_rft.local.server._run.Server
assert graders.evaluation_test
assert pyarrow.pandas_compat._pandas_api.is_series(None) is False
assert threading.active_count() == 1, "a thread does not survive a fork"

PROGRAMS = {
    "ep-rft": lambda arguments: app(arguments, prog_name="ep-rft"),
    "pytest": lambda arguments: sys.exit(pytest.main(arguments)),
}


def run(request: dict[str, Any]) -> int:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    # Whoever runs the tests in the background of a script has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        PROGRAMS[request["program"]](request["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it must not become a second zygote
        traceback.print_exc()
        return 1
    return 0


def fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = run(request)
        # As an interpreter ends, but for taking all that was imported apart.
        threading._shutdown()
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
