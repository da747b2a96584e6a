"""`EpisodeRolloutProcessor`: an `EvaluationRow` in, the same row with n episodes of several turns.

Invariant: as for single completions: a row is changed in one step or not at all, an episode keeps
its place and its seeds, and one that cannot be had is a failure. Episodes run independently, and as
many at once as Eval Protocol allows rollouts: one holds a slot from before its environment is made
until that is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from eval_protocol.models import EvaluationRow, Message
from eval_protocol.pytest.types import RolloutProcessorConfig

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes._alive import AliveScorer, alive_score
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits
from eval_protocol_rft.episodes._episode import Episode, Episodes, group_seed
from eval_protocol_rft.episodes._tool_loop import with_mcp
from eval_protocol_rft.episodes._turns import OnRewrite
from eval_protocol_rft.record import UNSCORED


class EpisodeRolloutProcessor(rollout.FireworksTrainingRolloutProcessor):
    """Runs n independent episodes per row against an environment, exact to the token.

    Args:
        environment: makes an environment, for each episode its own: a class, or a function of
            nothing. None: a `ToolLoop` with the servers of the evaluation test's `mcp_config_path`;
            one that makes a `ToolLoop` gets them too.
        limits: how long an episode may get.
        on_rewrite: what to do where the chat template renders earlier turns anew once more is said:
            `split` begins a new segment with the same reward, `reject` fails the episode. See
            `template_report` for what a template does.
        score: an evaluator of `row` that scores each episode while its environment is alive, in
            place of the environment's own `score`.
        **options: as for `FireworksTrainingRolloutProcessor`; over-sampling and straggler deadlines
            are not for episodes.

    The record holds `trajectories` (segments with tokens, logprobs and loss mask) and `episodes`
    (turns, stop reason, step rewards, messages), and of each episode the first turn where a single
    completion would be. The row's messages are those of the first episode.
    """

    has_environments = True
    takes_mcp = True
    takes_raw = False

    def __init__(
        self,
        environment: Callable[[], Environment] | None = None,
        *,
        limits: EpisodeLimits | None = None,
        on_rewrite: OnRewrite = "split",
        score: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        if on_rewrite not in ("split", "reject"):
            raise ValueError(f"on_rewrite must be 'split' or 'reject', not {on_rewrite!r}")
        super().__init__(**options)
        if self.stragglers:
            raise ValueError("over_sample and straggler_seconds are not for episodes")
        self.environment = environment
        self.limits = limits or EpisodeLimits()
        self.on_rewrite: OnRewrite = on_rewrite
        self.score = None if score is None else AliveScorer(score)

    def world(self, mcp_config_path: str | None) -> Callable[[], Environment]:
        """What makes environments, under an evaluation test with this `mcp_config_path`.

        Raises:
            ValueError: there is nothing that does.
        """
        if mcp_config_path:
            return with_mcp(self.environment, mcp_config_path)
        if self.environment is None:
            raise ValueError(
                "EpisodeRolloutProcessor() has no environment: name one, or MCP servers as "
                "@evaluation_test(mcp_config_path=...)"
            )
        return self.environment

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
                f"{rollout.PROMPT_IDS_KEY}, and an episode renders its turns from messages: give "
                "the row messages"
            )
        async with rollout.RowSlot(rows_ahead) as row_slot:
            job = await self._prepare(row, messages, config, state, run)
            row_slot.expect(len(job.seeds))
            of_row = Episodes(
                row,
                job.messages,
                job.tokenizer,
                job.request.chat_template_kwargs,
                environment=self.world(config.mcp_config_path),
                params=job.request.params,
                limits=self.limits,
                on_rewrite=self.on_rewrite,
                context_length=getattr(job.sampler, "context_length", None),
                score=self.score,
                group_seed=group_seed(job.request.seed, job.row_key, job.run),
                split_reasoning=self.split_reasoning,
            )
            outcomes = await rollout.all_rollouts(
                self._episode(of_row, job, config, index, row_slot)
                for index in range(len(job.seeds))
            )
        episodes = [outcome for outcome in outcomes if isinstance(outcome, Episode)]
        group = sampling.Group(
            survivors=[episode.first for episode in episodes],
            failures=[outcome for outcome in outcomes if isinstance(outcome, sampling.Failure)],
        )
        self._require_survivors(row, job.request, group)
        _require_one_prompt(row, episodes)
        self._commit(row, job, group, episodes)
        return row

    def _commit(
        self,
        row: EvaluationRow,
        job: rollout.RowJob,
        group: sampling.Group,
        episodes: Sequence[Episode],
    ) -> None:
        """Put episodes on their row; `group` holds the first turn of each. The row's messages
        become those of the first episode."""
        first = episodes[0]
        record = rollout.build_record(
            group,
            first.first_prompt,
            job.request,
            job.tokenizer,
            reader=None,
            asked=row.messages,
            split_reasoning=self.split_reasoning,
            began_at=job.began_at,
        )
        record = msgspec.structs.replace(
            record,
            trajectories=[episode.segments for episode in episodes],
            episodes=[episode.record for episode in episodes],
            token_turn_traces=first.talk.turns(),
        )
        alive = [alive_score(episode.record) for episode in episodes]
        if any(score is not None for score in alive):
            scores = [score or UNSCORED for score in alive]
            record = msgspec.structs.replace(
                record, rewards=[score.reward for score in scores], completion_results=scores
            )
        messages = [Message(**{"content": None, **m}) for m in first.record.messages]
        row.tools = None if first.tools is None else [dict(tool) for tool in first.tools]
        rollout.put_on_row(
            row,
            record,
            messages,
            prompt_tokens=sum(episode.talk.sent_tokens for episode in episodes),
            completion_tokens=sum(episode.sampled_tokens for episode in episodes),
            finish_reason=first.record.last_finish_reason,
            tool_calls=sum(len(message.tool_calls or []) for message in messages),
            seconds=time.perf_counter() - job.began,
        )

    async def _episode(
        self,
        of_row: Episodes,
        job: rollout.RowJob,
        config: RolloutProcessorConfig,
        index: int,
        row_slot: rollout.RowSlot,
    ) -> Episode | sampling.Failure:
        # Both: a caller's rollouts may all have one id, and its runs numbers given twice.
        rollout_id = f"{of_row.row.execution_metadata.rollout_id or ''}\0{job.run}"
        session = hashlib.blake2b(f"{job.row_key}\0{rollout_id}\0{index}".encode(), digest_size=8)

        async def sample(
            turn: int,
            prompt: sampling.TokenIds,
            params: sampling.SamplingParams,
            seed: int | None,
            on_start: Callable[[], None],
        ) -> sampling.Survivor | sampling.Failure:
            def starts() -> None:
                if not turn:
                    row_slot.started()
                on_start()

            return await sampling.sample_one(
                job.sampler,
                prompt,
                params,
                index=index,
                seed=seed,
                slots=contextlib.nullcontext(),  # the episode's slot holds for its requests
                retry=self.retry,
                limiter=job.limiter,
                prompt=job.row_key,
                observe=rollout.observe_attempt,
                on_start=starts,
                read=lambda completion: job.tokenizer.read(completion, params, job.witness.look),
            )

        async with config.semaphore:
            return await of_row.run(
                index, seed=job.seeds[index], session=session.hexdigest(), sample=sample
            )


def _require_one_prompt(row: EvaluationRow, episodes: list[Episode]) -> None:
    """The completions of a row are compared, so they must answer one prompt."""
    first = episodes[0].first_prompt
    for episode in episodes[1:]:
        if episode.first_prompt != first:
            raise rollout.RolloutError(
                f"row {row.input_metadata.row_id}: reset() said different things in episodes "
                f"{episodes[0].first.index} and {episode.first.index}; what differs between "
                "episodes of a row must come after the first turn"
            )
