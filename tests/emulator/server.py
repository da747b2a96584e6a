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
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft.local._sampler import LocalSampler
from eval_protocol_rft.local.models import bundled_model_path
from tests.emulator.account import ACCOUNT, Account
from tests.emulator.grpo import train_on_rows
from tests.emulator.hot_load import HotLoads
from tests.emulator.policy import Policy
from tests.emulator.routes import control_plane
from tests.emulator.training_api import TrainingApi
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


@dataclass
class TrainingEmulator:
    """A running trainer job with its deployment."""

    url: str
    training: TrainingApi
    hot_loads: HotLoads
    serving: Serving
    deployment: dict[str, str]
    """As the control plane has it."""


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


@contextlib.contextmanager
def emulated_trainer(*, lags: tuple[int, ...] = (0,)) -> Iterator[TrainingEmulator]:
    """A trainer job of the bundled model, a deployment of it, and the way there from a key."""
    model, _ = arithmetic()
    serving = local_serving()
    training = TrainingApi(Policy(model))
    loads = HotLoads(training, serving, lags)
    job, deployment = f"{ACCOUNT}/rlorTrainerJobs/job", f"{ACCOUNT}/deployments/dep"
    joined = {
        "name": deployment,
        "state": "READY",
        "baseModel": "accounts/fireworks/models/arithmetic-fp8",
        "hotLoadTrainerJob": job,
    }

    async def join(request: Request) -> Response:
        joined.update(await request.json())
        return JSONResponse(joined)

    serving.put(deployment, model, version="base")
    routes = [
        *training.routes(""),
        *training.routes("/training/v1/rlorTrainerJobs/acc/job"),
        *loads.routes(),
        _fixed("/v1/accounts", {"accounts": [{"name": ACCOUNT}]}),
        _fixed(f"/v1/{job}", {"name": job, "state": "JOB_STATE_RUNNING"}),
        _fixed(f"/v1/{deployment}", joined),
        Route(f"/v1/{deployment}", join, methods=["PATCH"]),
        *_completions(serving),
    ]
    with _running(Starlette(routes=routes)) as url:
        yield TrainingEmulator(url, training, loads, serving, joined)


def _fixed(path: str, answer: Any) -> Route:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(answer)

    return Route(path, endpoint)


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
