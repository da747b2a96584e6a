"""The thread that samples: takes requests from any thread, runs them together, answers them.

Invariant: every submitted request is answered once, with a completion or an error, unless nobody
waits for it any more. When the model fails, the requests that it was running are answered with
that failure and the thread goes on with the next ones.

Requests that run together: one forward and one draw for all of them, then who goes on.

Invariant: which requests share a batch changes neither their tokens nor their logprobs, beyond
float noise in the logits. A request whose logits are unusable leaves the others as they are.
Shapes: R requests of a running batch, V vocabulary entries.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from eval_protocol_rft.local import _cache as cache
from eval_protocol_rft.local._cache import Batch, Joining, LocalModel, Prefixes
from eval_protocol_rft.local._draw import Decode, DrawPlan, Request, draw, uniforms
from eval_protocol_rft.sampling import Completion, SamplingError

Outcome = tuple[Request, Completion | SamplingError]
"""A request and what it is answered with."""
Swap = tuple[Callable[[], None], str | None, Future[None]]
"""What puts new weights in, their name, and who waits for it."""


class RunningBatch:
    """R requests, each with its row of a batch of key/value caches."""

    def __init__(self, batch: Batch, requests: Sequence[Request], rows: Sequence[int]) -> None:
        self.requests = list(requests)
        self._batch = batch
        self._rows = list(rows)
        """Batch row of each request; requests with one prompt share a row until their first
        tokens are drawn."""
        self._plan = DrawPlan([r.params for r in requests], batch.device)
        self._seeds_R = np.array([r.seed for r in requests], dtype=np.uint64)
        self._tokens_R: Tensor
        self._live: list[int] = []
        """Places in `requests` of those that go on."""
        self._complete: list[int] = []
        """Places of those that the last token completed."""

    @classmethod
    def start(
        cls, model: LocalModel, joining: Sequence[Joining], decode: Decode
    ) -> tuple[RunningBatch, list[Outcome]]:
        """Prefill, each distinct prompt once, and draw every request's first token. Something is
        known of every prompt, or of none."""
        requests = [one.request for one in joining]
        first: dict[tuple[int, ...], Joining] = {}
        for one in joining:
            first.setdefault(one.request.prompt_ids, one)
        batch, logits_BV = Batch.prefill(model, list(first.values()))
        row_of = {prompt: row for row, prompt in enumerate(first)}
        rows = [row_of[request.prompt_ids] for request in requests]
        running = cls(batch, requests, rows)
        return running, running._draw(logits_BV[rows], decode)

    def advance(self, decode: Decode) -> list[Outcome]:
        """One token more for every request; it must come from `merge`."""
        return self._draw(self._batch.step(self._tokens_R), decode)

    def keep(self, prefixes: Prefixes) -> None:
        """Leave what was computed of the requests that just ended to the next turns of their
        sessions. The last token was drawn and never run: it has no keys and values."""
        for index in self._complete:
            request = self.requests[index]
            length = len(request.prompt_ids) + len(request.token_ids) - 1
            if request.session is not None and prefixes.fits(length):
                ids = (*request.prompt_ids, *request.token_ids[:-1])
                columns = self._batch.columns(self._rows[index], length)
                prefixes.keep(request.session, ids, columns)

    @classmethod
    def merge(cls, parts: Sequence[RunningBatch]) -> RunningBatch | None:
        """One batch of all requests that go on, a row each; None if there are none. The parts
        given are used up."""
        parts = [part for part in parts if part._live]
        if not parts:
            return None
        if len(parts) > 1 or parts[0]._shares_rows():
            return cls._gather(parts)
        (part,) = parts
        return part if len(part._live) == len(part.requests) else part._shrink()

    @classmethod
    def _gather(cls, parts: Sequence[RunningBatch]) -> RunningBatch:
        requests = [request for c in parts for request in c.live]
        batch = Batch.gather([(c._batch, [c._rows[i] for i in c._live]) for c in parts])
        merged = cls(batch, requests, range(len(requests)))
        merged._tokens_R = torch.cat([c._tokens_R[c._live] for c in parts])
        return merged

    def _shrink(self) -> RunningBatch:
        order = self._batch.shrink(self._live)
        smaller = type(self)(self._batch, [self.requests[i] for i in order], range(len(order)))
        smaller._tokens_R = self._tokens_R[order]
        return smaller

    def _shares_rows(self) -> bool:
        return len(self._batch) < len(self.requests)

    @property
    def live(self) -> list[Request]:
        """Requests that go on."""
        return [self.requests[index] for index in self._live]

    def _draw(self, logits_RV: Tensor, decode: Decode) -> list[Outcome]:
        steps_R = np.array([len(r.token_ids) for r in self.requests], dtype=np.uint64)
        uniforms_R = uniforms(self._seeds_R, steps_R).to(logits_RV.device)
        drawn = draw(logits_RV, self._plan, uniforms_R)
        self._tokens_R = drawn.tokens_B
        values_R = zip(*(values_R.tolist() for values_R in drawn), strict=True)
        outcomes = []
        self._live, self._complete = [], []
        for index, (request, values) in enumerate(zip(self.requests, values_R, strict=True)):
            result = _take(request, *values, decode=decode)
            if result is not None:
                outcomes.append((request, result))
                if isinstance(result, Completion):
                    self._complete.append(index)
            elif not request.dropped:
                self._live.append(index)
        return outcomes


def _take(
    request: Request, token: int, logprob: float, raw_logprob: float, *, decode: Decode
) -> Completion | SamplingError | None:
    try:
        request.add(token, logprob, raw_logprob)
        return request.ending(decode)
    except SamplingError as error:
        return error


_log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""How long the thread waits for more work before it ends; the next request starts another. Longer
than the gap between the turns of a rollout, so that a rollout keeps one thread."""

