"""An agent on a server of its own, as Eval Protocol's documentation has it: `POST /init` begins a
rollout, whose model calls go to the base URL that it is given. A program that prints its port."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from openai import OpenAI

LOGGER = logging.getLogger("agent")


def log_handler(url: str) -> logging.Handler:
    """Eval Protocol's own, without what importing all of Eval Protocol costs."""
    package = importlib.util.find_spec("eval_protocol")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "log_utils" / "fireworks_tracing_http_handler.py"
    spec = importlib.util.spec_from_file_location("fireworks_tracing_http_handler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler: logging.Handler = module.FireworksTracingHttpHandler(url)
    return handler


def roll_out(request: dict[str, Any]) -> None:
    rollout_id = request["metadata"]["rollout_id"]
    try:
        client = OpenAI(base_url=request["model_base_url"], api_key=request["api_key"])
        params, messages = request["completion_params"], list(request["messages"])
        while True:
            reply = client.chat.completions.create(
                model=params["model"], messages=messages, tools=request["tools"]
            )
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                numbers = json.loads(call.function.arguments)
                result = str(numbers["a"] + numbers["b"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        status, extras = {"code": 100, "message": "done"}, {"answer": message.content}
    except Exception as error:  # noqa: BLE001 - an agent that fails says so
        status, extras = {"code": 13, "message": str(error)}, {}
    LOGGER.info(
        "rollout ended", extra={"status": status, "rollout_id": rollout_id, "extras": extras}
    )


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        threading.Thread(target=roll_out, args=(json.loads(body),), daemon=True).start()
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: Any) -> None:
        pass


def main() -> None:
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(log_handler(os.environ["FW_TRACING_GATEWAY_BASE_URL"]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the tests close it


if __name__ == "__main__":
    main()
