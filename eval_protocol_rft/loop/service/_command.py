"""What `ep-rft serve --fireworks` does around the application: models, port, start, stop.

Invariant: what can go wrong before the first request is one error that says what to do, and the
port and the state folder are claimed before a model is loaded.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from eval_protocol_rft.local import Placement
from eval_protocol_rft.local.models import NoSuchModelError, local_model_folder
from eval_protocol_rft.local.server import (
    Access,
    ServeError,
    Server,
    claim_port,
    is_loopback,
    server_url,
)
from eval_protocol_rft.loop.service._names import ACCOUNT
from eval_protocol_rft.loop.service._weights import BaseModel
from eval_protocol_rft.loop.service.control._models import training_shape

ANY_KEY = "fw-local"
"""What is printed to be used as a key, where any is taken."""


def serve_fireworks(
    models: Sequence[str],
    *,
    host: str,
    port: int,
    grpc_port: int | None,
    state: Path,
    api_key: str | None,
    log: Literal["events", "requests", "none"],
    placement: Placement | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Be a Fireworks until Ctrl-C or SIGTERM. `say` prints a line.

    The arguments are the options of `ep-rft serve`, where they are described.

    Raises:
        ServeError: the address cannot be used, or there is no such model.
        StateError: the state folder cannot be used.
    """
    bases = list(base_models(models, placement))
    access = Access(
        loopback_only=is_loopback(host),
        api_key=api_key or None,
        # Addresses of files hold a secret of their own, as signed URLs do.
        open_paths=("/uploads/", "/downloads/"),
    )

    def happened(line: str) -> None:
        if log != "none":
            say(f"{time.strftime('%H:%M:%S')}  {line}")

    with claim_port(host, port) as listener:
        # Torch and its libraries take seconds: a port that is taken is told before them.
        from eval_protocol_rft.loop.service._app import FireworksService

        url = server_url(host, listener.getsockname()[1])
        grpc_at = _grpc_address(host, grpc_port, listener.getsockname()[1] + 1)
        service = FireworksService(
            state,
            bases,
            access=access,
            say=happened,
            log_requests=log == "requests",
            url=url,
            grpc_at=grpc_at,
        )
        greeting = _greeting(url, grpc_at, bases, state, access)
        try:
            Server(service.app, greeting=greeting, say=say).run(sockets=[listener])
        except KeyboardInterrupt:
            return  # uvicorn raises the signal again once everything is closed


def base_models(places: Sequence[str], placement: Placement | None = None) -> Iterator[BaseModel]:
    """`NAME=PLACE`, or a place alone, whose last part is the name then.

    Raises:
        ServeError: two models have the same name, or one is not on this machine.
    """
    seen: set[str] = set()
    for place in places:
        name, mark, named = place.partition("=")
        try:
            folder = local_model_folder(named if mark else place)
        except NoSuchModelError as error:
            raise ServeError(
                f"--model {place}: {error}{'' if mark else _other_name(place)}"
            ) from error
        last = name if mark else Path(place).name
        key = re.sub(r"[^a-z0-9]+", "-", last.rpartition("/")[2].lower()).strip("-")
        if not key or key in seen:
            raise ServeError(
                f"--model {place}: "
                + (f"another is called {key} already" if key else "it needs a name")
                + ": write NAME=PLACE"
            )
        seen.add(key)
        yield BaseModel(key, folder, placement)


def _other_name(place: str) -> str:
    """How a model that is there is called what a recipe calls its own."""
    name = place.rpartition("/")[2].lower()
    return f"; to serve a model that is there as {name}: --model {name}=local/arithmetic"


def _grpc_address(host: str, wanted: int | None, default: int) -> tuple[str, int] | None:
    """Where clients that speak gRPC find it; None: nowhere, the extra is not there. A default port
    that is taken is no reason not to start: most clients do not need it.

    Raises:
        ServeError: gRPC was asked for, and cannot be.
    """
    try:
        import eval_protocol_rft.loop.service.grpc  # noqa: F401 -- the extra
    except ModuleNotFoundError as error:
        if wanted is None:
            return None
        raise ServeError(f"--grpc-port: {error}") from error
    if ":" in host:  # such clients split an address at its first colon
        host = "127.0.0.1" if is_loopback(host) else "0.0.0.0"  # noqa: S104 -- as was asked for
    if wanted is None:
        for port in (default, 0):
            with contextlib.suppress(ServeError, OverflowError), claim_port(host, port) as probe:
                return host, probe.getsockname()[1]
    try:
        with claim_port(host, wanted or 0) as probe:
            return host, probe.getsockname()[1]
    except ServeError as error:
        raise ServeError(f"--grpc-port: {str(error).replace('--port', '--grpc-port')}") from error


def _greeting(
    url: str,
    grpc_at: tuple[str, int] | None,
    models: Sequence[BaseModel],
    state: Path,
    access: Access,
) -> str:
    key = "YOUR_KEY  # the --api-key of this server" if access.api_key is not None else ANY_KEY
    lines = [
        f"Fireworks on this machine: {url} (Ctrl-C stops it; {state} holds its state, and the "
        "same command goes on from there).",
        f"  export FIREWORKS_BASE_URL={url}",
        f"  export FIREWORKS_API_KEY={key}",
        f"  export FIREWORKS_ACCOUNT_ID={ACCOUNT.rpartition('/')[2]}",
        *_grpc_lines(url, grpc_at),
        "Models, with what a recipe names beside them:",
        *(line for model in models for line in _model_lines(model)),
    ]
    if not access.loopback_only and access.api_key is None:
        lines.append(
            "WARNING: whoever reaches this machine may use it, web pages in a browser among them: "
            "set --api-key, or listen on 127.0.0.1."
        )
    return "\n".join(lines)


def _model_lines(model: BaseModel) -> Iterator[str]:
    yield f"  {model.name}"
    yield f"    training shape {training_shape(model)}"
    yield f"    tokenizer {model.folder.absolute()}"


def _grpc_lines(url: str, grpc_at: tuple[str, int] | None) -> list[str]:
    if grpc_at is None:
        return []
    return [
        "For fireworks-ai 0.19 (`LLM`), beside the key:",
        f"  export FIREWORKS_API_BASE_URL={url} FIREWORKS_GATEWAY_ADDR={grpc_at[0]}:{grpc_at[1]}",
    ]