MAX_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, that one prefill may run unless a single prompt has more: bounds
its activations and how long running completions wait for it."""


class Worker:
    """Owns the thread; it exists only while there is work, and a moment longer."""

    def __init__(
        self,
        model: LocalModel,
        decode: Decode,
        *,
        max_batch_tokens: int,
        policy_version: str | None = None,
    ) -> None:
        self.policy_version = policy_version
        """Of the weights that the next step samples with."""
        self._model = model
        self._decode = decode
        self._max_batch_tokens = max_batch_tokens
        self._prefixes = Prefixes(int(max_batch_tokens * cache.KEPT_SHARE))
        """Outlives an idle thread: an environment may take longer than that. Belongs to the thread,
        or to who holds the lock while there is none."""
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._held = 0
        self._swaps: deque[Swap] = deque()

    @property
    def pending(self) -> int:
        """Requests that have not joined a batch yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request, first in first out; its future is resolved on its own event loop."""
        with self._changed:
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="local-sampler", daemon=True)
                self._thread.start()
            self._changed.notify()

    def hold(self) -> None:
        """Let no step begin until `release` was called as often."""
        with self._changed:
            self._held += 1

    def release(self) -> None:
        """Undo one `hold`. What waits joins in an order of its own, not in that of its arrival: the
        same requests then give the same batches, to the last bit."""
        with self._changed:
            self._held -= 1
            if not self._held:
                self._waiting = deque(sorted(self._waiting, key=Request.order))
            self._changed.notify()

    def swap(self, change: Callable[[], None], policy_version: str | None) -> Future[None]:
        """Run `change` between two steps, after which the weights are called `policy_version`."""
        done: Future[None] = Future()
        with self._changed:
            if self._thread is None:
                self._apply((change, policy_version, done), ())
            else:
                self._swaps.append((change, policy_version, done))
                self._changed.notify()
        return done

    def stop(self) -> None:
        """Answer everything pending with an error, end the thread and free what was kept; blocks
        for the step that is running. Later requests start a new thread."""
        with self._changed:
            thread = self._thread
            if thread is None:
                self._prefixes.clear()
                return
            self._stopping = True
            self._changed.notify()
        # A garbage collection inside the thread may end up here.
        if thread is not threading.current_thread():
            thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        cache.spare_threads(self._model.module)
        batch: RunningBatch | None = None
        while (joining := self._next(batch)) is not None:
            batch = self._round(batch, joining)

    def _next(self, batch: RunningBatch | None) -> list[Joining] | None:
        """Requests that join now; None when the thread has ended."""
        running = batch.requests if batch else []
        with self._changed:
            while True:
                while self._swaps:
                    self._apply(self._swaps.popleft(), running)
                if self._held and not self._stopping:
                    self._changed.wait_for(lambda: self._swaps or self._stopping or not self._held)
                elif not running and not self._waiting and not self._stopping:
                    self._changed.wait_for(self._has_news, IDLE_SECONDS)
                    if not self._has_news():
                        break
                else:
                    break
            if self._stopping or not (running or self._waiting):
                _fail([*running, *self._waiting], "the local sampler was closed")
                self._waiting.clear()
                if self._stopping:
                    self._prefixes.clear()
                self._thread = None
                self._stopping = False
                return None
            return self._take_waiting(running)

    def _has_news(self) -> bool:
        return bool(self._waiting or self._swaps or self._stopping or self._held)

    def _apply(self, swap: Swap, running: Sequence[Request]) -> None:
        change, policy_version, done = swap
        if not done.set_running_or_notify_cancel():
            return
        # Keys and values of old weights, or partly of them, are no turn's to go on from.
        self._prefixes.clear()
        for request in running:
            request.session = None
        try:
            with torch.no_grad():
                change()
        except BaseException as error:  # noqa: BLE001 - the caller has it
            done.set_exception(error)
            return
        self.policy_version = policy_version
        for request in running:
            request.sampled_by(policy_version)
        done.set_result(None)

    def _take_waiting(self, running: Sequence[Request]) -> list[Joining]:
        """Take requests in order while caches and prefill have room. One that would run alone
        always has."""
        taken: list[Joining] = []
        prompts: set[tuple[tuple[int, ...], int]] = set()
        longest = 0
        widest = max((request.most_tokens for request in running), default=0)
        while self._waiting:
            request = self._waiting[0]
            if not request.dropped:
                rows = len(running) + len(taken) + 1
                widest = max(widest, request.most_tokens)
                one = self._prefixes.joining(request)
                longest = max(longest, one.new)
                prompts.add((request.prompt_ids, one.new))
                if rows > 1 and rows * widest > self._max_batch_tokens:
                    break
                if taken and len(prompts) * longest > MAX_PREFILL_TOKENS:
                    break
                request.sampled_by(self.policy_version)
                taken.append(one)
            self._waiting.popleft()
        return taken

    def _round(self, batch: RunningBatch | None, joining: Sequence[Joining]) -> RunningBatch | None:
        """One token for everyone: a step for those that run, a prefill for those that join.
        Returns those that go on."""
        outcomes: list[Outcome] = []
        parts: list[RunningBatch] = []
        if batch:
            with _failing(batch.requests, outcomes):
                outcomes += batch.advance(self._decode)
                parts.append(batch)
        for group in cache.prefill_groups(joining):
            with _failing([one.request for one in group], outcomes):
                joined, ended = RunningBatch.start(self._model, group, self._decode)
                outcomes += ended
                parts.append(joined)
        self._keep(parts)
        merged: RunningBatch | None = None
        with _failing([request for c in parts for request in c.live], outcomes):
            merged = RunningBatch.merge(parts)
        _deliver(outcomes)
        return merged

    def _keep(self, parts: Iterable[RunningBatch]) -> None:
        """For the next turns of sessions, which can do without: what goes wrong fails nobody."""
        try:
            for part in parts:
                part.keep(self._prefixes)
        except Exception:  # noqa: BLE001 - of the device, when its memory is full
            _log.exception("what sessions had is not kept")
            self._prefixes.clear()


@contextmanager
def _failing(requests: Sequence[Request], outcomes: list[Outcome]) -> Iterator[None]:
    """Answer `requests` with whatever goes wrong inside: there is no caller to raise it to."""
    try:
        yield
    # A panic in a tokenizer's native code is no Exception, and must not end the thread either.
    except BaseException as error:  # noqa: BLE001
        _log.exception("local sampling failed for %d requests", len(requests))
        message = f"the local model failed: {type(error).__name__}: {error}"
        outcomes.extend((request, SamplingError(message)) for request in requests)


def _fail(requests: Iterable[Request], message: str) -> None:
    _deliver([(request, SamplingError(message)) for request in requests])


def _deliver(outcomes: Iterable[Outcome]) -> None:
    """Answer requests on their own event loops, one wake-up per loop."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[Outcome]] = defaultdict(list)
    for request, result in outcomes:
        by_loop[request.future.get_loop()].append((request, result))
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
