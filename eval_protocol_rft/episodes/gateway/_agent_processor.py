"""`AgentRolloutProcessor`: an `EvaluationRow` in, the same row with n rollouts of an agent, whose
model calls went through the gateway.

Invariant: as for episodes: a row is changed in one step or not at all, and a rollout keeps its
place and its seeds. What an agent sampled before it failed is kept, with its stop reason; where the
model could not be sampled the rollout is a failure, whatever the agent made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.rollout_processor import RolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes._alive import AliveScorer, score_alive
from eval_protocol_rft.episodes._turns import OnRewrite
from eval_protocol_rft.episodes.gateway import _agents as agents
from eval_protocol_rft.episodes.gateway._rows import put_on_row
from eval_protocol_rft.episodes.gateway._server import Gateway
from eval_protocol_rft.episodes.gateway._session import Sample, Session
from eval_protocol_rft.episodes.gateway._settings import (
    PINNABLE,
    SessionLimits,
    SessionSettings,
    Shared,
)
from eval_protocol_rft.episodes.gateway._trajectory import SessionRecord


class AgentRolloutProcessor(rollout.FireworksTrainingRolloutProcessor):
    """Runs an agent n times per row, in any framework or language, through a gateway that keeps its
    model calls exact to the token.

    Args:
        agent: a function of `(row, session)`, `async` or not, which is given `session.base_url`,
            `session.api_key`, `session.openai()` and `session.anthropic()`; or a command line
            (`["node", "agent.mjs"]`, or a `Command`); or a rollout processor of Eval Protocol's,
            which is run as it is.
        limits: how long a session may get; `seconds` is also what the agent may take in all.
        on_rewrite: what to do where the chat template renders earlier turns anew: `split` begins a
            new segment with the same reward, `reject` refuses the call.
        shared: tokens that several branches of a session have are trained in the `first`, in
            `each`, or the branch with the most sampled tokens alone is trained (`longest`).
        on_other_sampling: what to do with a call that asks for another temperature, top_p or top_k
            than the completion_params say: `override` it, on record, or `refuse` it.
        score: an evaluator of `row` that scores each rollout as soon as its agent has ended, while
            what it worked in is still there: `extra["episode"]["metrics"]["folder"]` of a command.
        strict: refuse what cannot be honoured exactly (`tool_choice: "required"`, strict schemas,
            `response_format` without guided decoding); else it is let through, on record.
        guided_decoding: whether the engine keeps to `response_format`; None: Fireworks does.
        **options: as for `FireworksTrainingRolloutProcessor`; over-sampling and straggler deadlines
            are not for agents.

    Of each rollout the record holds what an episode's does (`trajectories`, `episodes`), with what
    its client changed, and what was not honoured, in `episodes[i].metrics`.
    """

    has_environments = True
    takes_raw = False

    def __init__(
        self,
        agent: Any,
        *,
        limits: SessionLimits | None = None,
        on_rewrite: OnRewrite = "split",
        shared: Shared = "first",
        score: Callable[..., Any] | None = None,
        on_other_sampling: Literal["override", "refuse"] = "override",
        strict: bool = False,
        guided_decoding: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.stragglers:
            raise ValueError("over_sample and straggler_seconds are not for agents")
        is_command = isinstance(agent, Sequence) and not isinstance(agent, str)
        self.agent = agents.Command(agent) if is_command else agent
        self.guided_decoding = guided_decoding
        self.score = None if score is None else AliveScorer(score)
        self._settings = SessionSettings(
            params=sampling.SamplingParams(model=""),
            on_other_sampling=on_other_sampling,
            strict=strict,
            on_rewrite=on_rewrite,
            shared=shared,
            split_reasoning=self.split_reasoning,
            limits=limits or SessionLimits(),
        )
        agents.runner_of(self.agent, _NO_CONFIG, "")  # said at once where it is none

    async def _roll_out(
        self,
        row: EvaluationRow,
        messages: list[Message],
        config: RolloutProcessorConfig,
        state: rollout.LoopState,
        rows_ahead: asyncio.Semaphore,
        run: int | str,
    ) -> EvaluationRow:
        if rollout.prompt_ids_of(row) is not None:
            raise rollout.PromptError(
                f"row {row.input_metadata.row_id}: it brings its prompt as "
                f"{rollout.PROMPT_IDS_KEY}, and an agent sends messages: give the row messages"
            )
        async with rollout.RowSlot(rows_ahead) as row_slot:
            job = await self._prepare(row, messages, config, state, run)
            row_slot.expect(len(job.seeds))
            gateway = await _gateway_of(state, job)
            settings = self._settings_of(job)
            outcomes = await rollout.all_rollouts(
                self._run_agent(row, job, config, gateway, settings, index, row_slot)
                for index in range(len(job.seeds))
            )
        sessions = [outcome for outcome in outcomes if isinstance(outcome, SessionRecord)]
        group = sampling.Group(
            survivors=[done.first for done in sessions if done.first is not None],
            failures=[outcome for outcome in outcomes if isinstance(outcome, sampling.Failure)],
        )
        self._require_survivors(row, job.request, group)
        put_on_row(
            row,
            group,
            sessions,
            request=job.request,
            tokenizer=job.tokenizer,
            asked=job.messages,
            split_reasoning=self.split_reasoning,
            began_at=job.began_at,
            seconds=time.perf_counter() - job.began,
        )
        return row

    def _request(self, config: RolloutProcessorConfig) -> rollout.RolloutRequest:
        if self._processor is not None:
            # These are its own.
            steps, kwargs = rollout.DEFAULT_STEPS, dict[str, Any]()
            config = replace(
                config, mcp_config_path="", server_script_path=None, steps=steps, kwargs=kwargs
            )
        return super()._request(config)

    @property
    def _processor(self) -> RolloutProcessor | None:
        """The agent, where it is a rollout processor of Eval Protocol's."""
        return self.agent if isinstance(self.agent, RolloutProcessor) else None

    def setup(self) -> None:
        """As Eval Protocol calls it once before a run."""
        super().setup()
        if self._processor is not None:
            self._processor.setup()

    async def acleanup(self) -> None:
        """End what still runs in this loop, and close what is open."""
        await super().acleanup()
        if self._processor is not None:
            await self._processor.acleanup()

    def cleanup(self) -> None:
        """Begin to close what is open in this loop."""
        super().cleanup()
        if self._processor is not None:
            self._processor.cleanup()

    def _settings_of(self, job: rollout.RowJob) -> SessionSettings:
        endpoint = job.request.endpoint
        guided = self.guided_decoding
        return replace(
            self._settings,
            params=job.request.params,
            pinned=frozenset(PINNABLE),  # the policy is trained as it is sampled
            guided_decoding=bool(endpoint and endpoint.is_fireworks) if guided is None else guided,
            template_kwargs=job.request.chat_template_kwargs,
            context_length=getattr(job.sampler, "context_length", None),
        )

    async def _run_agent(
        self,
        row: EvaluationRow,
        job: rollout.RowJob,
        config: RolloutProcessorConfig,
        gateway: Gateway,
        settings: SessionSettings,
        index: int,
        row_slot: rollout.RowSlot,
    ) -> SessionRecord | sampling.Failure:
        # Both: a caller's rollouts may all have one id, and its runs numbers given twice.
        rollout_id = f"{row.execution_metadata.rollout_id or ''}\0{job.run}"
        salt = hashlib.blake2b(f"{job.row_key}\0{rollout_id}\0{index}".encode(), digest_size=8)
        async with config.semaphore:
            row_slot.started()
            session = gateway.session(
                f"row {row.input_metadata.row_id}, rollout {index}",
                settings=settings,
                sample=self._sample_of(job, index),
                seed=job.seeds[index],
                salt=salt.hexdigest(),
            )
            shown = row.model_copy(deep=True)
            shown.messages = [message.model_copy(deep=True) for message in job.messages]
            run = agents.runner_of(self.agent, config, settings.params.model)
            began = time.perf_counter()

            async def finish(outcome: agents.Outcome) -> SessionRecord | sampling.Failure:
                await session.end()
                result = _result(session, outcome, index, time.perf_counter() - began)
                if self.score is None or isinstance(result, sampling.Failure):
                    return result
                record = await score_alive(
                    self.score,
                    self.score.name,
                    row,
                    index,
                    result.record,
                    seconds=settings.limits.seconds,
                )
                return replace(result, record=record)

            try:
                result: SessionRecord | sampling.Failure = await run(
                    shown, session, settings.limits.seconds, finish
                )
                return result
            finally:
                await session.end()

    def _sample_of(self, job: rollout.RowJob, index: int) -> Sample:
        async def sample(
            ids: sampling.TokenIds, params: sampling.SamplingParams, seed: int | None
        ) -> sampling.Survivor | sampling.Failure:
            return await sampling.sample_one(
                job.sampler,
                ids,
                params,
                index=index,
                seed=seed,
                slots=contextlib.nullcontext(),  # the rollout's slot holds for its requests
                retry=self.retry,
                limiter=job.limiter,
                prompt=job.row_key,
                observe=rollout.observe_attempt,
                read=lambda completion: job.tokenizer.read(completion, params, job.witness.look),
            )

        return sample


