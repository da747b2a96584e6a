"""The service as one application, put together.

Invariant: every part finds its state on disk as it left it, and goes on before the first request is
answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from starlette.applications import Starlette

from eval_protocol_rft.local.server import EXCEPTION_HANDLERS
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
        say: called with a line for each thing that happens.

    Raises:
        StateError: the folder cannot be used.
    """

    def __init__(
        self, folder: Path, models: Iterable[BaseModel], *, say: Callable[[str], None] = print
    ) -> None:
        self.store = Store(folder)
        self.weights = Weights(folder / "weights", models)
        self.training = Training(self.store, self.weights, say=say)
        self.app = Starlette(
            routes=TrainingApi(self.store, self.training).routes(),
            exception_handlers=EXCEPTION_HANDLERS,
            lifespan=self._lifespan,
        )
        self.app.state.stopping = asyncio.Event()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.training.start()
        try:
            yield
        finally:
            await self.training.aclose()
            self.store.close()
