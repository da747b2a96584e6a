"""One episode: turns of the model and of its environment, until one of them or a limit ends it.

Invariant: an episode that ends, however it ends, has all that was sampled in it, exactly as it was
sampled, and a stop reason. One that cannot be had (a request that fails for good, an environment
that raises or hangs, a history that the template rewrites under `reject`) is a `Failure`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.conversation import (
    AnswerReader,
    Conversation,
    ConversationError,
    OnRewrite,
    Openings,
)
from eval_protocol_rft.environments.checked import CheckedEnvironment
from eval_protocol_rft.environments.environment import Environment, EnvironmentFaultError, Step
from eval_protocol_rft.environments.limits import EpisodeLimits
from eval_protocol_rft.environments.transcript import Transcript, as_messages
from eval_protocol_rft.episodes import EpisodeRecord, SegmentRecord
from eval_protocol_rft.prompts import PromptError, as_message
from eval_protocol_rft.sampling.clock import Deadline, loop_clock, sampling_time
from eval_protocol_rft.sampling.fanout import Survivor
from eval_protocol_rft.sampling.types import Completion, Failure, SamplingParams, TokenIds

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

SampleTurn = Callable[
    [int, TokenIds, SamplingParams, Callable[[], None]], Awaitable[Survivor | Failure]
]
"""Turn number, prompt and parameters in, and what to call when the first request leaves; what came
of it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What became of one episode."""

    first: Survivor
    """Its first turn, with the attempts and seconds of all of them."""
    record: EpisodeRecord
    segments: list[SegmentRecord]
    talk: Conversation
    first_prompt: TokenIds
    sampled_tokens: int


@dataclass(slots=True, kw_only=True)
class EpisodeRun:
    """Runs one episode; `await run()` once."""

    index: int
    environment: Callable[[], Environment]
    """Makes it."""
    row: EvaluationRow
    messages: Sequence[Message]
    openings: Openings
    """Shared by the episodes of a row, which begin alike."""
    params: SamplingParams
    limits: EpisodeLimits
    context_length: int | None
    """The model's, where the sampler knows it."""
    on_rewrite: OnRewrite
    sample: SampleTurn
    split_reasoning: bool = True
    """Show thinking as `reasoning_content`, not in the content."""
    _began: float = field(default_factory=sampling_time)
    _deadline: float | None = None
    _waiting: Deadline | None = None
    _survivors: list[Survivor] = field(default_factory=list)
    _rewards: list[float | None] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    async def __call__(self) -> Episode | Failure:
        with loop_clock().runs():
            return await self._run_in_world()

    async def _run_in_world(self) -> Episode | Failure:
        try:
            world = await CheckedEnvironment.made(self.environment, self.limits)
            try:
                return await self._run(world)
            finally:
                await world.close(self.row.input_metadata.row_id)
        except (EnvironmentFaultError, ConversationError, PromptError) as error:
            kind = "prompt" if isinstance(error, PromptError) else "internal"
            return self._failure(kind, str(error))

    async def _run(self, world: CheckedEnvironment) -> Episode | Failure:
        told = await world.reset(self.row)
        if world.too_long(told):
            raise PromptError(
                f"reset() said more than {self.limits.observation_characters} characters"
            )
        said = Transcript(self.messages)
        said.add(told)
        own = world.environment.tools
        tools = self.row.tools if own is None else own
        opening = self.openings.of(said.kept, tools)
        talk = Conversation(opening, on_rewrite=self.on_rewrite)
        tokenizer = self.openings.tokenizer
        most = min(self.limits.tokens, self.context_length or self.limits.tokens)

        def end(reason: str) -> Episode:
            return self._ended(talk, opening.prompt_ids, said, reason)

        while True:
            room = most - len(talk.prompt_ids)
            if room < 1 and not self._survivors:
                which = "EpisodeLimits.tokens" if most == self.limits.tokens else "model's context"
                raise PromptError(
                    f"the prompt has {len(talk.prompt_ids)} tokens, and the {which} is {most}: "
                    "nothing can be sampled behind it"
                )
            if room < 1:
                return end("tokens")
            asked = self.params.max_tokens
            limited = asked is None or asked > room
            params = replace(self.params, max_tokens=room) if limited else self.params
            outcome = await self._sampled(talk.prompt_ids, params)
            if outcome is None:
                return end("seconds")
            if isinstance(outcome, Failure):
                return self._failure(outcome.kind, outcome.message, outcome)
            self._survivors.append(outcome)
            completion = outcome.completion
            talk.sampled(completion)
            reader = AnswerReader(
                talk.prompt_ids, tokenizer, tools=tools, split_reasoning=self.split_reasoning
            )
            answer = reader.read(completion.text or "")
            assistant, problem = as_message(answer.message), answer.problem
            history = said.shown
            said.add([assistant])
            if completion.truncated:
                return end("tokens" if limited else "length")
            if problem is not None:
                step = Step(messages=[{"role": "user", "content": problem.message}])
            else:
                step = await world.step(history, assistant)
            self._rewards.append(step.reward)
            self._metrics.update(step.metrics)
            if step.done:
                return end("done")
            if len(self._survivors) >= self.limits.turns:
                return end("turns")
            told = as_messages(step.messages)
            if world.too_long(told):
                return end("observation")
            talk.append(said.add(told))

    async def _sampled(
        self, prompt_ids: TokenIds, params: SamplingParams
    ) -> Survivor | Failure | None:
        """The next turn; None where the episode's time was up before it came."""
        left = None if self._deadline is None else self._deadline - sampling_time()
        if left is not None and left <= 0:
            return None
        try:
            async with Deadline(left) as self._waiting:
                turn = len(self._survivors)
                return await self.sample(turn, prompt_ids, params, self._starts)
        except TimeoutError:
            assert self._waiting is not None  # noqa: S101 - narrows the type
            if not self._waiting.expired():
                raise
        if self._survivors:
            return None
        message = f"the first turn took longer than the {self.limits.seconds:g} s of an episode"
        return Failure(
            index=self.index, kind="timeout", message=message, attempts=1, seconds=self._seconds
        )

    def _starts(self) -> None:
        """A request leaves: from the first on the episode's seconds count."""
        if self._deadline is None:
            self._deadline = sampling_time() + self.limits.seconds
            if self._waiting is not None:
                self._waiting.restart(self.limits.seconds)

    @property
    def _seconds(self) -> float:
        return sampling_time() - self._began

    def _ended(
        self, talk: Conversation, first_prompt: TokenIds, said: Transcript, reason: str
    ) -> Episode:
        first = replace(
            self._survivors[0],
            completion=_with_versions([s.completion for s in self._survivors]),
            attempts=sum(survivor.attempts for survivor in self._survivors),
            seconds=self._seconds,
            causes=tuple(cause for survivor in self._survivors for cause in survivor.causes),
        )
        return Episode(
            first=first,
            record=EpisodeRecord(
                turns=len(self._survivors),
                stop_reason=reason,
                finish_reason=self._survivors[-1].completion.finish_reason,
                step_rewards=self._rewards,
                metrics={**self._metrics, **_splits(talk)},
                messages=said.kept,
                row_messages=len(self.messages),
            ),
            segments=[
                SegmentRecord(
                    tokens=segment.tokens.tolist(),
                    logprobs=segment.logprobs.tolist(),
                    loss_mask=segment.loss_mask.astype(int).tolist(),
                )
                for segment in talk.segments()
            ],
            talk=talk,
            first_prompt=first_prompt,
            sampled_tokens=sum(len(s.completion.token_ids) for s in self._survivors),
        )

    def _failure(self, kind: Any, message: str, of: Failure | None = None) -> Failure:
        turn = len(self._survivors)
        return Failure(
            index=self.index,
            kind=kind,
            message=f"turn {turn}: {message}",
            attempts=sum(s.attempts for s in self._survivors) + (of.attempts if of else 0),
            seconds=self._seconds,
            seed=of.seed if of else None,
            status=of.status if of else None,
        )


def _with_versions(completions: Sequence[Completion]) -> Completion:
    """The first turn's, with the versions of the weights that sampled all turns."""
    last = completions[-1].policy_version
    every = [v for c in completions for v in (c.first_policy_version, c.policy_version)]
    first = next((version for version in every if version not in (None, last)), None)
    return replace(completions[0], policy_version=last, first_policy_version=first)


def _splits(talk: Conversation) -> dict[str, Any]:
    rewrites = [msgspec.to_builtins(rewrite) for rewrite in talk.rewrites]
    return {"history_rewrites": rewrites} if rewrites else {}