_NO_CONFIG: Any = object()
"""For looking at an agent that is not run."""


async def _gateway_of(state: rollout.LoopState, job: rollout.RowJob) -> Gateway:
    """The gateway of this event loop for the job's tokenizer; it closes with the loop's clients."""
    key = ("gateway", id(job.tokenizer.tokenizer))
    if key not in state.services:
        state.services[key] = Gateway(job.sampler, job.tokenizer)
        state.services[key].starting = asyncio.ensure_future(state.services[key].start())
    gateway: Gateway = state.services[key]
    assert gateway.starting is not None  # noqa: S101 - it was made here
    try:
        await asyncio.shield(gateway.starting)
    except OSError:
        if state.services.pop(key, None) is gateway:  # the next row tries again
            await gateway.aclose()
        raise
    return gateway


def _result(
    session: Session, outcome: agents.Outcome, index: int, seconds: float
) -> SessionRecord | sampling.Failure:
    outcome = _without_keys(outcome, session)
    reason = "seconds" if outcome.is_late else "done" if outcome.error is None else "crashed"
    done = session.record(reason)
    if done.failure is not None:
        return replace(done.failure, index=index)
    if done.first is None:
        what = (
            f"the agent took longer than {seconds:.0f} s and made no model call"
            if outcome.is_late
            else outcome.error
            or "the agent ended without a model call that was answered: does it use the base URL "
            "and the key that it is given (session.base_url, OPENAI_BASE_URL, ...)?"
        )
        message = f"{what}{_output(outcome.metrics)}"
        return sampling.Failure(
            index=index, kind="internal", message=message, attempts=0, seconds=seconds
        )
    told = {**done.record.metrics, **outcome.metrics}
    if outcome.error is not None:
        told["agent_error"] = outcome.error
    return replace(
        done,
        record=msgspec.structs.replace(done.record, metrics=told),
        first=replace(done.first, index=index),
    )


def _without_keys(outcome: agents.Outcome, session: Session) -> agents.Outcome:
    """What an agent said, without the keys that it was given: errors of clients hold them."""
    told = json.dumps([outcome.error, dict(outcome.metrics)])
    for key in (session.api_key, session.shared_key):
        told = told.replace(key, "[key]") if key else told
    error, metrics = json.loads(told)
    return replace(outcome, error=error, metrics=metrics)


def _output(metrics: Mapping[str, Any]) -> str:
    output = str(metrics.get("output") or "").strip()
    return f"; it printed: {output[-500:]}" if output else ""
