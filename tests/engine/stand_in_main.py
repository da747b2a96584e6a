"""What the stand-in for vLLM runs as `vllm.entrypoints.cli.main`, see `stand_in`."""

from __future__ import annotations

import argparse
import http.server
import importlib
import json
import os
import socket
import subprocess
import sys

CORE = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(flush=True)
time.sleep(100000)
"""


class Sleeps:
    """ASGI middleware. Asleep, the engine has nothing to sample with, and no room for weights."""

    enabled = False

    def __init__(self, app):
        self.app, self.awake = app, {"weights", "kv_cache"}

    async def __call__(self, scope, receive, send):
        path, query = scope.get("path"), scope.get("query_string", b"").decode()
        if path in ("/sleep", "/wake_up"):
            await self.answer(send, self.change(path, query))
        elif (path == "/v1/completions" and len(self.awake) < 2) or (
            path == "/collective_rpc" and "weights" not in self.awake
        ):
            await self.answer(send, 400)
        else:
            await self.app(scope, receive, send)

    def change(self, path: str, query: str) -> int:
        """HTTP status of the answer."""
        if not self.enabled:
            return 500
        if path == "/wake_up":
            self.awake.add(query.removeprefix("tags="))
        elif query == "level=2&mode=wait":
            self.awake.clear()
        else:
            return 400
        with open(os.environ["STAND_IN_PIDS"] + ".sleeps", "a") as file:
            print(path, file=file)
        return 200

    async def answer(self, send, status: int):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("source")
    for flag in (
        *("served-model-name", "host", "dtype", "logprobs-mode", "generation-config", "middleware"),
        *("max-model-len", "gpu-memory-utilization", "hf-overrides"),
    ):
        parser.add_argument(f"--{flag}")
    for flag in ("port", "seed", "tensor-parallel-size"):
        parser.add_argument(f"--{flag}", type=int)
    for flag in (
        *("enable-prefix-caching", "disable-uvicorn-access-log", "trust-remote-code"),
        "enable-sleep-mode",
    ):
        parser.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args()


def serve(asked: argparse.Namespace, listener: socket.socket, middleware) -> None:
    """Sample for real."""
    import uvicorn

    from eval_protocol_rft.local import LocalSampler
    from eval_protocol_rft.local.server._app import create_app
    from eval_protocol_rft.local.server._weights import ReloadingSampler

    sampler = LocalSampler.from_pretrained(asked.source, policy_version="initial")
    app = create_app(
        ReloadingSampler(sampler),
        sampler.tokenizer,
        model_name=asked.served_model_name,
        context_length=sampler.context_length,
    )
    Sleeps.enabled = asked.enable_sleep_mode
    app.add_middleware(Sleeps)
    app.add_middleware(middleware)
    listener.listen(2048)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def name_the_model(asked: argparse.Namespace, listener: socket.socket) -> None:
    """And nothing more."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": asked.served_model_name}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer((asked.host, 0), Handler, bind_and_activate=False)
    server.socket = listener
    listener.listen(64)
    server.serve_forever()


def main() -> None:
    asked = command_line()
    module, name = asked.middleware.rsplit(".", 1)
    middleware = getattr(importlib.import_module(module), name)
    core = subprocess.Popen([sys.executable, "-S", "-c", CORE], stdout=subprocess.PIPE)
    core.stdout.readline()
    with open(os.environ["STAND_IN_PIDS"], "a") as file:
        print(os.getpid(), core.pid, file=file)
    if os.environ["STAND_IN"] == "broken":
        where = "(EngineCore pid=1) ERROR 11-30 10:00:00 [core.py:1] "
        print(where + "ValueError: head_dim 20 is not supported")
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
    listener.bind((asked.host, asked.port))
    if os.environ["STAND_IN"] == "serve":
        serve(asked, listener, middleware)
    else:
        name_the_model(asked, listener)


if __name__ == "__main__":
    main()
