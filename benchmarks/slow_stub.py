"""A completions server that takes its time and next to no CPU: replies are made before.

    python benchmarks/slow_stub.py WORKLOAD (--seconds 1.0 | --seconds-of-seeds FILE)
                                            [--tokens-per-second N]

It prints the port it listens on (loopback only) and ends when its standard input does. Invariant:
a reply is written in one piece, its latency after the request arrived, and depends on nothing that
other requests do. Three shapes, told apart by the request: a completion in JSON (see stub.py), the
same as a stream, and a chat completion. An event of a stream has one token, or `stream_interval`
where the request says so; with `--tokens-per-second` each is written by itself, at that pace.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from peer_kit import MODEL
from stub import PROMPT, Replies
from workload import CannedReply, Workload

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
BACKLOG = 4096
"""Connections that may wait to be accepted: a peer opens a thousand at once."""


class Request(msgspec.Struct):
    """What tells the shapes apart."""

    prompt: msgspec.Raw = msgspec.Raw(b"[]")
    messages: msgspec.Raw = msgspec.Raw()
    stream: bool = False
    stream_interval: int = 1
    return_token_ids: bool = False
    seed: int | None = None


class Answers:
    """Prepared answers of every shape."""

    def __init__(self, workload: Workload) -> None:
        self._json = Replies(workload)
        self._decode = msgspec.json.Decoder(Request).decode
        [reply] = workload.replies
        self._stream = functools.cache(functools.partial(_stream, reply))
        chat = msgspec.json.encode(_chat(reply))
        self._chat = HEAD % (b"application/json", len(chat)) + chat

    def answer(self, body: bytes) -> tuple[bytes, int | None]:
        """The whole answer to a request's body, and the request's seed."""
        request = self._decode(body)
        if bytes(request.messages):
            return self._chat, request.seed
        if request.stream:
            parts = self._stream(request.return_token_ids, request.stream_interval)
            events = bytes(request.prompt).join(parts)
            return HEAD % (b"text/event-stream", len(events)) + events, request.seed
        return self._json.answer(body), request.seed


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other."""

    def __init__(
        self,
        answers: Answers,
        seconds: float,
        seconds_of_seeds: Mapping[int | None, float],
        tokens_per_second: float | None,
    ) -> None:
        self._answers = answers
        self._tokens_per_second = tokens_per_second
        self._writing: set[asyncio.Task[None]] = set()
        self._seconds = seconds
        self._seconds_of_seeds = seconds_of_seeds
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).lower()
            whole = end + 4 + int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(self._received) < whole:
                return
            reply, seed = self._answers.answer(bytes(self._received[end + 4 : whole]))
            del self._received[:whole]
            seconds = self._seconds_of_seeds.get(seed, self._seconds)
            self._loop.call_later(seconds, self._write, reply)

    def _write(self, reply: bytes) -> None:
        if self._tokens_per_second and b"text/event-stream" in reply[:80]:
            task = self._loop.create_task(self._trickle(reply, self._tokens_per_second))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)
        # A peer that gave up has closed its connection.
        elif not self._transport.is_closing():
            self._transport.write(reply)

    async def _trickle(self, reply: bytes, tokens_per_second: float) -> None:
        began, sent = self._loop.time(), 0
        for event in reply.split(b"\n\n")[:-1]:
            if self._transport.is_closing():
                return
            self._transport.write(event + b"\n\n")
            sent += event.count(b'"token_id":')
            await asyncio.sleep(began + sent / tokens_per_second - self._loop.time())


def _entries(reply: CannedReply) -> list[dict[str, Any]]:
    offset = 0
    entries = []
    for token, token_id, logprob, sampling_logprob in zip(
        reply.tokens, reply.token_ids, reply.logprobs, reply.sampling_logprobs, strict=True
    ):
        entries.append(
            {
                "token": token,
                "token_id": token_id,
                "logprob": logprob,
                "sampling_logprob": sampling_logprob,
                "bytes": list(token.encode()),
                "text_offset": offset,
                "top_logprobs": [],
            }
        )
        offset += len(token)
    return entries


def _stream(reply: CannedReply, ids: bool, interval: int) -> list[bytes]:
    """Events of `interval` tokens; cut where the prompt's ids go."""
    head = {
        "id": "cmpl-stub",
        "object": "text_completion",
        "created": 1_760_000_000,
        "model": MODEL,
    }
    prompt = msgspec.Raw(PROMPT.encode())
    events: list[dict[str, Any]] = []
    entries = _entries(reply)
    for start in range(0, len(entries), interval):
        some = entries[start : start + interval]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(entry["token"] for entry in some),
            "finish_reason": None,
            "logprobs": {"content": some},
        }
        if ids:
            choice["token_ids"] = [entry["token_id"] for entry in some]
            choice["prompt_token_ids"] = None if events else prompt
        events.append({**head, "choices": [choice]})
    last = events[-1]["choices"][0]
    last["finish_reason"] = "length"
    last["raw_output"] = {
        "completion": "".join(reply.tokens),
        "prompt_fragments": [],
        "prompt_token_ids": prompt,
        "completion_token_ids": reply.token_ids,
        "completion_logprobs": None,
        "grammar": None,
        "images": None,
    }
    lines = [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events]
    return (b"".join(lines) + b"data: [DONE]\n\n").split(PROMPT.encode())


def _chat(reply: CannedReply) -> dict[str, Any]:
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "".join(reply.tokens)},
                "finish_reason": "length",
                "logprobs": {"content": _entries(reply)},
            }
        ],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": len(reply.tokens),
            "total_tokens": 100 + len(reply.tokens),
        },
    }


async def serve(
    workload: Workload,
    seconds: float,
    seconds_of_seeds: Mapping[int | None, float],
    tokens_per_second: float | None,
) -> None:
    answers = Answers(workload)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(answers, seconds, seconds_of_seeds, tokens_per_second),
        "127.0.0.1",
        0,
        backlog=BACKLOG,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent closes it or dies
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workload")
    parser.add_argument("--seconds", type=float, default=1.0, help="latency of every reply")
    parser.add_argument("--seconds-of-seeds", type=Path, help="JSON: latency by request seed")
    parser.add_argument("--tokens-per-second", type=float, help="pace of a stream's events")
    options = parser.parse_args()
    table: dict[int | None, float] = {}
    if options.seconds_of_seeds:
        table = msgspec.json.decode(options.seconds_of_seeds.read_bytes(), type=dict[int, float])
    workload = Workload.load(options.workload)
    asyncio.run(serve(workload, options.seconds, table, options.tokens_per_second))


if __name__ == "__main__":
    main()
