"""The thread that samples: takes requests from any thread, runs them together, answers them.

Invariant: every submitted request is answered once, with a completion or an error, unless nobody
waits for it any more. When the model fails, the requests that it was running are answered with
that failure and the thread goes on with the next ones.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from eval_protocol_rft.sampling.local_cohort import Cohort, Outcome
from eval_protocol_rft.sampling.local_model import LocalModel
from eval_protocol_rft.sampling.local_request import Decode, Request
from eval_protocol_rft.sampling.types import Completion, SamplingError

_log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""How long the thread waits for more work before it ends; the next request starts another. Longer
than the gap between the turns of a rollout, so that a rollout keeps one thread."""

MAX_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, that one prefill may hold unless a single prompt is longer:
bounds its activations and how long running completions wait for it."""

SMALL_MODEL_PARAMETERS = 20_000_000
"""Below this a step takes less time than waking a second torch thread saves: sample on one. Torch
applies the setting to this thread and to those that start later."""


class Worker:
    """Owns the thread; it exists only while there is work, and a moment longer."""

    def __init__(self, model: LocalModel, decode: Decode, *, max_batch_tokens: int) -> None:
        self._model = model
        self._decode = decode
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, request: Request) -> None:
        """Queue a request, first in first out; its future is resolved on its own event loop."""
        with self._changed:
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="local-sampler", daemon=True)
                self._thread.start()
            self._changed.notify()

    def stop(self) -> None:
        """Answer everything pending with an error and end the thread; blocks for the step that is
        running. Later requests start a new thread."""
        with self._changed:
            thread = self._thread
            if thread is None:
                return
            self._stopping = True
            self._changed.notify()
        # A garbage collection inside the thread may end up here.
        if thread is not threading.current_thread():
            thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        if sum(p.numel() for p in self._model.module.parameters()) < SMALL_MODEL_PARAMETERS:
            torch.set_num_threads(1)
        cohort: Cohort | None = None
        while (admitted := self._next(cohort)) is not None:
            cohort = self._round(cohort, admitted)

    def _next(self, cohort: Cohort | None) -> list[Request] | None:
        """Requests that join now; None when the thread has ended."""
        running = cohort.requests if cohort else []
        with self._changed:
            if not running:
                self._changed.wait_for(lambda: self._waiting or self._stopping, IDLE_SECONDS)
            if self._stopping or not (running or self._waiting):
                _fail([*running, *self._waiting], "the local sampler was closed")
                self._waiting.clear()
                self._thread = None
                self._stopping = False
                return None
            return self._admit(running)

    def _admit(self, running: Sequence[Request]) -> list[Request]:
        """Take requests in order while caches and prefill have room. One that would run alone
        always has."""
        admitted: list[Request] = []
        prompts: set[tuple[int, ...]] = set()
        longest = 0
        widest = max((request.most_tokens for request in running), default=0)
        while self._waiting:
            request = self._waiting[0]
            if not request.dropped:
                rows = len(running) + len(admitted) + 1
                widest = max(widest, request.most_tokens)
                longest = max(longest, len(request.prompt_ids))
                prompts.add(request.prompt_ids)
                if rows > 1 and rows * widest > self._max_batch_tokens:
                    break
                if admitted and len(prompts) * longest > MAX_PREFILL_TOKENS:
                    break
                admitted.append(request)
            self._waiting.popleft()
        return admitted

    def _round(self, cohort: Cohort | None, admitted: Sequence[Request]) -> Cohort | None:
        """One token for everyone: a step for those that run, a prefill for those that join.
        Returns those that go on."""
        outcomes: list[Outcome] = []
        cohorts: list[Cohort] = []
        if cohort:
            with _failing(cohort.requests, outcomes):
                outcomes += cohort.advance(self._decode)
                cohorts.append(cohort)
        if admitted:
            with _failing(admitted, outcomes):
                joined, ended = Cohort.start(self._model, admitted, self._decode)
                outcomes += ended
                cohorts.append(joined)
        merged: Cohort | None = None
        with _failing([request for c in cohorts for request in c.live], outcomes):
            merged = Cohort.merge(cohorts)
        _deliver(outcomes)
        return merged


@contextmanager
def _failing(requests: Sequence[Request], outcomes: list[Outcome]) -> Iterator[None]:
    """Answer `requests` with whatever goes wrong inside: there is no caller to raise it to."""
    try:
        yield
    # A panic in a tokenizer's native code is no Exception, and must not end the thread either.
    except BaseException as error:  # noqa: BLE001
        _log.exception("local sampling failed for %d requests", len(requests))
        message = f"the local model failed: {type(error).__name__}: {error}"
        outcomes.extend(Outcome(request, SamplingError(message)) for request in requests)


def _fail(requests: Iterable[Request], message: str) -> None:
    _deliver([Outcome(request, SamplingError(message)) for request in requests])


def _deliver(outcomes: Iterable[Outcome]) -> None:
    """Answer requests on their own event loops, one wake-up per loop."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_loop[outcome.request.future.get_loop()].append(outcome)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, batch)
        except RuntimeError:
            # A closed loop has no one left who waits.
            if not loop.is_closed():
                raise


def _resolve(outcomes: Sequence[Outcome]) -> None:
    for request, result in outcomes:
        if request.future.done():
            continue
        if isinstance(result, Completion):
            request.future.set_result(result)
        else:
            request.future.set_exception(result)
