"""What a processor has open in each event loop, and how it is closed: rows that are prepared ahead
of the free slots, clients, checks.

Eval Protocol runs each test case in an event loop of its own, over one processor.

Invariant: nothing of one loop is used in another, and what one caller ends is its own: rollouts of
others go on, and the last of them closes. A row's slot is released once, whatever happens to its
row.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from eval_protocol.models import EvaluationRow

from eval_protocol_rft import sampling
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout._evaluation_run import watched
from eval_protocol_rft.rollout._params import RolloutRequest
from eval_protocol_rft.rollout._vocabulary import VocabularyWitness

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ROWS_AHEAD = 8
"""Rows whose prompt is rendered while their completions still wait for a slot: enough to keep every
slot busy, few enough that the first request does not wait for the whole data set's rendering."""


class RowSlot:
    """A row's place among those that are prepared. It is released once all of the row's completions
    have started, so that the next row is ready when a slot comes free."""

    def __init__(self, rows_ahead: asyncio.Semaphore) -> None:
        self._rows_ahead = rows_ahead
        self._to_start = 1
        self._held = False

    async def __aenter__(self) -> RowSlot:
        await self._rows_ahead.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def expect(self, n: int) -> None:
        """The row has n completions."""
        self._to_start = n

    def started(self) -> None:
        """One of them has started."""
        self._to_start -= 1
        if self._to_start == 0:
            self._release()

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._rows_ahead.release()


async def all_rollouts(rollouts: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What the rollouts of a row come to, in order. Where one raises, or this is cancelled, the
    others are ended first."""
    tasks = [asyncio.ensure_future(one) for one in rollouts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowJob:
    """One row, ready to be sampled."""

    request: RolloutRequest
    sampler: sampling.Sampler
    tokenizer: LoadedTokenizer
    messages: list[Any]
    """Eval Protocol's, those to be answered."""
    limiter: sampling.RunLimiter
    witness: VocabularyWitness
    began_at: float
    """Unix seconds."""
    began: float
    """Of the performance counter."""
    run: int | str
    """Names this rollout among those of its row."""
    row_key: str = ""
    """Names the row among all rows."""
    seeds: list[int | None] = field(default_factory=list)
    """One per completion that is asked for."""


CLEANS_UP_AFTER_EACH_RUN = [
    int(part) for part in re.findall(r"\d+", version("eval-protocol"))[:3]
] < [0, 3, 25]
"""Whether Eval Protocol cleans up when a run has ended (with its priority scheduler, when a rollout
has), while others share the processor: up to 0.3.23 or 0.3.24."""


class LoopState:
    """What belongs to one event loop; each test case of Eval Protocol runs in a loop of its own."""

    def __init__(self) -> None:
        self.clients: dict[sampling.Endpoint, sampling.HttpSampler] = {}
        self.limiters: dict[sampling.Endpoint | None, sampling.RunLimiter] = {}
        """One circuit breaker and budget per server."""
        self.tasks: dict[asyncio.Task[EvaluationRow], asyncio.Task[Any] | None] = {}
        """Rollouts, and the task that asked for each."""
        self.ends_with_tasks = False
        """Whether nobody needs it once these have ended."""
        self.checks: dict[tuple[sampling.Endpoint | None, str], asyncio.Task[None]] = {}
        """Of what the user says of a model's logprobs."""
        self.services: dict[Any, Any] = {}
        """Whatever else is open for this loop and has `aclose`; it closes before the clients."""
        self.witnesses: dict[tuple[sampling.Endpoint | None, str, str], VocabularyWitness] = {}
        """By server, model and tokenizer."""

    async def check_logprobs(
        self,
        job: RowJob,
        *,
        slots: AbstractAsyncContextManager[object],
        retry: sampling.RetryPolicy,
    ) -> None:
        """What the user says of a server's logprobs is seen once before its first completion."""
        params, sampler = job.request.params, job.sampler
        if not (isinstance(sampler, sampling.HttpSampler) and sampling.needs_check(params)):
            return
        if sampler.knows_logprobs:
            return
        key = (job.request.endpoint, params.model)
        check = self.checks.get(key)
        if check is None or (
            check.done() and isinstance(check.exception(), sampling.SamplingError)
        ):
            check = self.checks[key] = asyncio.create_task(
                sampling.check_logprobs_mode(
                    job.sampler,
                    [
                        sampling.TokenIds(job.tokenizer.tokenizer.encode(text))
                        for text in sampling.PROBE_TEXTS
                    ],
                    params,
                    slots=slots,
                    retry=retry,
                    limiter=job.limiter,
                )
            )
        # Other rows wait for it too.
        await asyncio.shield(check)


async def _close(state: LoopState) -> None:
    """Close its clients, and tell what the texts of servers left in doubt where no summary of a
    test says it."""
    for witness in state.witnesses.values() if watched() is None else ():
        if witness.doubt is not None:
            logger.warning("%s", witness.doubt)
    for one in (*state.services.values(), *state.clients.values()):
        await one.aclose()


class LoopStates:
    """The states of one processor, by event loop."""

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, LoopState] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def current(self) -> LoopState:
        """The state of the running loop. States of loops that closed before they were ended go
        here: their clients hold their loop, so a weak reference to it would never die."""
        for loop in list(self._loops):
            if loop.is_closed():
                self._loops.pop(loop, None)
        return self._loops.setdefault(asyncio.get_running_loop(), LoopState())

    def started(self, state: LoopState, task: asyncio.Task[EvaluationRow]) -> None:
        """A rollout that the current task asked for."""
        state.tasks[task] = asyncio.current_task()
        task.add_done_callback(functools.partial(self._rolled_out, state))

    async def end(self, before_last: Callable[[], None]) -> None:
        """Cancel the rollouts of this loop (where Eval Protocol cleans up after each run, those of
        the caller), and close once none is left; `before_last` is called before the last end."""
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            return
        # Eval Protocol calls this with rollouts in flight when an evaluator raises.
        caller = asyncio.current_task()
        tasks: list[asyncio.Task[Any]] = [
            task
            for task, owner in state.tasks.items()
            if owner is caller or not CLEANS_UP_AFTER_EACH_RUN
        ]
        is_last = len(tasks) == len(state.tasks)
        if is_last:
            del self._loops[loop]
            tasks += state.checks.values()
            before_last()
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            if is_last:
                await _close(state)
            else:
                self.end_when_idle()

    def end_when_idle(self) -> None:
        """Close what is open in this loop once no rollout runs in it; without a loop, nothing is:
        connections are their loop's to close."""
        try:
            state = self._loops.get(asyncio.get_running_loop())
        except RuntimeError:
            return
        if state is not None:
            state.ends_with_tasks = True
            self._end_if_idle(state)

    def _rolled_out(self, state: LoopState, task: asyncio.Task[EvaluationRow]) -> None:
        state.tasks.pop(task, None)
        if not task.cancelled():  # the loop may be ending
            self._end_if_idle(state)

    def _end_if_idle(self, state: LoopState) -> None:
        loop = asyncio.get_running_loop()
        if state.tasks or not state.ends_with_tasks or self._loops.get(loop) is not state:
            return
        del self._loops[loop]
        for check in state.checks.values():
            check.cancel()
        closing = loop.create_task(_close(state))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
