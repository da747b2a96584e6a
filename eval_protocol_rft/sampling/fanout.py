"""n completions of one prompt: seeds, slots, attempts, survivors and failures.

Invariant: every one that was asked for ends as a `Completion`, as a `Failure`, or among the
`cancelled` that over-sampling had no more use for, at its own index. A slot is held for one attempt
of one completion, never for a row, a sibling or a pause between attempts.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from eval_protocol_rft.sampling.attempts import Attempt, causes
from eval_protocol_rft.sampling.clock import loop_clock, sampling_time
from eval_protocol_rft.sampling.events import AttemptEvent, Observer
from eval_protocol_rft.sampling.guard import RunGuard
from eval_protocol_rft.sampling.retry import CompletionAttempts, GiveUp, RetryPolicy
from eval_protocol_rft.sampling.tails import WAIT_FOR_ALL, GroupEnd, TailPolicy, straggler
from eval_protocol_rft.sampling.types import (
    Completion,
    Failure,
    Sampler,
    SamplingError,
    SamplingParams,
)

Read = Callable[[Completion], Completion]
"""Looks at a completion as it came, and gives it as it is kept."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A completion and what it took to get it."""

    index: int
    """Position among those asked for."""
    completion: Completion
    seed: int | None
    attempts: int
    """Requests made, the successful one included."""
    seconds: float
    """From the start of the first attempt, pauses between attempts included."""
    causes: tuple[str, ...] = ()
    """Why each attempt before the successful one failed, in order: `timeout`, `unavailable 503`."""


@dataclass(frozen=True, slots=True)
class Group:
    """What became of the completions of one prompt, each part in index order."""

    survivors: list[Survivor]
    failures: list[Failure]
    cancelled: list[int] = field(default_factory=list)
    """Indices of the surplus that over-sampling cancelled, because n had survived."""


