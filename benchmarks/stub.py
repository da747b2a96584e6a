"""A completions server that costs next to nothing: every reply in Fireworks' shape, made before.

    python benchmarks/stub.py WORKLOAD

It prints the port it listens on (loopback only) and ends when its standard input does. What changes
from reply to reply is the prompt's ids, which are echoed from the request as they came, and which
of the prepared completions it carries. HTTP is read by hand: as much as keep-alive needs.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec
from workload import CannedReply, Workload

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: stub\r\n"
    b"Content-Length: %d\r\n\r\n"
)
PROMPT = '"@prompt@"'
"""Stands where the prompt's ids go."""
USAGE = (
    b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
    b'"prompt_tokens_details":{"cached_tokens":0}},"perf_metrics":null}'
)


class Request(msgspec.Struct):
    prompt: msgspec.Raw
    return_token_ids: bool = False
    raw_output: bool = False


class Replies:
    """Prepared bodies, cut where the prompt's ids go."""

    def __init__(self, workload: Workload) -> None:
        self._decode = msgspec.json.Decoder(Request).decode
        self._bodies = {
            (ids, raw): [_body(reply, ids, raw) for reply in workload.replies]
            for ids in (False, True)
            for raw in (False, True)
        }
        self._sampled = workload.max_tokens
        self._prompts: dict[bytes, list[int]] = {}
        """Prompt -> its place among the prompts, and how often it was asked."""

    def answer(self, body: bytes) -> bytes:
        request = self._decode(body)
        prompt = bytes(request.prompt)
        place = self._prompts.setdefault(prompt, [len(self._prompts), 0])
        bodies = self._bodies[request.return_token_ids, request.raw_output]
        parts = bodies[sum(place) % len(bodies)]
        place[1] += 1
        sent = prompt.count(b",") + 1
        reply = prompt.join(parts) + USAGE % (sent, self._sampled, sent + self._sampled)
        return HEAD % len(reply) + reply


def _body(reply: CannedReply, ids: bool, raw: bool) -> list[bytes]:
    """A reply up to its usage, cut where the prompt's ids go."""
    offsets = [0]
    for token in reply.tokens:
        offsets.append(offsets[-1] + len(token))
    text = "".join(reply.tokens)
    content = [
        {
            "token": token,
            "token_id": token_id,
            "logprob": logprob,
            "sampling_logprob": sampling_logprob,
            "bytes": list(token.encode()),
            "text_offset": offset,
            "top_logprobs": [],
        }
        for token, token_id, logprob, sampling_logprob, offset in zip(
            reply.tokens,
            reply.token_ids,
            reply.logprobs,
            reply.sampling_logprobs,
            offsets[:-1],
            strict=True,
        )
    ]
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "finish_reason": "length",
        "logprobs": {"content": content},
    }
    if ids:
        choice |= {"prompt_token_ids": msgspec.Raw(PROMPT.encode()), "token_ids": reply.token_ids}
    if raw:
        choice["raw_output"] = {
            "completion": text,
            "prompt_fragments": [],
            "prompt_token_ids": msgspec.Raw(PROMPT.encode()),
            "completion_token_ids": reply.token_ids,
            "completion_logprobs": None,
            "grammar": None,
            "images": None,
        }
    value = {
        "id": "cmpl-stub",
        "object": "text_completion",
        "created": 1_760_000_000,
        "model": "accounts/benchmark/models/stub",
        "choices": [choice],
    }
    return msgspec.json.encode(value).removesuffix(b"}").split(PROMPT.encode())


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            whole = end + 4 + _content_length(bytes(self._received[:end]))
            if len(self._received) < whole:
                return
            body = bytes(self._received[end + 4 : whole])
            del self._received[:whole]
            self._transport.write(self._replies.answer(body))


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError(f"a request without Content-Length: {head!r}")


async def serve(workload: Workload) -> None:
    replies = Replies(workload)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(replies), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent closes it or dies
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(Workload.load(sys.argv[1])))
