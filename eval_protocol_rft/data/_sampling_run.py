"""The running part of a bulk job: from data rows to stored completions, here or on a Ray cluster.

Invariant: every completion asked for is stored once, as itself or as its failure, in any order.
At most `limit` requests are in flight, and what is in memory is bounded: completions that
wait, that are in flight, and that are on their way to the disk. A new prompt starts whenever there
is room, with no barrier. What was sampled is on disk when this ends, however it ends.

On a cluster only the request itself is made elsewhere, by one actor per node. Prompts are rendered,
seeds derived, attempts counted and completions stored here, so a job may be begun with one engine
and continued with the other. A request whose node is lost is a failed attempt, which the retry
policy repeats, on another node.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec
import numpy as np

from eval_protocol_rft import sampling
from eval_protocol_rft.data._format import CompletionRow
from eval_protocol_rft.data._job_store import JobStore
from eval_protocol_rft.data._row_groups import to_record_batch
from eval_protocol_rft.local import LoadedTokenizer, Placement
from eval_protocol_rft.local.models import LOCAL_PREFIX
from eval_protocol_rft.rollout import AnswerReader, PromptError, RolloutRequest, VocabularyWitness
from eval_protocol_rft.sampling import Failure, SamplingError, Survivor, TokenIds, sample_one
from eval_protocol_rft.scoring.executors import EAGER_SECONDS, NodeActor, NodeActors, Work

_STORED_AT_ONCE = 256
"""Rows per append: so many share one wait for the disk."""
_HOPELESS_AFTER = 16
"""So many failures, before anything succeeded, end the run: the key is wrong, or the model's name,
and the rest of the data set would fare no better."""
_HOPELESS_KINDS = frozenset({"connection", "unavailable"})
"""Said of the server, so of every row, after all attempts of all of them."""
_NO_SLOTS: contextlib.nullcontext[None] = contextlib.nullcontext()
"""The limiter's limit is the bound."""


Ask = Callable[
    [TokenIds, sampling.SamplingParams, int | None, Callable[[], None]],
    Awaitable[Survivor | Failure],
]
"""Prompt, parameters, seed, and what to call when the request leaves; what came of it."""
Fill = Callable[[CompletionRow, Survivor | Failure, TokenIds], None]
"""Put what came of a request, behind which prompt, into a row."""
RunEpisode = Callable[[CompletionRow, Ask, Fill], Awaitable[None]]
"""Run the episode of a row, and put it there, or why there is none."""


class Prompt(NamedTuple):
    """One data row, ready to be asked."""

    row: CompletionRow
    """What all its completions have in common."""
    ids: TokenIds | PromptError | None
    """None where they are episodes, whose environments may say more before the first turn."""
    samples: Sequence[int]
    """The `sample_idx` that are wanted."""
    seeds: Sequence[int | None]
    """[n] by `sample_idx`."""


