"""The emulator, put together and running."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.models import bundled_model_path
from tests.emulator.account import Account
from tests.emulator.grpo import train_on_rows
from tests.emulator.routes import control_plane
from tests.emulator.weights import Serving
from tests.waiting import PATIENCE

KEY = "fw-emulated-key"


@dataclass
class Emulator:
    """A running control plane with its completions."""

    url: str
    account: Account
    serving: Serving
    log: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request to the control plane."""


@functools.cache
def arithmetic() -> tuple[Any, Any]:
    """The bundled model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = bundled_model_path("arithmetic")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def local_serving() -> Serving:
    """Samples from transformers models."""
    _, tokenizer = arithmetic()
    return Serving(
        lambda module, version: LocalSampler(module, tokenizer, policy_version=version), tokenizer
    )


@contextlib.contextmanager
def emulated_control_plane(
    *,
    serving: Serving | None = None,
    base_weights: Any = None,
    train: Callable[..., Any] | None = None,
) -> Iterator[Emulator]:
    """A control plane that trains the bundled model; or whatever `train` makes of the weights."""
    model, tokenizer = arithmetic()
    serving = serving or local_serving()
    account = Account(
        serving,
        model if base_weights is None else base_weights,
        train or functools.partial(train_on_rows, tokenizer=tokenizer),
    )
    log: list[tuple[str, str]] = []
    app = Starlette(routes=[*control_plane(account, log), *_completions(serving)])
    with _running(app) as url:
        yield Emulator(url, account, serving, log)


def _completions(serving: Serving) -> list[Any]:
    return [
        Route(path, serving, methods=["POST"])
        for path in ("/v1/completions", "/inference/v1/completions")
    ]


@contextlib.contextmanager
def _running(app: Starlette) -> Iterator[str]:
    """Serve `app` on a free port of loopback, in a thread; yields the base URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        # Replies are written in two parts, and the second would wait for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not stop"
