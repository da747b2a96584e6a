"""Samplers and servers around the bundled model, honest ones and such that lie in one way each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eval_protocol_rft.local._sampler import load_local_sampler
from eval_protocol_rft.sampling._types import Completion, Sampler, SamplingError, SamplingParams

Lie = Callable[[Completion, SamplingParams], Completion]


def bundled() -> Any:
    return load_local_sampler("arithmetic")


class Liar:
    """The bundled model with what `lie` makes of its completions, and `seed` of their seeds."""

    def __init__(
        self,
        lie: Lie = lambda completion, params: completion,
        *,
        seed: Callable[[int | None], int | None] = lambda seed: seed,
        params: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    ) -> None:
        self.lie = lie
        self.seed = seed
        self.params = params

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int | None = None
    ) -> Completion:
        drawn = await bundled().sample(prompt_ids, self.params(params), seed=self.seed(seed))
        return self.lie(drawn, params)

    async def aclose(self) -> None:
        """The bundled model is everybody's."""


def drop_end(completion: Completion, params: SamplingParams) -> Completion:
    if completion.finish_reason != "stop" or len(completion.token_ids) == 1:
        return completion
    return replace(
        completion,
        token_ids=completion.token_ids[:-1],
        logprobs=completion.logprobs[:-1],
        raw_logprobs=completion.raw_logprobs[:-1],
        stop_reason=None,
    )


def raw_as_sampling(completion: Completion, params: SamplingParams) -> Completion:
    return replace(completion, logprobs=completion.raw_logprobs)


def shifted(by: float) -> Lie:
    def lie(completion: Completion, params: SamplingParams) -> Completion:
        sampling, raw = (
            [min(0.0, value + by) for value in values]
            for values in (completion.logprobs, completion.raw_logprobs)
        )
        return replace(completion, logprobs=sampling, raw_logprobs=raw)

    return lie


def vllm_app(sampler: Sampler, *, processed: bool, echo: Callable[[list[int]], Any]) -> Starlette:
    """A server in vLLM's shape: one unnamed logprob per token, and what `echo` makes of the prompt
    ids (None: it sends none)."""

    async def completions(http: Request) -> Response:
        body = json.loads(await http.body())
        params = SamplingParams(
            model=body["model"], max_tokens=body["max_tokens"], temperature=body["temperature"]
        )
        try:
            drawn = await sampler.sample(body["prompt"], params, seed=body.get("seed"))
        except SamplingError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)
        assert drawn.raw_logprobs is not None
        told = drawn.logprobs if processed else drawn.raw_logprobs
        choice = {
            "index": 0,
            "text": drawn.text,
            "finish_reason": drawn.finish_reason,
            "stop_reason": None,
            "token_ids": drawn.token_ids,
            "prompt_token_ids": echo(body["prompt"]),
            "logprobs": {"token_logprobs": told, "tokens": ["?"] * len(told)},
        }
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(drawn.token_ids),
        }
        reply = {"id": "cmpl-1", "object": "text_completion", "model": body["model"]}
        return JSONResponse({**reply, "choices": [choice], "usage": usage})

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    app.state.stopping = asyncio.Event()  # what `running` sets when it stops
    return app
