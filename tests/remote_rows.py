"""Rows as Eval Protocol's remote processors bring them back: a tracing proxy on loopback that gives
out recorded traces, read by Eval Protocol's own code."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from eval_protocol.models import EvaluateResult, EvaluationRow, InputMetadata, Message, Status
from eval_protocol.pytest.tracing_utils import (
    default_fireworks_output_data_loader,
    update_row_with_remote_trace,
)

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes.gateway._payloads import encode_payloads
from eval_protocol_rft.sampling._types import Completion
from tests.episodes import templates
from tests.rollouts import TOOLS

TOKENIZER = templates.merging_tokenizer(templates.APPENDS)
END = TOKENIZER.tokenizer.convert_tokens_to_ids(templates.END)
QUESTION = {"role": "user", "content": "2 + 40?"}
ASKED = [{"role": "system", "content": "Add."}, QUESTION]
CALL = '<tool_call>{"name": "add", "arguments": {"a":2,  "b": 40}}</tool_call>'
CALLED = {
    "role": "assistant",
    "content": "I will add.\n",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 2, "b": 40}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "call_1"}
IDS = ("rollout", "invocation", "experiment", "run", "row")
ANSWER = {"role": "assistant", "content": "It is 42."}


def said(text: str, *, end: bool = True) -> Completion:
    """A completion of the text, with logprobs that float32 holds."""
    ids = [*templates.ids_of(TOKENIZER, text), *([END] if end else [])]
    logprobs = [-0.5 - 0.25 * i for i in range(len(ids))]
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason="stop" if end else "length")


def two_turns() -> Conversation:
    """A tool call, its result, an answer."""
    talk = Conversation.start(ASKED, TOOLS, TOKENIZER)
    talk.sampled(said("I will add.\n" + CALL))
    talk.append([RESULT])
    talk.sampled(said("It is 42."))
    return talk


def trace(
    messages: Sequence[dict[str, Any]],
    output: dict[str, Any],
    turn: dict[str, Any],
    *,
    routing: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """One call; `turn` as `Conversation.turns` has it."""
    return {
        "id": f"trace-{len(messages)}",
        "name": "chat",
        "tags": [f"{name}_id:{name}-1" for name in IDS],
        "timestamp": "2026-01-01T00:00:00Z",
        "input": {"messages": list(messages), "tools": TOOLS},
        "output": output,
        "observations": [],
        "payloads": encode_payloads(
            turn["prompt_ids"], turn["completion_ids"], turn["completion_logprobs"], routing
        ),
    }


def two_traces(routing: Sequence[Any] = (None, None)) -> list[dict[str, Any]]:
    first, second = two_turns().turns()
    return [
        trace(ASKED, CALLED, first, routing=routing[0]),
        trace([*ASKED, CALLED, RESULT], ANSWER, second, routing=routing[1]),
    ]


@contextlib.contextmanager
def proxy(traces: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Gives out all of them, whatever it is asked for; yields its base URL."""
    body = json.dumps({"project_id": "p", "total_traces": len(traces), "traces": list(traces)})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert urlsplit(self.path).path == "/v1/traces/pointwise"
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def asked_row(row_id: str = "row-1", **params: Any) -> EvaluationRow:
    return EvaluationRow(
        messages=[Message(**message) for message in ASKED],
        tools=TOOLS,
        input_metadata=InputMetadata(
            row_id=row_id,
            completion_params={"model": "fireworks_ai/accounts/x/models/y", "temperature": 1.0}
            | params,
        ),
    )


def brought_back(
    traces: Sequence[dict[str, Any]],
    *,
    score: float | None = 1.0,
    row: EvaluationRow | None = None,
    change: Callable[[dict[str, Any]], Any] = lambda extra: None,
) -> EvaluationRow:
    """A row after Eval Protocol has read these traces for it, and its evaluator scored it."""
    row = asked_row() if row is None else copy.deepcopy(row)
    row.execution_metadata.rollout_id = "rollout-1"
    with proxy(traces) as url:
        update_row_with_remote_trace(
            row, default_fireworks_output_data_loader, url, include_payloads=True
        )
    row.rollout_status = Status.rollout_finished()
    if score is not None:
        row.evaluation_result = EvaluateResult(score=score, reason="said so")
    change(row.execution_metadata.extra)
    return row
