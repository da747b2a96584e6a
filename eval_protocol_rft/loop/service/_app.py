"""The service as one application, put together.

Invariant: every part finds its state on disk as it left it, and goes on before the first request is
answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from eval_protocol_rft.local.server import (
    EXCEPTION_HANDLERS,
    Access,
    AccessMiddleware,
    CompletionEndpoints,
)
from eval_protocol_rft.loop.service._requests import RequestLog, RequestLogMiddleware
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._weights import BaseModel, Weights
from eval_protocol_rft.loop.service.control._control import ControlPlane
from eval_protocol_rft.loop.service.inference._chat import ChatEndpoints
from eval_protocol_rft.loop.service.inference._hot_load import HotLoads
from eval_protocol_rft.loop.service.inference._served import ServedModels
from eval_protocol_rft.loop.service.training._training import Training
from eval_protocol_rft.loop.service.training._training_api import TrainingApi

if TYPE_CHECKING:
    from eval_protocol_rft.loop.service.grpc import GrpcServer


class FireworksService:
    """A Fireworks with its state in `folder`. `app` is the ASGI application; it opens and closes
    everything else in its lifespan.

    Args:
        folder: made where it is not there; one process uses it at a time.
        models: base models that it offers.
        access: who may talk to it; None: whoever reaches it.
        say: called with a line for each thing that happens.
        log_requests: say every request as well.
        url: under which clients reach it, for those that come over gRPC.
        grpc_at: host and port for clients that speak gRPC; None: there is no gRPC.

    Raises:
        StateError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        models: Iterable[BaseModel],
        *,
        access: Access | None = None,
        say: Callable[[str], None] = print,
        log_requests: bool = False,
        url: str = "",
        grpc_at: tuple[str, int] | None = None,
    ) -> None:
        self.store = Store(folder)
        self.weights = Weights(folder / "weights", models)
        self.served = ServedModels(self.store, self.weights, say=say)
        self.training = Training(self.store, self.weights, say=say)
        self.control = ControlPlane(
            self.store, self.weights, self.served, say=say, drop_job=self.training.drop_job, url=url
        )
        completions = CompletionEndpoints(self.served)
        self.app = Starlette(
            routes=[
                *completions.routes(),
                *ChatEndpoints(completions, say=say).routes(),
                *self.control.routes(),
                *TrainingApi(self.store, self.training).routes(),
                *HotLoads(self.store, self.served, say=say).routes(),
            ],
            exception_handlers=EXCEPTION_HANDLERS,
            lifespan=self._lifespan,
        )
        self.app.state.stopping = completions.stopping
        if access is not None:
            self.app.add_middleware(AccessMiddleware, access=access)
        # Around everything: what is refused is on record too.
        self.requests = RequestLog(folder, print_line=say, show_all=log_requests)
        self.app.add_middleware(RequestLogMiddleware, log=self.requests)
        self.grpc: GrpcServer | None = None
        """While it runs."""
        self._grpc_at = grpc_at
        self._grpc_key = access.api_key if access is not None else None

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.training.start()
        self.control.resume()
        try:
            await self._serve_grpc()
            yield
        finally:
            if self.grpc is not None:
                await self.grpc.aclose()
            await self.training.aclose()
            await self.control.aclose()
            await self.served.aclose()
            self.requests.close()
            self.store.close()

    async def _serve_grpc(self) -> None:
        if self._grpc_at is None:
            return
        from eval_protocol_rft.loop.service.grpc import serve_grpc

        host, port = self._grpc_at
        self.grpc = await serve_grpc(
            self.control.call, host=host, port=port, api_key=self._grpc_key, log=self.requests
        )
