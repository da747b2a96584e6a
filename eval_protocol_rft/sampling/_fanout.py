"""n completions of one prompt: seeds, slots, attempts, survivors, failures and stragglers.

Invariant: every one that was asked for ends as a `Completion`, as a `Failure`, or among the
`cancelled` that over-sampling had no more use for, at its own index. A slot is held for one attempt
of one completion, never for a row, a sibling or a pause between attempts. A group ends once: what
has ended by then counts as it ended; whatever has not is cancelled, and nothing that a cancelled
completion still does changes the group.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

from eval_protocol_rft.sampling import _types
from eval_protocol_rft.sampling._clock import Alarm, loop_clock, sampling_time
from eval_protocol_rft.sampling._limiter import RunLimiter
from eval_protocol_rft.sampling._retry import Attempt, CompletionAttempts, RetryPolicy, causes
from eval_protocol_rft.sampling._telemetry import AttemptEvent, Observer
from eval_protocol_rft.sampling._types import Completion, Failure, Sampler, SamplingError


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerPolicy:
    """Whom not to wait for. Either choice favours short completions: what takes long is what is
    cancelled."""

    over_sample: int = 0
    """k: ask for n + k, keep the first n that survive, cancel the others."""
    straggler_seconds: float | None = None
    """From the group's first request on; what has not ended by then is cancelled and fails."""

    def __post_init__(self) -> None:
        if type(self.over_sample) is not int or self.over_sample < 0:
            raise ValueError(
                f"over_sample must be a whole number of completions, 0 or more, got "
                f"{self.over_sample!r}"
            )
        seconds = self.straggler_seconds
        if seconds is not None and not (
            isinstance(seconds, int | float)
            and not isinstance(seconds, bool)
            and 0 < seconds < math.inf
        ):
            raise ValueError(
                f"straggler_seconds must be a finite number of seconds above 0, or None for no "
                f"deadline, got {seconds!r}"
            )

    def __bool__(self) -> bool:
        """Whether it may cancel anything."""
        return self.over_sample > 0 or self.straggler_seconds is not None


WAIT_FOR_ALL = StragglerPolicy()


class GroupEnd:
    """When a group of completions ends, and the cancelling that goes with it. Belongs to one event
    loop; the group's owner awaits the tasks."""

    def __init__(self, policy: StragglerPolicy, wanted: int) -> None:
        """`wanted`: n, the survivors after which the others are surplus."""
        self.reason: Literal["enough", "deadline"] | None = None
        """None while it has not ended early."""
        self.tasks: Sequence[asyncio.Task[None]] = ()
        """One per completion."""
        self._seconds = policy.straggler_seconds
        self._missing = wanted
        self._alarm: Alarm | None = None

    def started(self) -> None:
        """A completion got its first slot; the clock runs from the first one."""
        if self._alarm is None and self._seconds is not None:
            self._alarm = Alarm(self._seconds, lambda: self._end("deadline"))

    def survived(self) -> None:
        """A completion was had. The last one that was wanted ends the group."""
        self._missing -= 1
        if self._missing == 0:
            self._end("enough")

    async def all_ended(self) -> None:
        """Wait for all tasks, or raise what one of them raised. That the end of the group cancelled
        the rest is no error."""
        if not self.tasks:
            return
        done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in self.tasks:
            if task in done and not (task.cancelled() and self.reason is not None):
                task.result()

    def forget(self) -> None:
        """No deadline any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _end(self, reason: Literal["enough", "deadline"]) -> None:
        if self.reason is not None:
            return
        self.reason = reason
        current = asyncio.current_task()  # the survivor that was still wanted; None at the deadline
        for task in self.tasks:
            if task is not current:
                task.cancel()


def straggler(
    index: int, attempts: CompletionAttempts, policy: StragglerPolicy, *, now: float
) -> Failure:
    """The failure of a completion that the deadline cut off. `now`: clock seconds, of the clock of
    the attempts."""
    history = attempts.history
    failed = [attempt for attempt in history if attempt.kind is not None]
    deadline = f"straggler_seconds={policy.straggler_seconds:g} after the group's first request"
    if not attempts.requests:
        message = f"cancelled {deadline}, still waiting for its first slot"
    elif failed:
        message = f"cancelled {deadline}, not done after {causes(failed)}"
    else:
        message = f"cancelled {deadline}, with no reply yet"
    return Failure(
        index=index,
        kind="cancelled",
        message=message,
        attempts=attempts.requests,
        seconds=0.0 if attempts.first_began is None else now - attempts.first_began,
        seed=attempts.seed,
        status=history[-1].status if history and attempts.began is None else None,
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
    params: _types.SamplingParams,
    *,
    seeds: Sequence[int | None],
    slots: AbstractAsyncContextManager[object],
    retry: RetryPolicy,
    limiter: RunLimiter | None = None,
    prompt: Hashable = None,
    on_start: Callable[[], None] = lambda: None,
    observe: Observer | None = None,
    stragglers: StragglerPolicy = WAIT_FOR_ALL,
    read: Read | None = None,
) -> Group:
    """Sample one completion per seed, concurrently.

    Args:
        sampler, prompt_ids, params: what to sample.
        seeds: one per completion: n, and one more for each that `stragglers` over-samples.
        slots: bounds attempts in flight.
        retry: budget of attempts per completion.
        limiter: shared by all groups of a run: circuit breaker, budget and limit of the run.
        prompt: names the prompt: the row id.
        on_start: called as each completion gets its first slot.
        observe: told of every attempt that ends by itself.
        stragglers: whom not to wait for. The completions kept are the first n to survive, whatever
            their index.
        read: what to make of each completion; may raise a `SamplingError`, as the sampler may.

    Cancelling this cancels every attempt and waits for them to end. An exception that is no
    `SamplingError` is a bug, or the run's end: it cancels the siblings and is raised as it is.

    Raises:
        RunStoppedError: the run is over: the server refuses everything, or a budget is spent.
        ValueError: `seeds` has none beside those to over-sample.
    """
    wanted = len(seeds) - stragglers.over_sample
    if stragglers.over_sample and wanted < 1:
        raise ValueError(
            f"{len(seeds)} seeds with over_sample={stragglers.over_sample} leave no completion "
            "that is wanted: pass n + over_sample of them"
        )
    end = GroupEnd(stragglers, wanted)
    attempts = [CompletionAttempts(retry, seed) for seed in seeds]
    outcomes: dict[int, Survivor | Failure] = {}
    limiter = limiter or RunLimiter(patience_seconds=retry.max_seconds)

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
            limiter=limiter,
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
        outcomes |= {index: straggler(index, attempts[index], stragglers, now=now) for index in cut}
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
    params: _types.SamplingParams,
    *,
    index: int,
    seed: int | None,
    slots: AbstractAsyncContextManager[object],
    retry: RetryPolicy,
    limiter: RunLimiter,
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
                    repeated=gives_up and limiter.has_met(attempt),
                )
            )

    while True:
        async with limiter.turn(slots, retry=bool(attempts.history), prompt=prompt) as turn:
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
                others = limiter.limits.in_flight - 1
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
        tell(attempt, limiter.limits.in_flight, gives_up=again is None)
        if again is None:
            return _failure(index, failure, attempts)
        with loop_clock().runs():
            await asyncio.sleep(max(0.0, again - sampling_time()))


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
