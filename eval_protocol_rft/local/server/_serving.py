"""What `ep-rft serve` does around the application: who may talk to it, the port, the model, the
start, the stop.

Invariant: what can go wrong before the first request (the port is taken, the model does not load)
is one `ServeError` that says what to do, and the port is claimed before the model is loaded.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local._placement import Placement, placement_of
from eval_protocol_rft.local._sampler import LocalSampler, load_local_sampler
from eval_protocol_rft.local.models import LOCAL_PREFIX, NoSuchModelError, local_model_folder
from eval_protocol_rft.local.server._access import Access, is_loopback
from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.local.server._protocol import ApiError, error_reply
from eval_protocol_rft.local.server._weights import FIRST_VERSION, ReloadingSampler
from eval_protocol_rft.sampling import SamplingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AccessMiddleware:
    """Refuses what `Access` refuses, before the body is read."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._access.problem(scope["path"], Headers(scope=scope))
            if problem is not None:
                status, reason = problem
                await error_reply(ApiError(reason, status=status))(scope, receive, send)
                return
        await self._app(scope, receive, send)


_SECONDS_TO_FINISH = 5
"""For replies that are being written when the server stops; sampling stops at once."""

_WAITING_CONNECTIONS = 2048
"""Clients that may wait to be accepted: a training run opens hundreds at once."""


class ServeError(EvalProtocolRftError, RuntimeError):
    """The server cannot start; the message says why and what to do."""


def serve_local(
    model: str,
    *,
    host: str,
    port: int,
    served_model_name: str | None,
    reloads: bool,
    api_key: str | None,
    placement: Placement | None = None,
    say: Callable[[str], None] = print,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Load a local model and serve it until Ctrl-C or SIGTERM. `say` prints a line; `note` is told,
    before weights are read, where the model will lie and how much memory it takes.

    The arguments are the options of `ep-rft serve`, where they are described.

    Raises:
        ServeError: the address cannot be used, or the model cannot be loaded.
    """
    # Not `local/NAME`: that is how our own client names what it samples in its own process.
    name = served_model_name or model.removeprefix(LOCAL_PREFIX)
    access = Access(loopback_only=is_loopback(host), api_key=api_key or None)
    with claim_port(host, port) as listener:
        sampler = _load(model, placement, reloads=reloads, note=note)
        app = create_app(
            ReloadingSampler(sampler) if reloads else sampler,
            sampler.tokenizer,
            model_name=name,
            context_length=sampler.context_length,
        )
        app.add_middleware(AccessMiddleware, access=access)
        url = server_url(host, listener.getsockname()[1])
        greeting = _greeting(
            name,
            url,
            sampler.tokenizer,
            place=placement_of(sampler.model),
            access=access,
            reloads=reloads,
        )
        try:
            Server(app, greeting=greeting, say=say).run(sockets=[listener])
        except KeyboardInterrupt:
            return  # uvicorn raises the signal again once everything is closed


class Server(uvicorn.Server):
    """uvicorn, quiet but for two lines, and not waiting for completions that nobody will want."""

    def __init__(self, app: Starlette, *, greeting: str, say: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            )
        )
        self._stopping = app.state.stopping
        self._greeting = greeting
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._say(self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)
        self._say("Stopped.")


def claim_port(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        ServeError: it cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_WAITING_CONNECTIONS)
        # Inherited by every connection; asyncio sets it only where the protocol number is known.
        # Without it a reply on a kept connection waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "it is taken" if taken else os.strerror(error.errno or 0)
        hint = "take another with --port (0 finds a free one)" if taken else "check --host, --port"
        raise ServeError(f"cannot listen on {host} port {port}: {reason}; {hint}") from error


def _load(
    model: str, placement: Placement | None, *, reloads: bool, note: Callable[[str], None]
) -> LocalSampler:
    name = model.removeprefix(LOCAL_PREFIX)
    try:
        try:
            source: str | Path = local_model_folder(name)
        except NoSuchModelError:
            if model.startswith(LOCAL_PREFIX):
                raise
            source = name  # a hub id, which is downloaded
        if reloads or source == name:
            # One of its own: weights of a sampler that others share must not change.
            return LocalSampler.from_pretrained(
                source, placement=placement, policy_version=FIRST_VERSION, say=note
            )
        return load_local_sampler(name, placement=placement, say=note)
    except (SamplingError, ValueError) as error:
        raise ServeError(str(error)) from error


def server_url(host: str, port: int) -> str:
    """Where clients find it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(
    name: str,
    url: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    place: str,
    access: Access,
    reloads: bool,
) -> str:
    """What is served, where it runs and to whom, and a request to paste, with a chat prompt where
    the tokenizer can make one."""
    facts = [f"Serving {name} on {url} (Ctrl-C stops it). It runs on {place}."]
    if reloads:
        facts.append("It takes new weights from whoever reaches it.")
    if not access.loopback_only and access.api_key is None:
        facts.append(
            "WARNING: whoever reaches this machine may use it, web pages in a browser among them: "
            "set --api-key, or listen on 127.0.0.1."
        )
    headers = ["content-type: application/json"]
    if access.api_key is not None:
        headers.append("authorization: Bearer KEY")
    body = {"model": name, "prompt": _chat_prompt(tokenizer), "max_tokens": 16, "logprobs": True}
    options = " ".join(f"-H '{header}'" for header in headers)
    data = shlex.quote(msgspec.json.encode(body).decode())
    return f"{' '.join(facts)} Try:\n  curl -s {url}/v1/completions {options} -d {data}"


def _chat_prompt(tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
    """As text if the server would make the same ids of it, else as ids."""
    if not tokenizer.chat_template:
        return "Hello"
    messages = [{"role": "user", "content": "12+34="}]
    try:
        text = str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    except TemplateError:
        return "Hello"
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return text if tokenizer.encode(text) == ids else ids
