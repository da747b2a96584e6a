"""The service as one application, put together.

Invariant: every part finds its state on disk as it left it, and goes on before the first request is
answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from starlette.applications import Starlette

from eval_protocol_rft.local.server import (
    EXCEPTION_HANDLERS,
    Access,
    AccessMiddleware,
    CompletionEndpoints,
)
from eval_protocol_rft.loop.service._control import ControlPlane
from eval_protocol_rft.loop.service._hot_load import HotLoads
from eval_protocol_rft.loop.service._requests import RequestLog
from eval_protocol_rft.loop.service._served import ServedModels
from eval_protocol_rft.loop.service._store import Store
from eval_protocol_rft.loop.service._training import Training
from eval_protocol_rft.loop.service._training_api import TrainingApi
from eval_protocol_rft.loop.service._weights import BaseModel, Weights


class FireworksService:
    """A Fireworks with its state in `folder`. `app` is the ASGI application; it opens and closes
    everything else in its lifespan.

    Args:
        folder: made where it is not there; one process uses it at a time.
        models: base models that it offers.
        access: who may talk to it; None: whoever reaches it.
        say: called with a line for each thing that happens.
        log_requests: say every request as well.

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
    ) -> None:
        self.store = Store(folder)
        self.weights = Weights(folder / "weights", models)
        self.served = ServedModels(self.store, self.weights)
        self.training = Training(self.store, self.weights, say=say)
        self.control = ControlPlane(
            self.store, self.weights, self.served, say=say, drop_job=self.training.drop_job
        )
        completions = CompletionEndpoints(self.served)
        self.app = Starlette(
            routes=[
                *completions.routes(),
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
        self.app.add_middleware(RequestLog, folder=folder, print_line=say, show_all=log_requests)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.training.start()
        self.control.resume()
        try:
            yield
        finally:
            await self.training.aclose()
            await self.control.aclose()
            await self.served.aclose()
            self.store.close()
