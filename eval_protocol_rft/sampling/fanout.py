"""n completions of one prompt: seeds, slots, attempts, survivors and failures.

Invariant: every one of the n ends as a `Completion` or as a `Failure`, at its own index. A slot is
held for one attempt of one completion, never for a row, a sibling or a pause between attempts.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from eval_protocol_rft.sampling.retry import RetryPolicy
from eval_protocol_rft.sampling.types import (
    Completion,
    Failure,
    Sampler,
    SamplingError,
    SamplingParams,
)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A completion and what it took to get it."""

    index: int
    """Position among the n asked for."""
    completion: Completion
    seed: int | None
    attempts: int
    """Requests made, the successful one included."""
    seconds: float
    """From the start of the first attempt, pauses between attempts included."""


@dataclass(frozen=True, slots=True)
class Group:
    """What became of the n completions of one prompt, each part in index order."""

    survivors: list[Survivor]
    failures: list[Failure]


def derive_seeds(seed: int | None, row_id: str, n: int, *, run: int = 0) -> list[int | None]:
    """Seeds of n completions: the same for the same (seed, row, index), and unrelated between them.

    In [0, 2^31), which every backend takes. `run` tells repeated runs of a row apart. Without a
    seed to derive them from there are none.
    """
    if seed is None:
        return [None] * n
    # The row id last: it may hold slashes and digits, which must not read as another row's run.
    keys = (f"{seed}/{run}/{index}/{row_id}" for index in range(n))
    return [int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1 for key in keys]


async def sample_group(
    sampler: Sampler,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    seeds: Sequence[int | None],
    slots: AbstractAsyncContextManager[object],
    retry: RetryPolicy,
    on_start: Callable[[], None] = lambda: None,
) -> Group:
    """Sample one completion per seed, concurrently.

    `slots` bounds attempts in flight. `on_start` is called as each completion gets its first slot.
    Cancelling this cancels every attempt and waits for them to end. An exception that is no
    `SamplingError` is a bug: it cancels the siblings and is raised as it is.
    """

    async def one(index: int) -> Survivor | Failure:
        return await sample_one(
            sampler,
            prompt_ids,
            params,
            index=index,
            seed=seeds[index],
            slots=slots,
            retry=retry,
            on_start=on_start,
        )

    tasks = [asyncio.ensure_future(one(index)) for index in range(len(seeds))]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Group(
        survivors=[outcome for outcome in outcomes if isinstance(outcome, Survivor)],
        failures=[outcome for outcome in outcomes if isinstance(outcome, Failure)],
    )


async def sample_one(
    sampler: Sampler,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    index: int,
    seed: int | None,
    slots: AbstractAsyncContextManager[object],
    retry: RetryPolicy,
    on_start: Callable[[], None] = lambda: None,
) -> Survivor | Failure:
    """Sample the completion at `index`; as `sample_group` otherwise."""
    attempt = 0
    began = 0.0
    while True:
        attempt += 1
        try:
            async with slots:
                if attempt == 1:
                    began = time.monotonic()
                    on_start()
                completion = await sampler.sample(prompt_ids, params, seed=seed)
            seconds = time.monotonic() - began
            return Survivor(index, completion, seed, attempt, seconds)
        except SamplingError as error:
            elapsed = time.monotonic() - began
            wait = retry.delay(error, attempt=attempt, elapsed=elapsed, uniform=random.random())  # noqa: S311
            if wait is None:
                return Failure(
                    index=index,
                    kind=error.kind,
                    message=str(error),
                    attempts=attempt,
                    seconds=elapsed,
                    seed=seed,
                    status=error.status,
                )
        # Outside `slots`: a pause is nobody's request in flight.
        await asyncio.sleep(wait)
