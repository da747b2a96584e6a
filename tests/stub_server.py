"""A completions server in Fireworks' shape on loopback, for tests.

What it samples follows from (prompt, seed) alone, so a test knows what belongs in a record without
asking the code under test. It keeps every request, and misbehaves where a test's script says so.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.waiting import PATIENCE, wait_until

ALPHABET = tuple(range(64, 90))
END_OF_TURN = 256
"""The ids it draws from, and the one that ends every completion: those of `chat_tokenizer`."""


FIRST_OWN_SEED = 2**32
"""Its own seeds are above those that a request may carry."""


@dataclass(slots=True)
class Seen:
    """One request, as the server saw it."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    path: str
    seed: int
    """What it draws with: the request's seed, or one of its own that no other request has."""
    attempt: int
    """1 for the first request with this prompt and seed, 2 for the next, ..."""
    place: int
    """How many other (prompt, seed) pairs came before this one."""
    arrived: float
    """Seconds of the server's monotonic clock."""
    outcome: str = "open"
    """Then `answered`, `dropped` (by us) or `disconnected` (by the client)."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.body["prompt"])


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this instead of a completion."""

    code: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hang:
    """Read the request and never answer."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Reset the connection, before the answer or in the middle of its body."""

    within_body: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """Answer well, after this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Held:
    """Answer well, once this is set."""

    let_go: threading.Event


@dataclass(frozen=True, slots=True)
class Changed:
    """Answer with the right reply after `change` has been at it."""

    change: Callable[[dict[str, Any]], object]


@dataclass(frozen=True, slots=True)
class Raw:
    """Write these bytes on the wire and close: what no HTTP library would send."""

    data: bytes


Answer = Status | Hang | Drop | Late | Held | Changed | Raw
Script = Callable[[Seen], Answer | None]


def sampled(prompt: Sequence[int], seed: int, max_tokens: int) -> tuple[list[int], list[float]]:
    """The ids and sampling logprobs that the server gives for a prompt and a seed."""
    rng = random.Random(f"{list(prompt)}/{seed}")
    ids = [*rng.choices(ALPHABET, k=rng.randint(3, 9)), END_OF_TURN][:max_tokens]
    return ids, [-round(rng.uniform(0.001, 3.0), 6) for _ in ids]


def reply_to(body: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The whole reply to a request. Its `text` is not what the ids say: nobody may use it."""
    prompt = list(body["prompt"])
    ids, logprobs = sampled(prompt, seed, body["max_tokens"])
    content = [
        {
            "token": "?",
            "token_id": token,
            "logprob": round(logprob * 1.25, 6),
            "sampling_logprob": logprob,
            "bytes": [63],
            "text_offset": i,
            "top_logprobs": [],
        }
        for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True))
    ]
    return {
        "id": f"cmpl-{seed}",
        "object": "text_completion",
        "created": 1760000000,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "text": "not what was sampled",
                "finish_reason": "stop" if ids[-1] == END_OF_TURN else "length",
                "prompt_token_ids": prompt,
                "token_ids": ids,
                "logprobs": {"content": content},
                "raw_output": {
                    "completion": "not what was sampled",
                    "prompt_fragments": [],
                    "prompt_token_ids": prompt,
                    "completion_token_ids": ids,
                    "completion_logprobs": None,
                },
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "total_tokens": len(prompt) + len(ids),
        },
    }


class StubServer:
    """Serves `POST .../completions` from a thread of its own until the `with` block ends."""

    def __init__(self) -> None:
        self.script: Script = lambda seen: None
        """What to answer instead of a good reply; None: nothing instead."""
        self.metrics: Callable[[], Answer] = lambda: Status(404)
        """What to answer to `GET /metrics`: a `Status`, or a `Hang`."""
        self.polls: list[Mapping[str, str]] = []
        """Headers of the requests for it."""
        self.requests: list[Seen] = []
        self.in_flight = 0
        self.peak = 0
        """Most requests that were ever open at once."""
        self._attempts: dict[tuple[tuple[int, ...], int], int] = {}
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        """Base URL without a path."""
        assert self._runner is not None
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    @property
    def connections(self) -> int:
        """Open sockets, idle ones included."""
        assert self._runner is not None
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    def outcomes(self) -> list[str]:
        return [seen.outcome for seen in self.requests]

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Block until the server has seen it; it learns of closed sockets late."""
        wait_until(true, self.outcomes)

    async def until(self, true: Callable[[], bool]) -> None:
        """`wait_until` for a test that runs on a loop."""
        await asyncio.to_thread(self.wait_until, true)

    def __enter__(self) -> StubServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/{prefix:.*}completions", self._handle)
        app.router.add_get("/metrics", self._tell_metrics)
        # Without cancellation a handler would not learn that its client has gone.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()

    async def _tell_metrics(self, request: web.Request) -> web.Response:
        self.polls.append(request.headers.copy())
        answer = self.metrics()
        if not isinstance(answer, Status):
            await asyncio.Event().wait()
        assert isinstance(answer, Status)
        return web.Response(status=answer.code, body=answer.body, headers=answer.headers)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        seed = body.get("seed", FIRST_OWN_SEED + len(self.requests))
        key = (tuple(body["prompt"]), seed)
        self._attempts[key] = self._attempts.get(key, 0) + 1
        seen = Seen(
            body=body,
            headers=request.headers.copy(),
            path=request.path,
            seed=seed,
            attempt=self._attempts[key],
            place=list(self._attempts).index(key),
            arrived=time.monotonic(),
        )
        self.requests.append(seen)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            return await self._answer(request, seen)
        except (asyncio.CancelledError, ConnectionError):
            seen.outcome = "disconnected"
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        answer = self.script(seen)
        match answer:
            case Status(code, body, headers):
                seen.outcome = "answered"
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                return web.Response(status=code, body=data, headers=headers)
            case Hang():
                await asyncio.Event().wait()
            case Raw(data):
                assert request.transport is not None
                seen.outcome = "answered"
                request.transport.write(data)
                request.transport.close()
                return web.Response()
            case Late(seconds):
                await asyncio.sleep(seconds)
            case Held(let_go):
                while not let_go.is_set():  # noqa: ASYNC110 - a test in another thread sets it
                    await asyncio.sleep(0.002)
        reply = reply_to(seen.body, seen.seed)
        if isinstance(answer, Changed):
            answer.change(reply)
        data = json.dumps(reply).encode()
        headers = {"x-request-id": f"req-{seen.seed}-{seen.attempt}"}
        if not isinstance(answer, Drop):
            seen.outcome = "answered"
            return web.Response(body=data, headers=headers, content_type="application/json")
        seen.outcome = "dropped"
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        if answer.within_body:
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response
