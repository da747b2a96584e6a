"""A program that is started, talked to and stopped as vLLM is, but in a second.

`install(folder)` puts a package called `vllm` there; with the folder on PYTHONPATH an interpreter
has it. As vLLM, it takes `vllm serve`'s command line, imports the middleware that is named there,
and starts a process of its own that outlives it and does not hear SIGTERM. What it does after that
the variable `STAND_IN` says: `bare` names its model and nothing more, `serve` is `ep-rft serve`,
`broken` fails as vLLM does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MAIN = """
import argparse, http.server, importlib, json, os, signal, socket, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("serve")
parser.add_argument("source")
for flag in ("served-model-name", "host", "dtype", "logprobs-mode", "generation-config",
             "middleware", "max-model-len", "gpu-memory-utilization"):
    parser.add_argument("--" + flag)
for flag in ("port", "seed", "tensor-parallel-size"):
    parser.add_argument("--" + flag, type=int)
for flag in ("enable-prefix-caching", "disable-uvicorn-access-log", "trust-remote-code"):
    parser.add_argument("--" + flag, action="store_true")
asked = parser.parse_args()
module, name = asked.middleware.rsplit(".", 1)
middleware = getattr(importlib.import_module(module), name)

core = subprocess.Popen(
    [sys.executable, "-S", "-c", "import signal, time\\n"
     "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)\\n"
     "print(flush=True)\\n"
     "time.sleep(100000)"], stdout=subprocess.PIPE)
core.stdout.readline()
with open(os.environ["STAND_IN_PIDS"], "a") as file:
    print(os.getpid(), core.pid, file=file)
mode = os.environ["STAND_IN"]
if mode == "broken":
    where = "(EngineCore pid=1) ERROR 11-30 10:00:00 [core.py:1] "
    print(where + "ValueError: head_dim 20 is not supported")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
listener.bind((asked.host, asked.port))
if mode == "serve":
    import uvicorn
    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.local.server._app import create_app
    from eval_protocol_rft.local.server._weights import ReloadingSampler

    sampler = LocalSampler.from_pretrained(asked.source, policy_version="initial")
    app = create_app(ReloadingSampler(sampler), sampler.tokenizer,
                     model_name=asked.served_model_name, context_length=sampler.context_length)
    app.add_middleware(middleware)
    listener.listen(2048)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
else:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": asked.served_model_name}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer((asked.host, 0), Handler, bind_and_activate=False)
    server.socket = listener
    listener.listen(64)
    server.serve_forever()
"""


def install(folder: Path) -> None:
    """Put it there."""
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "main.py").write_text(MAIN)


def environment(folder: Path, pids: Path, mode: str) -> Mapping[str, str]:
    """What a process has it by."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return {"PYTHONPATH": paths, "STAND_IN": mode, "STAND_IN_PIDS": str(pids)}


def processes(pids: Path) -> list[int]:
    """Numbers of all that were started: the server's and its core's, in turns."""
    return [int(number) for number in pids.read_text().split()] if pids.exists() else []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
