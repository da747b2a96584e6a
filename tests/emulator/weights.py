"""What is served under which name, and the endpoint that serves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from eval_protocol_rft.local.server._app import create_app
from eval_protocol_rft.sampling._types import Sampler


class Serving:
    """Completions of several models, each by the application of `ep-rft serve`. ASGI.

    `sampler_of(weights, name)` makes a sampler of whatever weights are here.
    """

    def __init__(
        self, sampler_of: Callable[[Any, str], Sampler], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._sampler_of = sampler_of
        self._tokenizer = tokenizer
        self._apps: dict[str, Starlette] = {}

    def put(self, name: str, weights: Any, *, version: str) -> None:
        """Answer for `name` with `weights`, from the next request on."""
        sampler = self._sampler_of(weights, version)
        self._apps[name] = create_app(sampler, self._tokenizer, model_name=name)

    def drop(self, name: str) -> None:
        self._apps.pop(name, None)

    @property
    def names(self) -> list[str]:
        return sorted(self._apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        name = json.loads(body).get("model")
        if name not in self._apps:
            message = "Model not found, inaccessible, and/or not deployed"
            answer = {"error": {"message": message, "code": "NOT_FOUND"}}
            await JSONResponse(answer, status_code=404)(scope, receive, send)
            return
        again: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return again.pop() if again else await receive()

        inner = {**scope, "path": "/inference/v1/completions", "root_path": ""}
        await self._apps[name](inner, replay, send)