@dataclass(slots=True)
class SamplingRun:
    """One run over prompts; `await run(prompts)` once."""

    sampler: sampling.Sampler
    tokenizer: LoadedTokenizer
    request: RolloutRequest
    store: JobStore
    retry: sampling.RetryPolicy
    limit: sampling.ConcurrencyLimit
    highest: int
    """Most that the limit ever is."""
    on_stored: Callable[[list[CompletionRow]], None]
    episodes: Callable[[CompletionRow], RunEpisode] | None = None
    """Where completions are episodes: given what those of a data row have in common, runs them."""
    observe: sampling.Observer | None = None
    """Told of every attempt."""
    fresh: bool = True
    """No earlier run of the job had a completion. Else the rows that are left may be those that
    cannot be sampled, and their failures belong into the file."""
    _finished: asyncio.Queue[CompletionRow | None] = field(init=False)
    _room: asyncio.Semaphore = field(init=False)
    """For a completion, from before it is started until it is stored."""
    _limiter: sampling.RunLimiter = field(init=False)
    _witness: VocabularyWitness = field(default_factory=VocabularyWitness)
    _held: list[CompletionRow] | None = field(default_factory=list)
    """Failures before the first success; None once there was one."""

    @property
    def doubt(self) -> str | None:
        """What a person has to look at once it ran: `VocabularyWitness.doubt`."""
        return self._witness.doubt

    async def run(self, prompts: Iterable[Prompt]) -> None:
        """Sample and store everything.

        Raises:
            RunStoppedError: the first completions all failed.
            RunStoppedError: the server refuses everything, or answers nothing for long, or its
                texts are not what the tokenizer reads in its ids.
            OSError: the store's disk is full or failed.
            Exception: what `prompts` raises, or a sampler that raises no `SamplingError`.
        """
        # Without a limit of its own: a completion that had to wait here would be lost by Ctrl-C.
        self._finished = asyncio.Queue()
        self._room = asyncio.Semaphore(2 * self.highest + _STORED_AT_ONCE)
        self._limiter = sampling.RunLimiter(
            limit=self.limit, patience_seconds=self.retry.max_seconds, proven=not self.fresh
        )
        with ThreadPoolExecutor(1, "rollout-store") as thread:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write(thread))
                    await self._feed(prompts)
                    self._finished.put_nowait(None)
            except BaseExceptionGroup as errors:
                raise _first(errors) from None
            finally:
                # What came in while the run was being stopped was paid for too.
                left = [self._finished.get_nowait() for _ in range(self._finished.qsize())]
                rows = self._worth_storing([row for row in left if row is not None])
                if rows:
                    thread.submit(self._store, rows).result()

    def _worth_storing(self, left: list[CompletionRow]) -> list[CompletionRow]:
        """What a run that ends early stores of what was not stored yet: no failures that may be
        those of a wrong key."""
        rows = [*(self._held or []), *left]
        if self._held is None or not all(row.failed for row in rows):
            return rows
        return [] if self.fresh else [row for row in rows if not _concerns_all(row)]

    async def _feed(self, prompts: Iterable[Prompt]) -> None:
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                run_episode = None
                if self.episodes is not None and prompt.ids is None:
                    run_episode = self.episodes(prompt.row)
                for sample_idx in prompt.samples:
                    await self._room.acquire()
                    group.create_task(self._one(prompt, sample_idx, run_episode))

    async def _one(self, prompt: Prompt, sample_idx: int, run_episode: RunEpisode | None) -> None:
        seed = prompt.seeds[sample_idx]
        row = msgspec.structs.replace(prompt.row, sample_idx=sample_idx, seed=seed, scores={})

        async def ask(
            ids: TokenIds,
            params: sampling.SamplingParams,
            seed: int | None,
            on_start: Callable[[], None],
        ) -> Survivor | Failure:
            def started() -> None:
                if row.began_at is None:
                    row.began_at = time.time()
                on_start()

            return await sample_one(
                self.sampler,
                ids,
                params,
                index=sample_idx,
                seed=seed,
                slots=_NO_SLOTS,
                retry=self.retry,
                limiter=self._limiter,
                prompt=row.row_id,
                observe=self._observer(len(ids)),
                on_start=started,
                read=lambda completion: self.tokenizer.read(completion, params, self._witness.look),
            )

        if isinstance(prompt.ids, PromptError):
            row.prompt_ids = None
            row.error, row.error_kind = str(prompt.ids), "prompt"
            row.attempts, row.seconds = 0, 0.0
        elif run_episode is not None:
            await run_episode(row, ask, self._fill)
        elif prompt.ids is not None:
            params = replace(self.request.params, max_tokens=row.max_tokens)
            outcome = await ask(prompt.ids, params, seed, lambda: None)
            self._fill(row, outcome, prompt.ids)
        self._finished.put_nowait(row)

    def _observer(self, prompt_tokens: int) -> sampling.Observer | None:
        """`observe`, with events that say how long the prompt is."""
        observe = self.observe
        if observe is None:
            return None
        return lambda event: observe(replace(event, prompt_tokens=prompt_tokens))

    def _fill(self, row: CompletionRow, outcome: Survivor | Failure, prompt: TokenIds) -> None:
        row.attempts, row.seconds = outcome.attempts, outcome.seconds
        if isinstance(outcome, Failure):
            row.error, row.error_kind = outcome.message, outcome.kind
            row.error_status = outcome.status
            return
        completion = outcome.completion
        raw = completion.raw_logprobs
        row.response = completion.text or ""
        if not self.request.raw:  # else plain text
            reader = AnswerReader(prompt, self.tokenizer, tools=row.tools)
            row.message = reader.read_to_record(row.response)
        row.completion_ids = np.array(completion.token_ids, np.int32)
        row.logprobs = np.array(completion.logprobs, np.float32)
        row.raw_logprobs = None if raw is None else np.array(raw, np.float32)
        row.finish_reason = completion.finish_reason
        row.truncated = completion.truncated
        row.past_end = np.array(completion.past_end, np.int32) if completion.past_end else None
        row.policy_version = completion.policy_version
        row.first_policy_version = completion.first_policy_version
        row.request_id = completion.request_id

    async def _write(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        more = True
        while more:
            rows = [await self._finished.get()]
            while len(rows) < _STORED_AT_ONCE and not self._finished.empty():
                rows.append(self._finished.get_nowait())
            more = rows[-1] is not None
            taken = self._to_store([row for row in rows if row is not None], ended=not more)
            if taken:
                # Shielded: the thread goes on when we are cancelled, and must be waited for.
                await asyncio.shield(loop.run_in_executor(thread, self._store, taken))
                self.on_stored(taken)
                for _ in taken:
                    self._room.release()

    def _to_store(self, rows: list[CompletionRow], *, ended: bool) -> list[CompletionRow]:
        """`rows`, but failures wait for the first success, or for the end."""
        if self._held is None:
            return rows
        self._held += rows
        held = self._held
        if held and all(row.failed for row in held):
            enough = len(held) >= _HOPELESS_AFTER
            if not enough and not ended:
                return []
            if all(map(_concerns_all, held)) or (enough and self.fresh):
                raise sampling.RunStoppedError(
                    f"the first {len(held)} completions all failed ({held[0].error_kind}); "
                    f"row {held[0].row_id}: {held[0].error}"
                )
        self._held = None
        return held

    def _store(self, rows: list[CompletionRow]) -> None:
        self.store.append(to_record_batch(rows, self.store.schema))


def _concerns_all(row: CompletionRow) -> bool:
    """Whether the failure says nothing of the row itself."""
    return row.error_status in sampling.ACCOUNT_STATUSES or row.error_kind in _HOPELESS_KINDS


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error that is no group."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


@dataclass(slots=True)
class RunCounts:
    """Counts of one run; completions of earlier runs are not in it."""

    completions: int = 0
    """Sampled and stored."""
    truncated: int = 0
    tokens: int = 0
    """Sampled tokens."""
    attempts: int = 0
    """Requests made."""
    failures: Counter[str] = field(default_factory=Counter)
    """Kind -> completions that failed for good."""
    first_failure: str | None = None

    @property
    def failed(self) -> int:
        return self.failures.total()

    def line(self, attempts: sampling.RunSummary, seconds: float) -> str:
        """How the run is doing after so many seconds."""
        truncated = self.truncated / self.completions if self.completions else 0.0
        retries = ""
        if attempts.retries:
            [(cause, _)] = attempts.retries.most_common(1)
            retries = f", {attempts.retries.total()} retries (mostly {cause})"
        rate = self.tokens / seconds
        return f"{rate:.0f} tok/s, {self.failed} failed, {truncated:.0%} truncated{retries}"

    def add(self, rows: Iterable[CompletionRow]) -> None:
        """Count rows that were stored."""
        for row in rows:
            self.attempts += row.attempts or 0
            if row.failed:
                self.failures[row.error_kind or "internal"] += 1
                self.first_failure = self.first_failure or f"row {row.row_id}: {row.error}"
            else:
                self.completions += 1
                self.truncated += bool(row.truncated)
                self.tokens += row.num_tokens


class NothingToSample:
    """The sampler of a job that is finished, for which no engine is started."""

    async def sample(
        self, prompt_ids: Sequence[int], params: sampling.SamplingParams, *, seed: int | None = None
    ) -> sampling.Completion:
        raise AssertionError("a finished job samples nothing")

    async def aclose(self) -> None:
        """There is nothing to close."""


class RolloutActor:
    """Lives on a node, and samples there."""

    def __init__(
        self, request: RolloutRequest, trust_remote_code: bool, placement: Placement | None = None
    ) -> None:
        # No more than this: what an actor raises here reaches the driver as its death.
        self._request = request
        self._trust_remote_code = trust_remote_code
        self._placement = placement
        self._sampler: sampling.Sampler

    async def ready(self) -> None:
        """Load the model, or find the server's client."""
        endpoint = self._request.endpoint
        if endpoint is not None:
            from eval_protocol_rft.sampling import HttpSampler

            self._sampler = HttpSampler(endpoint)
            return

        from eval_protocol_rft.local import load_local_sampler

        self._sampler = await asyncio.to_thread(
            load_local_sampler,
            self._request.params.model.removeprefix(LOCAL_PREFIX),
            placement=self._placement,
            trust_remote_code=self._trust_remote_code,
        )

    async def sample(
        self, prompt_ids: Sequence[int], params: sampling.SamplingParams, seed: int | None
    ) -> sampling.Completion | SamplingError:
        """As `Sampler.sample`; what that raises is returned: Ray would wrap it, with a traceback
        for its message."""
        try:
            return await self._sampler.sample(prompt_ids, params, seed=seed)
        except SamplingError as error:
            return error.with_traceback(None)


class RaySampler:
    """The samplers of all nodes as one. `await start()` comes first.

    Args:
        request: names the model or the endpoint. The API key travels inside it.
        trust_remote_code: let local models run their own code.
        concurrency: most requests in flight, over all nodes.
        address: see `NodeActors`.
        placement: of models on the nodes.

    Raises:
        RayEngineError: Ray is not installed.
    """

    def __init__(
        self,
        request: RolloutRequest,
        trust_remote_code: bool,
        concurrency: int,
        address: str | None,
        placement: Placement | None = None,
    ) -> None:
        arguments = {
            "request": request, "trust_remote_code": trust_remote_code, "placement": placement,
        }  # fmt: skip
        work = Work(RolloutActor, arguments, cpus=1, calls=concurrency)
        self._actors = NodeActors(address, lambda _: work)

    async def start(self) -> None:
        """Join the cluster, and wait until one of its nodes can sample. Others join in later.

        Raises:
            RayEngineError: there is no cluster, or a node cannot load the model.
        """
        # Here, not in a thread: Ray warns when it may not see to signals.
        self._actors.connect()
        await self._free()

    async def sample(
        self, prompt_ids: Sequence[int], params: sampling.SamplingParams, *, seed: int | None = None
    ) -> sampling.Completion:
        """Sample on the node that has the least to do; see `Sampler.sample`.

        Raises:
            SamplingError: as the node's own sampler; of kind `connection`, the node was lost
                meanwhile.
            RayEngineError: a node that joined cannot load the model.
        """
        actor = await self._free()
        actor.busy += 1
        try:
            outcome = await actor.handle.sample.remote(prompt_ids, params, seed)
        except self._actors.gone as error:
            self._actors.lost(actor)
            raise SamplingError(
                f"the Ray actor on node {actor.node.address} was lost: {type(error).__name__}",
                kind="connection",
            ) from error
        finally:
            actor.busy -= 1
        if isinstance(outcome, SamplingError):
            raise outcome
        completion: sampling.Completion = outcome
        return completion

    async def aclose(self) -> None:
        """End the actors and what they are doing. Idempotent."""
        await asyncio.to_thread(self._actors.close)

    async def _free(self) -> NodeActor:
        # Asking is what finds out: Ray tells nobody of nodes that join.
        while (actor := self._actors.free()) is None:  # noqa: ASYNC110
            await asyncio.sleep(EAGER_SECONDS)
        return actor