def derive_seeds(seed: int | None, row_id: str, n: int, *, run: int | str = 0) -> list[int | None]:
    """Seeds of n completions: the same for the same (seed, row, index), and unrelated between them.

    In [0, 2^31), which every backend takes. `run` tells repeated runs of a row apart, by a number
    or a name without a slash. Without a seed to derive them from there are none.
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
    guard: RunGuard | None = None,
    prompt: Hashable = None,
    on_start: Callable[[], None] = lambda: None,
    observe: Observer | None = None,
    tail: TailPolicy = WAIT_FOR_ALL,
    read: Read | None = None,
) -> Group:
    """Sample one completion per seed, concurrently.

    Args:
        sampler, prompt_ids, params: what to sample.
        seeds: one per completion: n, and one more for each that `tail` over-samples.
        slots: bounds attempts in flight.
        retry: budget of attempts per completion.
        guard: shared by all groups of a run: circuit breaker, budget and limit of the run.
        prompt: names the prompt: the row id.
        on_start: called as each completion gets its first slot.
        observe: told of every attempt that ends by itself.
        tail: whom not to wait for. The completions kept are the first n to survive, whatever their
            index.
        read: what to make of each completion; may raise a `SamplingError`, as the sampler may.

    Cancelling this cancels every attempt and waits for them to end. An exception that is no
    `SamplingError` is a bug, or the run's end: it cancels the siblings and is raised as it is.

    Raises:
        RunStoppedError: the run is over: the server refuses everything, or a budget is spent.
        ValueError: `seeds` has none beside those to over-sample.
    """
    wanted = len(seeds) - tail.over_sample
    if tail.over_sample and wanted < 1:
        raise ValueError(
            f"{len(seeds)} seeds with over_sample={tail.over_sample} leave no completion that is "
            "wanted: pass n + over_sample of them"
        )
    end = GroupEnd(tail, wanted)
    attempts = [CompletionAttempts(retry, seed) for seed in seeds]
    outcomes: dict[int, Survivor | Failure] = {}
    guard = guard or RunGuard(patience_seconds=retry.max_seconds)

    def start() -> None:
        end.started()
        on_start()

    async def one(index: int) -> None:
        outcome = await sample_one(
            sampler,
            prompt_ids,
            params,
            index=index,
            seed=seeds[index],
            slots=slots,
            retry=retry,
            guard=guard,
            prompt=prompt,
            on_start=start,
            observe=observe,
            attempts=attempts[index],
            read=read,
        )
        if end.reason is not None:
            return  # a sampler that does not let itself be cancelled
        outcomes[index] = outcome
        if isinstance(outcome, Survivor):
            end.survived()

    tasks = end.tasks = [asyncio.ensure_future(one(index)) for index in range(len(seeds))]
    try:
        await end.all_ended()
    finally:
        end.forget()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    cut = [index for index in range(len(seeds)) if index not in outcomes]
    if end.reason == "deadline":
        now = sampling_time()
        outcomes |= {index: straggler(index, attempts[index], tail, now=now) for index in cut}
        cut = []
    ended = [outcome for _, outcome in sorted(outcomes.items())]
    return Group(
        survivors=[outcome for outcome in ended if isinstance(outcome, Survivor)],
        failures=[outcome for outcome in ended if isinstance(outcome, Failure)],
        cancelled=cut,
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
    guard: RunGuard,
    prompt: Hashable = None,
    on_start: Callable[[], None] = lambda: None,
    observe: Observer | None = None,
    attempts: CompletionAttempts | None = None,
    read: Read | None = None,
) -> Survivor | Failure:
    """Sample the completion at `index`; as `sample_group` otherwise. All its attempts have its
    seed. `attempts`: a caller's that watches them; empty, of this `retry` and `seed`."""
    attempts = attempts or CompletionAttempts(retry, seed)

    def tell(
        attempt: Attempt,
        others: int,
        *,
        request_id: str | None = None,
        gives_up: bool = False,
    ) -> None:
        if observe is not None:
            observe(
                AttemptEvent(
                    attempt=attempt,
                    number=len(attempts.history),
                    model=params.model,
                    prompt=prompt,
                    index=index,
                    seed=seed,
                    request_id=request_id,
                    in_flight=others,
                    gives_up=gives_up,
                    repeated=gives_up and guard.has_met(attempt),
                )
            )

    while True:
        async with guard.turn(slots, retry=bool(attempts.history), prompt=prompt) as turn:
            attempts.began = turn.started
            if not attempts.history:
                on_start()
            try:
                completion = await sampler.sample(prompt_ids, params, seed=seed)
                completion = completion if read is None else read(completion)
            except SamplingError as error:
                failure, attempt = error, turn.failed(error)
            else:
                attempt = turn.succeeded(completion)
                attempts.succeeded(attempt)
                others = guard.control.in_flight - 1
                tell(attempt, others, request_id=completion.request_id)
                seconds = attempt.ended - attempts.history[0].started
                return Survivor(
                    index,
                    completion,
                    seed,
                    attempts=len(attempts.history),
                    seconds=seconds,
                    causes=tuple(failed.cause for failed in attempts.history[:-1]),
                )
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # The sampler made a failure of it; another attempt would not be cancelled again.
            raise asyncio.CancelledError
        # Outside `slots`: a pause is nobody's request in flight.
        again = attempts.failed(attempt, uniform=random.random())  # noqa: S311
        tell(attempt, guard.control.in_flight, gives_up=isinstance(again, GiveUp))
        if isinstance(again, GiveUp):
            return _failure(index, failure, attempts)
        with loop_clock().runs():
            await asyncio.sleep(max(0.0, again.at - sampling_time()))


def _failure(index: int, error: SamplingError, attempts: CompletionAttempts) -> Failure:
    history = attempts.history
    tried = f" ({causes(history)})" if len(history) > 1 else ""
    return Failure(
        index=index,
        kind=error.kind,
        message=f"{error}{tried}",
        attempts=len(history),
        seconds=history[-1].ended - history[0].started,
        seed=attempts.seed,
        status=error.status,
    )
