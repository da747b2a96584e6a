"""A server on loopback for tests, and what stands behind it where the model does not matter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft.local.server._serving import Server
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from tests.waiting import PATIENCE

EOS = "<|im_end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token (ids 0-255, in an order of the library's), and one control token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


class ScriptedSampler:
    """Answers with what `script(prompt_ids, params, seed)` returns or raises, and keeps what it was
    asked. A completion whose seed `held` picks never ends by itself."""

    def __init__(
        self, script: Callable[[list[int], SamplingParams, int | None], Completion]
    ) -> None:
        self.script = script
        self.asked: list[tuple[list[int], SamplingParams, int | None]] = []
        self.held: Callable[[int | None], bool] = lambda seed: False
        self.waiting = threading.Semaphore(0)
        """Released once for each completion that has begun to wait."""
        self.cancelled = threading.Semaphore(0)
        """Released once for each completion that was cancelled."""
        self.closed = 0

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        self.asked.append((list(prompt_ids), params, seed))
        if self.held(seed):
            self.waiting.release()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.release()
                raise
        return self.script(list(prompt_ids), params, seed)

    async def aclose(self) -> None:
        self.closed += 1


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve `app` on a free port of loopback, in a thread; yields the base URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ready = threading.Event()
        server = Server(app, greeting="ready", say=lambda line: ready.set())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(PATIENCE), "the server did not start"
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not stop"


def post_and_leave(url: str, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A request on a bare socket, its reply not read."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
    payload = json.dumps(body).encode()
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (path.encode(), len(payload), payload)
    )
    return connection
