"""Starts `ep-rft` in processes forked from one that has imported everything, on request.

A line of JSON on stdin per request: `{"arguments", "log", "limits", "env"}` forks a command whose
output goes to the file `log`, and answers with its process id; `{"wait": id}` answers with its exit
status. `limits` are `resource` limits by name.
"""

import json
import os
import resource
import signal
import sys

import pyarrow.pandas_compat
import transformers

from eval_protocol_rft.cli import app
from tests.batch import graders

# Named so that they are loaded now, once for all commands.
assert transformers.AutoTokenizer
assert graders.evaluation_test
assert pyarrow.pandas_compat._pandas_api.is_series(None) is False


def run(request: dict) -> int:
    log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(request["env"])
    # Whoever runs the tests in the background of a script has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        app(request["arguments"], prog_name="ep-rft")
    except SystemExit as end:
        return end.code or 0
    return 0


for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            status = 1
            try:
                status = run(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    print(answer, flush=True)
