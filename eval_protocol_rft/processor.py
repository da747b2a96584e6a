"""`FireworksTrainingRolloutProcessor`: an `EvaluationRow` in, the same row with n exact
completions out.

Invariant: a row is changed in one step, after everything for it succeeded, or not at all. One task
per row, in row order, as Eval Protocol matches them by position.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eval_protocol.models import EvaluationRow
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft.commit import commit_group
from eval_protocol_rft.endpoint import Endpoint
from eval_protocol_rft.params import LOCAL_PREFIX, RolloutRequest, parse_completion_params
from eval_protocol_rft.prompts import PromptError, render_prompt
from eval_protocol_rft.redaction import redact_params
from eval_protocol_rft.sampling.fanout import Group, derive_seed, sample_group
from eval_protocol_rft.sampling.http import HttpSampler
from eval_protocol_rft.sampling.retry import RetryPolicy
from eval_protocol_rft.sampling.types import LogprobsMode, Sampler, TokenIds
from eval_protocol_rft.tokenizer import LoadedTokenizer, TokenizerError, load_tokenizer

ROWS_AHEAD = 8
"""Rows whose prompt is rendered while their completions still wait for a slot: enough to keep every
slot busy, few enough that the first request does not wait for the whole data set's rendering."""


class RolloutError(RuntimeError):
    """A row got fewer completions than `min_completions`. A RuntimeError on purpose: Eval Protocol
    does not resample the whole row on those."""


@dataclass(slots=True)
class _LoopState:
    """What belongs to one event loop; each test case of Eval Protocol runs in a loop of its own."""

    samplers: dict[Endpoint, HttpSampler] = field(default_factory=dict)
    tasks: set[asyncio.Task[EvaluationRow]] = field(default_factory=set)
    runs: dict[tuple[str | None, str | None], list[str | None]] = field(default_factory=dict)
    """(experiment, row) -> rollout ids in order of appearance: the place is the run's number."""


