"""The other clients in the client benchmark, each as its users would call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from peer_kit import MODEL, Fetch, Pair, config_of, each_completion, flat, row_of
from workload import Workload


@asynccontextmanager
async def ep_client(workload: Workload, url: str) -> AsyncIterator[Fetch]:
    """Eval Protocol's `FireworksV1CompletionsClient` on prompts rendered before."""
    from eval_protocol.integrations.fireworks_v1_completions_client import (
        FireworksV1CompletionsClient,
    )
    from transformers import AutoTokenizer

    client: Any = FireworksV1CompletionsClient(
        model_id=MODEL,
        tokenizer_name_or_path=workload.tokenizer,
        base_url=url.removesuffix("/v1"),
        api_key="none",
        temperature=1.0,
        max_tokens=workload.max_tokens,
        request_params={"top_p": 1.0, "top_k": 0},
    )
    client._tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer)

    async def one(prompt: list[int]) -> Pair:
        result = await client.create_completion_from_prompt_ids(prompt_token_ids=prompt)
        return result["completion_ids"], result["completion_logprobs"]

    yield each_completion(workload, one)
    await client.close()


@asynccontextmanager
async def deployment_sampler(workload: Workload, url: str) -> AsyncIterator[Fetch]:
    """Fireworks' `DeploymentSampler`, which streams; its own fixed window is the limit."""
    from fireworks.training.sdk.concurrency import FixedConcurrencyController
    from fireworks.training.sdk.sampling import DeploymentSampler

    client = DeploymentSampler(
        url.removesuffix("/inference/v1"),
        MODEL,
        "none",
        concurrency_controller=FixedConcurrencyController(workload.concurrency),
    )

    async def one(row: int) -> list[Pair]:
        completions: list[Any] = await client.sample_with_prompt_tokens(
            workload.prompt_ids[row],
            n=workload.n,
            max_tokens=workload.max_tokens,
            temperature=1.0,
            logprobs=True,
        )
        sampled: list[Any] = [
            (c.full_tokens[c.prompt_len :], c.sampling_logprobs) for c in completions
        ]
        return sampled

    yield lambda rows: flat(one(row) for row in rows)


@asynccontextmanager
async def openai(workload: Workload, url: str) -> AsyncIterator[Fetch]:
    """`AsyncOpenAI().completions.create`, as it comes."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="none", base_url=url)

    async def one(prompt: list[int]) -> Pair:
        reply: Any = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=workload.max_tokens,
            temperature=1.0,
            top_p=1.0,
            logprobs=True,  # as Fireworks spells it
            extra_body={"top_k": 0},
        )
        content = reply.choices[0].logprobs.content
        return [e["token_id"] for e in content], [e["sampling_logprob"] for e in content]

    yield each_completion(workload, one)
    await client.close()


@asynccontextmanager
async def litellm(workload: Workload, url: str) -> AsyncIterator[Fetch]:
    """Eval Protocol's SingleTurn processor, one row per completion. Chat replies hold no ids, so
    what comes back are the tokens' logprobs."""
    from eval_protocol.pytest import SingleTurnRolloutProcessor

    single_turn = SingleTurnRolloutProcessor()
    config = config_of(
        workload.concurrency,
        {
            "model": f"fireworks_ai/{MODEL}",
            "api_base": url,
            "api_key": "none",
            "temperature": 1.0,
            "max_tokens": workload.max_tokens,
            "logprobs": True,
        },
    )

    async def fetch(rows: range) -> list[Pair]:
        copies = [row_of(workload, row) for row in rows for _ in range(workload.n)]
        done: list[Any] = await asyncio.gather(*single_turn(copies, config))
        contents = [row.messages[-1].logprobs["content"] for row in done]
        return [([0] * len(content), [e["logprob"] for e in content]) for content in contents]

    yield fetch
