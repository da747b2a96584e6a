"""What the peers of the client benchmark share: how one is called, and the rows it gets.

Importing this costs nothing of Eval Protocol's; who calls `config_of` or `row_of` pays for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from workload import Workload

MODEL = "accounts/benchmark/models/stub"
Pair = tuple[Sequence[int], Sequence[float]]
"""Token ids and sampling logprobs of one completion."""
Fetch = Callable[[range], Awaitable[list[Pair]]]
"""Rows by number to n completions of each."""
Peer = Callable[[Workload, str], AbstractAsyncContextManager[Fetch]]
"""A client, open; the string is the base URL, up to and including `/v1`."""


def each_completion(
    workload: Workload, one: Callable[[list[int]], Coroutine[Any, Any, Pair]]
) -> Fetch:
    """n calls per row, so many at a time."""
    slots = asyncio.Semaphore(workload.concurrency)

    async def held(prompt: list[int]) -> Pair:
        async with slots:
            return await one(prompt)

    async def fetch(rows: range) -> list[Pair]:
        prompts = [workload.prompt_ids[row] for row in rows for _ in range(workload.n)]
        return await asyncio.gather(*map(held, prompts))

    return fetch


async def flat(groups: Iterable[Awaitable[list[Pair]]]) -> list[Pair]:
    """The completions of all groups, which run at once."""
    return [pair for group in await asyncio.gather(*groups) for pair in group]


def config_of(slots: int, completion_params: Mapping[str, Any]) -> Any:
    """What Eval Protocol hands to a rollout processor."""
    from eval_protocol.pytest.types import RolloutProcessorConfig

    return RolloutProcessorConfig(
        completion_params=dict(completion_params),
        mcp_config_path="",
        semaphore=asyncio.Semaphore(slots),
    )


def row_of(workload: Workload, number: int) -> Any:
    """A fresh row, named after its number."""
    from eval_protocol.models import EvaluationRow, InputMetadata, Message

    return EvaluationRow(
        messages=[Message(role="user", content=workload.questions[number])],
        input_metadata=InputMetadata(row_id=f"row-{number}"),
    )