class FireworksTrainingRolloutProcessor(RolloutProcessor):
    """Samples n completions per row and leaves token ids, sampling logprobs and text on it.

    Give it to `@evaluation_test(rollout_processor=...)`. What to sample comes from
    `completion_params`, read anew on every call: `model` (`local/...` samples in this process,
    everything else over HTTP), `n`, `temperature`, `max_tokens`, `top_p`, `top_k`, `stop`, `seed`,
    `api_base`, `tokenizer`, ... (see docs/processor.md).

    Args:
        tokenizer: folder or hub id, or a tokenizer object, that renders the prompts. Default: the
            local model's own, or the one that `model` names on the hub.
        chat_template_kwargs: passed to the chat template (`enable_thinking=False`, ...).
        drop_trailing_assistant_messages: sample an answer to the last message that is not the
            assistant's.
        split_reasoning: put a closed `<think>` block into `Message.reasoning_content`.
        min_completions: a row with fewer survivors is an error; the default keeps what there is.
        logprobs_mode: what a server that sends one unnamed logprob per token means by it:
            "processed_logprobs" if vLLM runs with `--logprobs-mode processed_logprobs`.
        retry: budget of attempts per completion.
        trust_remote_code: let tokenizer and model folders run their own code.
        sampler: sample from this one, whatever `model` says; it stays the caller's to close.

    Raises (from a row's task, so that the row fails and not the run):
        ValueError: wrong completion_params, tokenizer or messages.
        RolloutError: too few completions survived.
    """

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        drop_trailing_assistant_messages: bool = True,
        split_reasoning: bool = True,
        min_completions: int = 1,
        logprobs_mode: LogprobsMode | None = None,
        retry: RetryPolicy | None = None,
        trust_remote_code: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        if min_completions < 1:
            raise ValueError(f"min_completions must be at least 1, got {min_completions}")
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.drop_trailing_assistant_messages = drop_trailing_assistant_messages
        self.split_reasoning = split_reasoning
        self.min_completions = min_completions
        self.logprobs_mode: LogprobsMode | None = logprobs_mode
        self.retry = retry or RetryPolicy()
        self.trust_remote_code = trust_remote_code
        self.sampler = sampler
        self._wrapped: LoadedTokenizer | None = None
        # Weak keys: a loop that died without acleanup() takes its state with it.
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(
        self, rows: list[EvaluationRow], config: RolloutProcessorConfig
    ) -> list[asyncio.Task[EvaluationRow]]:
        """Start one task per row, in row order."""
        state = self._loops.setdefault(asyncio.get_running_loop(), _LoopState())
        admission = asyncio.Semaphore(ROWS_AHEAD)
        tasks = []
        for row in rows:
            # Eval Protocol puts the user's own dict on the row; a key in it must not stay there.
            row.input_metadata.completion_params = redact_params(
                row.input_metadata.completion_params
            )
            run = _run_number(state, row)
            task = asyncio.create_task(self._rollout(row, config, state, admission, run))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)
            tasks.append(task)
        return tasks

    async def acleanup(self) -> None:
        """End what still runs in this loop, then close and forget its clients. Idempotent, and
        nothing but unclosed sockets is lost if it is never called."""
        state = self._loops.pop(asyncio.get_running_loop(), None)
        if state is None:
            return
        # Eval Protocol calls this with rollouts in flight when an evaluator raises.
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sampler in state.samplers.values():
            await sampler.aclose()

    async def _rollout(
        self,
        row: EvaluationRow,
        config: RolloutProcessorConfig,
        state: _LoopState,
        admission: asyncio.Semaphore,
        run: int,
    ) -> EvaluationRow:
        async with _Ticket(admission) as ticket:
            request = self._request(config)
            sampler, tokenizer = await self._backend(request, state)
            messages = list(row.messages)
            while self.drop_trailing_assistant_messages and messages:
                if messages[-1].role != "assistant":
                    break
                messages.pop()
            prompt = self._render(row, messages, tokenizer, request)
            began_at, began = time.time(), time.perf_counter()
            base_seed = secrets.randbits(31) if request.seed is None else request.seed
            row_key = row.input_metadata.row_id or prompt.json.decode()
            ticket.good_for(request.n)
            group = await sample_group(
                sampler,
                prompt,
                request.params,
                seeds=[derive_seed(base_seed, row_key, i, run=run) for i in range(request.n)],
                slots=config.semaphore,
                retry=self.retry,
                on_start=ticket.used,
            )
        self._require_survivors(row, request, group)
        commit_group(
            row,
            group,
            messages=messages,
            prompt=prompt,
            request=replace(request, seed=base_seed),
            tokenizer=tokenizer,
            split_reasoning=self.split_reasoning,
            began_at=began_at,
            seconds=time.perf_counter() - began,
        )
        return row

    def _request(self, config: RolloutProcessorConfig) -> RolloutRequest:
        request = parse_completion_params(config.completion_params)
        if request.params.logprobs_mode is None and self.logprobs_mode is not None:
            params = replace(request.params, logprobs_mode=self.logprobs_mode)
            request = replace(request, params=params)
        kwargs = {**self.chat_template_kwargs, **request.chat_template_kwargs}
        if request.n < self.min_completions:
            raise ValueError(
                f"completion_params['n'] is {request.n}, less than min_completions="
                f"{self.min_completions}"
            )
        return replace(request, chat_template_kwargs=kwargs)

    async def _backend(
        self, request: RolloutRequest, state: _LoopState
    ) -> tuple[Sampler, LoadedTokenizer]:
        """Sampler and tokenizer for a request. Weights and tokenizers load in a thread."""
        sampler: Sampler
        own_tokenizer: Any = None
        if self.sampler is not None:
            sampler, own_tokenizer = self.sampler, getattr(self.sampler, "tokenizer", None)
        elif request.endpoint is None:
            from eval_protocol_rft.sampling.local import load_local_sampler

            local = await asyncio.to_thread(
                load_local_sampler,
                request.params.model.removeprefix(LOCAL_PREFIX),
                trust_remote_code=self.trust_remote_code,
            )
            sampler, own_tokenizer = local, local.tokenizer
        else:
            if request.endpoint not in state.samplers:
                state.samplers[request.endpoint] = HttpSampler(request.endpoint)
            sampler = state.samplers[request.endpoint]
        return sampler, await self._tokenizer_for(request, own_tokenizer)

    async def _tokenizer_for(self, request: RolloutRequest, own: Any) -> LoadedTokenizer:
        chosen = request.tokenizer or self.tokenizer or own
        if chosen is None:
            if request.params.model.startswith("accounts/"):
                raise TokenizerError(
                    f"model {request.params.model!r} names no tokenizer: give the base model's, "
                    'as completion_params["tokenizer"] = "Qwen/Qwen3-8B" or '
                    "FireworksTrainingRolloutProcessor(tokenizer=...)"
                )
            chosen = request.params.model
        if isinstance(chosen, str):
            return await asyncio.to_thread(
                load_tokenizer, chosen, trust_remote_code=self.trust_remote_code
            )
        if self._wrapped is None or self._wrapped.tokenizer is not chosen:
            self._wrapped = LoadedTokenizer.wrap(chosen)
        return self._wrapped

    def _render(
        self,
        row: EvaluationRow,
        messages: list[Any],
        tokenizer: LoadedTokenizer,
        request: RolloutRequest,
    ) -> TokenIds:
        try:
            return render_prompt(messages, row.tools, tokenizer, request.chat_template_kwargs)
        except PromptError as error:
            raise PromptError(f"row {row.input_metadata.row_id}: {error}") from error

    def _require_survivors(self, row: EvaluationRow, request: RolloutRequest, group: Group) -> None:
        if len(group.survivors) >= self.min_completions:
            return
        first = group.failures[0]
        raise RolloutError(
            f"row {row.input_metadata.row_id}: {len(group.survivors)} of {request.n} completions "
            f"survived, {self.min_completions} are needed; completion {first.index} failed "
            f"({first.kind}, {first.attempts} attempts): {first.message}"
        )


class _Ticket:
    """A row's place among those that are rendered and wait for slots. It is handed back once all of
    the row's completions have started, so that the next row is ready when a slot comes free."""

    def __init__(self, admission: asyncio.Semaphore) -> None:
        self._admission = admission
        self._unused = 1
        self._held = False

    async def __aenter__(self) -> _Ticket:
        await self._admission.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_back()

    def good_for(self, n: int) -> None:
        self._unused = n

    def used(self) -> None:
        self._unused -= 1
        if self._unused == 0:
            self._give_back()

    def _give_back(self) -> None:
        if self._held:
            self._held = False
            self._admission.release()


def _run_number(state: _LoopState, row: EvaluationRow) -> int:
    """Which repetition of its row this is (`num_runs`). The priority scheduler says so; otherwise
    count the rollout ids seen for the row, which a retry of Eval Protocol keeps."""
    metadata = row.execution_metadata
    index = (metadata.extra or {}).get("run_index")
    if isinstance(index, int):
        return index
    seen = state.runs.setdefault((metadata.experiment_id, row.input_metadata.row_id), [])
    if metadata.rollout_id not in seen:
        seen.append(metadata.rollout_id)
    return seen.index(metadata.rollout_id)
