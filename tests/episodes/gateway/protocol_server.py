"""A server on loopback that speaks one protocol and says what a test hands it, for real clients."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from msgspec.json import encode

from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply, ReplyChoice

ARGUMENTS = '{"a":2,  "b": 40}'
SECOND_ARGUMENTS = '{"b": 1, "a":1.0}'
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def tool_call(
    arguments: str = ARGUMENTS, name: str = "add", call_id: str = "call_A1"
) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def choice(
    content: str = "", *calls: dict[str, Any], reasoning: str | None = None, **fields: Any
) -> ReplyChoice:
    return ReplyChoice(
        **{
            "content": content,
            "reasoning": reasoning,
            "tool_calls": calls,
            "finish_reason": "stop",
            **fields,
        }
    )


def reply(*choices: ReplyChoice) -> Reply:
    return Reply(
        id="0123456789abcdef" * 2,
        created=1_790_000_000,
        model="m",
        choices=choices,
        prompt_tokens=11,
        completion_tokens=7,
    )


FIRST = choice(
    " I will add.\n",
    tool_call(),
    tool_call(SECOND_ARGUMENTS, call_id="call_A2"),
    reasoning="I need the tool.",
)
"""The first answer of the contract, with all that clients change on its way back."""


def meaning(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a message says, whichever way a client wrote it down."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls = [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message["role"], content, calls


def meaning_of(answer: ReplyChoice) -> tuple[Any, ...]:
    return meaning(
        {"role": "assistant", "content": answer.content, "tool_calls": answer.tool_calls}
    )


@dataclass
class ProtocolServer:
    api: ModuleType
    answers: list[Reply | CallError]
    url: str = ""
    calls: list[ModelCall] = field(default_factory=list)

    def answer(self, body: bytes) -> tuple[int, str, list[bytes]]:
        """Status, content type and body of the answer."""
        try:
            call = self.api.read_call(body)
        except CallError as error:
            return error.status, "application/json", [encode(self.api.error_body(error))]
        self.calls.append(call)
        answer = self.answers.pop(0)
        if isinstance(answer, CallError) and not call.stream:
            return answer.status, "application/json", [encode(self.api.error_body(answer))]
        if not call.stream:
            return 200, "application/json", [encode(self.api.reply_body(call, answer))]
        events = (
            [self.api.error_event(answer)]
            if isinstance(answer, CallError)
            else self.api.reply_events(call, answer)
        )
        comments = itertools.repeat(self.api.keep_alive)
        pairs = itertools.chain.from_iterable(zip(comments, events, strict=False))
        return 200, "text/event-stream", list(pairs)


@contextmanager
def speaking(api: ModuleType, *answers: Reply | CallError) -> Iterator[ProtocolServer]:
    """Serve these answers, one for each request; a stream has a comment before each event."""
    served = ProtocolServer(api, list(answers))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, kind, chunks = served.answer(body)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(sum(map(len, chunks))))
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(chunk)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def events_of(stream: Sequence[bytes]) -> list[tuple[str | None, Any]]:
    """Name and data of each event, read as the standard says and no more."""
    read = []
    for block in b"".join(stream).decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert set(fields) <= {"event", "data"}
        data = fields["data"]
        read.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return read


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
objects = st.dictionaries(
    texts, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts, max_size=3
)


@st.composite
def choices(draw: st.DrawFn) -> ReplyChoice:
    """Any answer: text, thinking and calls, ended or cut off."""
    calls = [
        tool_call(
            json.dumps(arguments, ensure_ascii=draw(st.booleans())),
            name=draw(st.from_regex(r"[a-z_]{1,12}", fullmatch=True)),
            call_id=f"call_{index}",
        )
        for index, arguments in enumerate(draw(st.lists(objects, max_size=3)))
    ]
    return choice(
        draw(texts),
        *calls,
        reasoning=draw(st.none() | texts),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
    )
