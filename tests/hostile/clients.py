"""The package's inner ways to completions: the sampler alone, and the fan-out around it.

Invariant: every completion is asked for once, and its end is told to the `Book` once, by what the
package hands to its user.
"""

from __future__ import annotations

import asyncio
import random

from eval_protocol_rft.sampling._endpoint import Endpoint
from eval_protocol_rft.sampling._fanout import Group, derive_seeds, sample_group
from eval_protocol_rft.sampling._http import HttpSampler
from eval_protocol_rft.sampling._limiter import RunLimiter
from eval_protocol_rft.sampling._telemetry import log_attempt
from eval_protocol_rft.sampling._types import SamplingError, SamplingParams, TokenIds
from tests.hostile.ask import Ask, listening
from tests.hostile.book import GROUP, MAX_TOKENS, Book
from tests.hostile.faults import TRANSIENT

CANCELLED_SHARE = 0.02
"""Part of the prompts that the fan-out is told to give up, up to `CANCELLED_WITHIN` seconds after
they began."""
CANCELLED_WITHIN = 0.1


async def through_sampler(ask: Ask, book: Book) -> None:
    """`HttpSampler` alone, with a loop around it that is as simple as can be."""
    sampler = HttpSampler(Endpoint(f"{ask.url}/v1"))
    numbers = iter(range(ask.completions))
    clock = asyncio.get_running_loop().time

    async def one(number: int) -> None:
        prompt, params = TokenIds([7, 11, number // GROUP]), _params(ask, number // GROUP)
        for tries in range(1, ask.retry.max_attempts + 1):
            began, kind = clock(), None
            try:
                got = await sampler.sample(prompt, params, seed=number)
            except SamplingError as error:
                kind, message = error.kind, str(error)
            else:
                message = ""
            book.tried(number, kind, seed=number, seconds=clock() - began, message=message)
            if kind is None:
                fields = (got.token_ids, got.logprobs, got.finish_reason)
                book.accepted(number, *fields, prompt_ids=prompt, tries=tries, raw=got.raw_logprobs)
                return
            if kind not in TRANSIENT or tries == ask.retry.max_attempts:
                book.failed(number, kind, tries=tries)
                return
            await asyncio.sleep(ask.retry.base_seconds * 2**tries)

    async def work() -> None:
        for number in numbers:
            await one(number)

    for prompt in ask.prompts:
        seeds = range(prompt * GROUP, (prompt + 1) * GROUP)
        book.asks(prompt, [7, 11, prompt], seeds)
    async with asyncio.TaskGroup() as group:
        for _ in range(ask.in_flight):
            group.create_task(work())
    await sampler.aclose()


async def through_fanout(ask: Ask, book: Book) -> None:
    """`sample_group` with one limiter for all prompts; some of them are cancelled on the way."""
    sampler, slots = HttpSampler(Endpoint(f"{ask.url}/v1")), asyncio.Semaphore(ask.in_flight)
    limiter, prompts = RunLimiter(patience_seconds=ask.retry.max_seconds), iter(ask.prompts)

    async def one(prompt: int) -> None:
        ids = TokenIds([7, 11, prompt])
        seeds = derive_seeds(ask.seed, str(prompt), GROUP)
        book.asks(prompt, ids, seeds)
        asked = asyncio.ensure_future(
            sample_group(
                sampler,
                ids,
                _params(ask, prompt),
                seeds=seeds,
                slots=slots,
                retry=ask.retry,
                limiter=limiter,
                prompt=prompt,
                observe=log_attempt,
            )
        )
        rng = random.Random(f"{ask.seed}/{prompt}")
        if rng.random() < CANCELLED_SHARE:
            await asyncio.wait([asked], timeout=rng.random() * CANCELLED_WITHIN)
            asked.cancel()
        await asyncio.wait([asked])
        if asked.cancelled():
            for number in range(prompt * GROUP, (prompt + 1) * GROUP):
                book.failed(number, "cancelled", tries=0)
        else:
            _tell(book, prompt, ids, asked.result())

    async def work() -> None:
        for prompt in prompts:
            await one(prompt)

    with listening(book, lambda prompt, index: prompt * GROUP + index):
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * ask.in_flight // GROUP):
                group.create_task(work())
    await sampler.aclose()


def _tell(book: Book, prompt: int, ids: TokenIds, group: Group) -> None:
    for one in group.survivors:
        got = one.completion
        book.accepted(
            prompt * GROUP + one.index,
            got.token_ids,
            got.logprobs,
            got.finish_reason,
            prompt_ids=ids,
            tries=one.attempts,
            raw=got.raw_logprobs,
        )
    for failure in group.failures:
        book.failed(prompt * GROUP + failure.index, failure.kind, tries=failure.attempts)


def _params(ask: Ask, prompt: int) -> SamplingParams:
    """Half of the prompts are asked for streams."""
    stream = (prompt * 0.618) % 1.0 < 0.5
    return SamplingParams(model="m", max_tokens=MAX_TOKENS, timeout=ask.patience, stream=stream)
