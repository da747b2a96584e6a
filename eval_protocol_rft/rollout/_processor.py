"""`FireworksTrainingRolloutProcessor`: an `EvaluationRow` in, the same row with n exact
completions out.

Invariant: a row is changed in one step, after everything for it succeeded, or not at all. One task
per row, in row order, as Eval Protocol matches them by position.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft import sampling
from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft.local import Placement, TokenizerError
from eval_protocol_rft.local.engine import Engine, VllmOptions
from eval_protocol_rft.rollout import _evaluation_run, _loop_states, _params, _prompts
from eval_protocol_rft.rollout._backends import Backends
from eval_protocol_rft.rollout._commit import commit_group, messages_to_answer, redact_params
from eval_protocol_rft.rollout._loop_states import LoopState, LoopStates, RowJob
from eval_protocol_rft.rollout._replaced_params import REPLACED, is_replacement
from eval_protocol_rft.rollout._vocabulary import VocabularyWitness
from eval_protocol_rft.sampling import LogprobsMode, RetryPolicy, Sampler

logger = logging.getLogger(__name__)


class RolloutError(EvalProtocolRftError, RuntimeError):
    """A row got fewer completions than `min_completions`, or something of the caller's failed. A
    RuntimeError on purpose: Eval Protocol does not resample the whole row on those."""

    def __init__(self, message: str, *, failures: Sequence[sampling.Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)
        """What became of the completions that failed."""

    @property
    def status(self) -> int | None:
        """HTTP status of the first failure; what recipes tell a passing trouble by."""
        return self.failures[0].status if self.failures else None


class FireworksTrainingRolloutProcessor(RolloutProcessor):
    """Samples n completions per row and leaves token ids, sampling logprobs and text on it.

    Give it to `@evaluation_test(rollout_processor=...)`. What to sample comes from
    `completion_params`, read anew on every call: `model` (`local/...` samples in this process,
    `vllm/...` with an engine that it starts, everything else over HTTP), `n`, `temperature`,
    `max_tokens`, `top_p`, `top_k`, `stop`, `seed`, `api_base`, `tokenizer`, `raw`, `chat_template`,
    ... (see docs/processor.md).

    Args:
        tokenizer: folder or hub id, or a tokenizer object, that renders the prompts; for several
            models of one evaluation test a mapping from their names to these. Default: the local
            model's own, or the one that `model` names on the hub.
        chat_template_kwargs: passed to the chat template (`enable_thinking=False`, ...).
        drop_trailing_assistant_messages: sample an answer to the last message that is not the
            assistant's.
        split_reasoning: put thinking into `Message.reasoning_content`.
        min_completions: a row with fewer survivors is an error; the default keeps what there is.
        logprobs_mode: what a server that sends one unnamed logprob per token means by it:
            "processed_logprobs" if vLLM runs with `--logprobs-mode processed_logprobs`. It is
            checked with a few requests of one token before the first completion, where a wrong word
            would give wrong logprobs.
        retry: budget of attempts per completion.
        over_sample: k: ask for n + k completions, keep the first n that survive and cancel the
            others, which the server then stops to generate. Favours short completions.
        straggler_seconds: deadline of a row's completions, from its first request on: what has not
            ended by then is cancelled and becomes a failure of kind `cancelled`. Favours short
            completions.
        trust_remote_code: let tokenizer and model folders run their own code.
        placement: device and dtype of a `local/...` model, see `local.Placement`.
        vllm: options of the engines that models `vllm/...` are sampled with.
        sampler: sample from this one, whatever `model` says; it stays the caller's to close.

    Raises (from a row's task, so that the row fails and not the run):
        ValueError: wrong completion_params, tokenizer or messages.
        RolloutError: too few completions survived.
        RunStoppedError: the server refuses every request, or answers none for half an hour; its
            logprobs are not what `logprobs_mode` says, or its texts not what the tokenizer reads in
            its ids. No further row asks it.
    """

    has_environments = False
    """Whether a rollout holds more than requests: what runs at once is bounded by the user's word
    even where the sampler has a queue of its own."""

    takes_raw = True
    """Whether a prompt may be raw text: not where several turns are rendered."""

    takes_mcp = False
    """Whether `mcp_config_path` of `@evaluation_test` is for it."""

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
        over_sample: int = 0,
        straggler_seconds: float | None = None,
        trust_remote_code: bool = False,
        placement: Placement | None = None,
        vllm: VllmOptions | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        if min_completions < 1:
            raise ValueError(f"min_completions must be at least 1, got {min_completions}")
        self.chat_template_kwargs = _params.template_values(chat_template_kwargs or {})
        self.drop_trailing_assistant_messages = drop_trailing_assistant_messages
        self.split_reasoning = split_reasoning
        self.min_completions = min_completions
        self.logprobs_mode: LogprobsMode | None = logprobs_mode
        self.retry = retry or RetryPolicy()
        self.stragglers = sampling.StragglerPolicy(
            over_sample=over_sample, straggler_seconds=straggler_seconds
        )
        self._backends = Backends(
            tokenizer=tokenizer,
            sampler=sampler,
            trust_remote_code=trust_remote_code,
            placement=placement,
            vllm=vllm,
        )
        self._states = LoopStates()
        self._runs = _evaluation_run.RunNames()
        self._first_requests: dict[tuple[str | None, str], _params.RolloutRequest] = {}
        """Of each evaluation test, the first that took the argument `tokenizer`."""
        self._told_keywords: set[str] = set()

    def __call__(
        self, rows: list[EvaluationRow], config: RolloutProcessorConfig
    ) -> list[asyncio.Task[EvaluationRow]]:
        """Start one task per row, in row order."""
        state, evaluation = self._states.current(), _evaluation_run.watched()
        rows_ahead = asyncio.Semaphore(_loop_states.ROWS_AHEAD)
        tasks = []
        for row in rows:
            # Eval Protocol puts the user's own dict on the row; a key in it must not stay there.
            row.input_metadata.completion_params = redact_params(
                row.input_metadata.completion_params or {}
            )
            task = asyncio.create_task(self._rollout(row, config, state, rows_ahead))
            self._states.started(state, task)
            if evaluation is not None:
                evaluation.started(row, task)
            tasks.append(task)
        return tasks

    def sampling_from(self, sampler: Sampler) -> FireworksTrainingRolloutProcessor:
        """This processor, but for what it samples from; `sampler` stays the caller's to close."""
        other = copy.copy(self)
        other._backends = self._backends.sampling_from(sampler)
        other._states = LoopStates()
        other._runs = _evaluation_run.RunNames()
        return other

    def with_engine(self, engine: Engine) -> FireworksTrainingRolloutProcessor:
        """This processor, with an engine of the caller's for what vLLM samples."""
        other = copy.copy(self)
        other._backends = self._backends.with_engine(engine)
        other._states = LoopStates()
        other._runs = _evaluation_run.RunNames()
        return other

    async def acleanup(self) -> None:
        """End what still runs in this loop, then close and forget its clients. Idempotent, and
        nothing but unclosed sockets is lost if it is never called. Where Eval Protocol calls it
        after each of several runs, it ends the rollouts of the caller's own, and the last closes.
        """
        await self._states.end(self._runs.forget_rollouts)

    def cleanup(self) -> None:
        """Begin to close what is open in this loop, or where rollouts run, once the last of them
        has ended. The oldest versions of Eval Protocol call nothing else."""
        self._states.end_when_idle()

    async def _rollout(
        self,
        row: EvaluationRow,
        config: RolloutProcessorConfig,
        state: LoopState,
        rows_ahead: asyncio.Semaphore,
    ) -> EvaluationRow:
        """Roll out one row; what is raised is a ValueError or a RuntimeError."""
        try:
            # Before anything is waited for: tasks start in the order of rows and calls.
            messages = messages_to_answer(
                row, drop_trailing_assistant=self.drop_trailing_assistant_messages
            )
            run = self._runs.of(row, messages, config)
            return await self._roll_out(row, messages, config, state, rows_ahead, run)
        except Exception as error:
            if isinstance(error, ValueError | RuntimeError) and not isinstance(error, OSError):
                raise
            # From a sampler or tokenizer of the caller's. As it is, it could be one of those for
            # which Eval Protocol runs the whole row up to four times.
            raise RolloutError(
                f"row {row.input_metadata.row_id}: {type(error).__name__}: {error}"
            ) from error

    async def _roll_out(
        self,
        row: EvaluationRow,
        messages: list[Message],
        config: RolloutProcessorConfig,
        state: LoopState,
        rows_ahead: asyncio.Semaphore,
        run: int | str,
    ) -> EvaluationRow:
        async with _loop_states.RowSlot(rows_ahead) as row_slot:
            job = await self._prepare(row, messages, config, state, run)
            prompt = self._render(row, job)
            row_slot.expect(len(job.seeds))
            group = await sampling.sample_group(
                job.sampler,
                prompt,
                job.request.params,
                seeds=job.seeds,
                slots=config.semaphore,
                retry=self.retry,
                limiter=job.limiter,
                prompt=job.row_key,
                observe=_evaluation_run.observe_attempt,
                on_start=row_slot.started,
                stragglers=self.stragglers,
                read=lambda completion: job.tokenizer.read(
                    completion, job.request.params, job.witness.look
                ),
            )
        job.witness.require_fit()
        self._require_survivors(row, job.request, group)
        commit_group(
            row,
            group,
            messages=job.messages,
            prompt=prompt,
            request=job.request,
            tokenizer=job.tokenizer,
            split_reasoning=self.split_reasoning,
            began_at=job.began_at,
            seconds=time.perf_counter() - job.began,
            stragglers=self.stragglers,
        )
        return row

    async def _prepare(
        self,
        row: EvaluationRow,
        messages: list[Message],
        config: RolloutProcessorConfig,
        state: LoopState,
        run: int | str,
    ) -> RowJob:
        """Everything that is known before the first request for a row."""
        request = self._request(config)
        self._refuse_shared_tokenizer(row, request)
        request = await self._backends.placed(request)
        try:
            sampler, tokenizer = await self._backends.resolve(request, state.clients)
        except TokenizerError as error:
            if request.tokenizer is None and is_replacement(config.completion_params):
                raise TokenizerError(f"{error} ({REPLACED})") from error
            raise
        began_at, began = time.time(), time.perf_counter()
        if request.seed is None and self._backends.seeds_are_free(request):
            # Of this call alone: given again, it draws this again.
            request, run = replace(request, seed=secrets.randbits(31)), 0
        job = RowJob(
            request=request,
            sampler=sampler,
            tokenizer=tokenizer,
            messages=messages,
            limiter=state.limiters.setdefault(
                request.endpoint, sampling.RunLimiter(patience_seconds=self.retry.max_seconds)
            ),
            witness=state.witnesses.setdefault(
                (request.endpoint, request.params.model, tokenizer.name), VocabularyWitness()
            ),
            began_at=began_at,
            began=began,
            run=run,
        )
        job.witness.require_fit()
        if (evaluation := _evaluation_run.watched()) is not None:
            evaluation.compared(job.witness)
        await state.check_logprobs(job, slots=config.semaphore, retry=self.retry)
        row_key = row.input_metadata.row_id or self._render(row, job).json.decode()
        asked = request.n + self.stragglers.over_sample
        seeds = sampling.derive_seeds(request.seed, row_key, asked, run=run)
        return replace(job, row_key=row_key, seeds=seeds)

    def _request(self, config: RolloutProcessorConfig) -> _params.RolloutRequest:
        _refuse_unused(
            mcp_config_path=None if self.takes_mcp else config.mcp_config_path,
            server_script_path=config.server_script_path,
            steps=config.steps,
        )
        self._tell_unused_keywords(config.kwargs or {})
        return self.request_of(config.completion_params)

    def _refuse_shared_tokenizer(self, row: EvaluationRow, request: _params.RolloutRequest) -> None:
        """Under pytest it is said before the first request. Outside of evaluation tests models with
        several names may be versions of one."""
        if row.eval_metadata is None or request.tokenizer is not None:
            return
        test = (row.execution_metadata.invocation_id, row.eval_metadata.name)
        first = self._first_requests.setdefault(test, request)
        if problem := self.tokenizer_problem([first, request]):
            raise _params.ParamsError(problem)

    def tokenizer_problem(self, requests: Sequence[_params.RolloutRequest]) -> str | None:
        """Why the argument `tokenizer` cannot stand for all models of an evaluation test that makes
        these requests; None where it can."""
        return self._backends.tokenizer_problem(requests)

    def _tell_unused_keywords(self, keywords: Mapping[str, Any]) -> None:
        """Eval Protocol puts keywords of its own beside the user's, so none is refused."""
        unused = (
            keywords.keys()
            - {_evaluation_run.RUN_KEYWORD, _evaluation_run.RETRY_KEYWORD}
            - self._told_keywords
        )
        self._told_keywords |= unused
        for keyword in sorted(unused):
            logger.warning(
                "rollout_processor_kwargs[%r] is not used by this rollout processor: its options "
                "are arguments of its own",
                keyword,
            )

    @property
    def names_tokenizer(self) -> bool:
        """Whether it was made with a tokenizer, for requests that name none."""
        return self._backends.names_tokenizer

    async def sampler_of(self, request: _params.RolloutRequest) -> Sampler:
        """What completions of `request` are sampled from in the running event loop; the
        processor's to close."""
        sampler, _ = await self._backends.resolve(request, self._states.current().clients)
        return sampler

    def request_of(self, completion_params: Mapping[str, Any] | None) -> _params.RolloutRequest:
        """completion_params, with what this processor was made with.

        Raises:
            ValueError: they are wrong.
        """
        request = _params.parse_completion_params(completion_params)
        if request.params.logprobs_mode is None and self.logprobs_mode is not None:
            params = replace(request.params, logprobs_mode=self.logprobs_mode)
            request = replace(request, params=params)
        if request.raw and not self.takes_raw:
            raise _params.ParamsError(
                f"completion_params['raw'] is not for {type(self).__name__}: a conversation of "
                "several turns needs a chat template: name one as chat_template (chatml), or leave "
                "raw out"
            )
        if request.raw and self.chat_template_kwargs:
            raise _params.ParamsError(
                "completion_params['raw'] sends prompts as plain text, and chat_template_kwargs of "
                "the processor would reach no chat template: leave out either"
            )
        kwargs = {**self.chat_template_kwargs, **request.chat_template_kwargs}
        if request.n < self.min_completions:
            raise ValueError(
                f"completion_params['n'] is {request.n}, less than min_completions="
                f"{self.min_completions}"
            )
        return replace(request, chat_template_kwargs=kwargs)

    def _render(self, row: EvaluationRow, job: RowJob) -> sampling.TokenIds:
        ids = _prompts.prompt_ids_of(row)
        try:
            if ids is not None:
                return _prompts.given_prompt(ids, job.tokenizer)
            chat = _prompts.chat_messages(job.messages, job.tokenizer)
            return _prompts.render_request(chat, row.tools, job.tokenizer, job.request)
        except _prompts.PromptError as error:
            raise _prompts.PromptError(f"row {row.input_metadata.row_id}: {error}") from error

    def _require_survivors(
        self, row: EvaluationRow, request: _params.RolloutRequest, group: sampling.Group
    ) -> None:
        if len(group.survivors) >= self.min_completions:
            return
        first = group.failures[0]
        raise RolloutError(
            f"row {row.input_metadata.row_id}: {len(group.survivors)} of {request.n} completions "
            f"survived, {self.min_completions} are needed; completion {first.index} failed "
            f"({first.kind}, {first.attempts} attempts): {first.message}",
            failures=group.failures,
        )


def _refuse_unused(
    *,
    mcp_config_path: str | None,
    server_script_path: str | None,
    steps: int,
) -> None:
    """Refuse what `@evaluation_test` hands to every rollout processor and this one has no use for.

    Raises:
        ParamsError: one of them is given; the message names it and what to do instead.
    """
    servers = {"mcp_config_path": mcp_config_path, "server_script_path": server_script_path}
    for name, value in servers.items():
        if value:
            raise _params.ParamsError(
                f"@evaluation_test({name}=...) is not used by this rollout processor, so the model "
                "would not have its tools: give EpisodeRolloutProcessor a ToolLoop with the tools "
                f"(it takes mcp_config_path too), or leave {name} away"
            )
    if steps not in (_params.SINGLE_STEP, _params.DEFAULT_STEPS):
        raise _params.ParamsError(
            f"@evaluation_test(steps={steps}) is not used by this rollout processor: bound the "
            "turns of an episode with EpisodeRolloutProcessor(limits=EpisodeLimits(turns=...)), or "
            "leave steps away"
        )
