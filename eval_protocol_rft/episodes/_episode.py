"""One episode: turns of the model and of its environment, until one of them or a limit ends it.

Invariant: an episode that ends, however it ends, has all that was sampled in it, exactly as it was
sampled, and a stop reason. One that cannot be had (a request that fails for good, an environment
that raises or hangs, a history that the template rewrites under `reject`) is a `Failure`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft import sampling
from eval_protocol_rft._segments import EpisodeRecord, Segment
from eval_protocol_rft.episodes import _environment as environments
from eval_protocol_rft.episodes._alive import AliveScorer, score_alive
from eval_protocol_rft.episodes._calling import EnvironmentFaultError
from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._rendering import ConversationError
from eval_protocol_rft.episodes._turns import OnRewrite, with_versions
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import AnswerReader, PromptError, as_message, chat_messages
from eval_protocol_rft.scoring import ALIVE_KEY

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

SampleTurn = Callable[
    [int, sampling.TokenIds, sampling.SamplingParams, int | None, Callable[[], None]],
    Awaitable[sampling.Survivor | sampling.Failure],
]
"""Turn number, prompt, parameters and seed in, and what to call when the first request leaves; what
came of it out."""


RESET_KEY = "reset"
"""Among an episode's metrics: what its `reset` was told beside the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What became of one episode."""

    first: sampling.Survivor
    """Its first turn, with the attempts and seconds of all of them."""
    record: EpisodeRecord
    segments: list[Segment]
    talk: Conversation
    first_prompt: sampling.TokenIds
    tools: Sequence[Mapping[str, Any]] | None
    """What the prompt describes: the environment's, or the row's."""
    sampled_tokens: int


class Episodes:
    """The episodes of one row, which begin alike. Each is run once, by `run`.

    Args:
        row: what the environments are shown.
        messages: before the first turn, without what an environment says at its reset.
        tokenizer: the model's.
        template_kwargs: passed to its chat template.
        environment: makes the environment of an episode.
        params: of every turn; `max_tokens` is less where the limits leave less room.
        limits: how long an episode may get.
        on_rewrite: see `Conversation.start`.
        context_length: the model's, where the sampler knows it.
        score: what scores an episode while its environment is alive, in place of the environment's
            own `score`.
        group_seed: what the seeds of the environments come from, see `group_seed`.
        split_reasoning: show thinking as `reasoning_content`, not in the content.
    """

    def __init__(
        self,
        row: EvaluationRow,
        messages: Sequence[Message],
        tokenizer: LoadedTokenizer,
        template_kwargs: Mapping[str, Any],
        *,
        environment: Callable[[], Environment],
        params: sampling.SamplingParams,
        limits: EpisodeLimits,
        on_rewrite: OnRewrite,
        context_length: int | None,
        group_seed: int,
        score: AliveScorer | None = None,
        split_reasoning: bool = True,
    ) -> None:
        self._group_seed = group_seed
        self.score = None if score is None else (score, score.name)
        self.row, self.messages = row, messages
        self.tokenizer, self._template_kwargs = tokenizer, template_kwargs
        self.environment, self.params, self.limits = environment, params, limits
        self.on_rewrite, self.context_length = on_rewrite, context_length
        self.split_reasoning = split_reasoning
        self._asked: tuple[Any, ...] = ()
        self._begun: Conversation | None = None
        """The last conversation that was begun, with `_asked`, its messages and tools."""

    def world_seeds(self, index: int) -> dict[str, int]:
        """Seeds of the environment of an episode."""
        return {
            "seed": _derived(self._group_seed, f"episode {index}"),
            "group_seed": self._group_seed,
        }

    async def run(
        self, index: int, *, seed: int | None, session: str, sample: SampleTurn
    ) -> Episode | sampling.Failure:
        """Run one.

        Args:
            index: its place among those of the row.
            seed: that a single completion would have; the turns' seeds come from it.
            session: one name for all its requests.
            sample: gets a turn.
        """
        with sampling.loop_clock().runs():
            return await _Run(self, index, seed, session, sample).in_world()

    def begin(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Conversation:
        """`Conversation.start`; what begins alike one after the other is rendered once.

        Raises:
            PromptError: as it does.
        """
        asked = chat_messages(messages, self.tokenizer), tools
        if self._begun is None or asked != self._asked:
            self._begun = Conversation.start(
                *asked, self.tokenizer, self._template_kwargs, on_rewrite=self.on_rewrite
            )
            self._asked = asked
        return self._begun.begun_again()


def group_seed(seed: int | None, row_key: str, run: int | str = 0) -> int:
    """What the environments of a row's episodes are seeded with: the same for the same seed, row
    and run. Environments have seeds where a server takes none."""
    return _derived(seed or 0, f"world/{row_key}", run)


def _derived(seed: int, name: str, run: int | str = 0) -> int:
    (derived,) = sampling.derive_seeds(seed, name, 1, run=run)
    assert derived is not None  # noqa: S101 - there is a seed
    return derived


class _Run:
    """One episode on its way."""

    def __init__(
        self, of: Episodes, index: int, seed: int | None, session: str, sample: SampleTurn
    ) -> None:
        self._of, self._index, self._seed, self._sample = of, index, seed, sample
        self._params = replace(of.params, session=session)
        self._began = sampling.sampling_time()
        self._deadline: float | None = None
        self._waiting: sampling.Deadline | None = None
        self._survivors: list[sampling.Survivor] = []
        self._rewards: list[float | None] = []
        self._metrics: dict[str, Any] = {}
        self._told: dict[str, Any] = {}

    async def in_world(self) -> Episode | sampling.Failure:
        try:
            world = await environments.CheckedEnvironment.made(
                self._of.environment, self._of.limits
            )
            try:
                ended = await self._run(world)
                if isinstance(ended, Episode):
                    ended = await self._scored(world, ended)
                return ended
            finally:
                await world.close(self._of.row.input_metadata.row_id)
        except (EnvironmentFaultError, ConversationError, PromptError) as error:
            kind = "prompt" if isinstance(error, PromptError) else "internal"
            return self._failure(kind, str(error))

    async def _run(self, world: environments.CheckedEnvironment) -> Episode | sampling.Failure:
        facts = {"index": self._index, **self._of.world_seeds(self._index)}
        more, told = await world.reset(self._of.row, facts)
        self._told = {RESET_KEY: told} if told else {}
        if world.too_long(more):
            raise PromptError(
                f"reset() said more than {self._of.limits.observation_characters} characters"
            )
        transcript = environments.Transcript(self._of.messages)
        transcript.add(more)
        tools = world.tools(self._of.row)
        talk = self._of.begin(transcript.kept, tools)
        first_prompt, tokenizer = talk.prompt_ids, self._of.tokenizer
        most = min(self._of.limits.tokens, self._of.context_length or self._of.limits.tokens)

        def end(reason: str) -> Episode:
            return self._ended(talk, first_prompt, tools, transcript, reason)

        while True:
            room = most - len(talk.prompt_ids)
            if room < 1 and not self._survivors:
                which = (
                    "EpisodeLimits.tokens" if most == self._of.limits.tokens else "model's context"
                )
                raise PromptError(
                    f"the prompt has {len(talk.prompt_ids)} tokens, and the {which} is {most}: "
                    "nothing can be sampled behind it"
                )
            if room < 1:
                return end("tokens")
            asked = self._params.max_tokens
            limited = asked is None or asked > room
            params = replace(self._params, max_tokens=room) if limited else self._params
            outcome = await self._sampled(talk.prompt_ids, params)
            if outcome is None:
                return end("seconds")
            if isinstance(outcome, sampling.Failure):
                return self._failure(outcome.kind, outcome.message, outcome)
            self._survivors.append(outcome)
            completion = outcome.completion
            talk.sampled(completion)
            reader = AnswerReader(
                talk.prompt_ids, tokenizer, tools=tools, split_reasoning=self._of.split_reasoning
            )
            answer = reader.read(completion.text or "")
            assistant, problem = as_message(answer.message), answer.problem
            history = transcript.shown
            transcript.add([assistant])
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
            if len(self._survivors) >= self._of.limits.turns:
                return end("turns")
            observation = environments.as_messages(step.messages)
            if world.too_long(observation):
                return end("observation")
            talk.append(transcript.add(observation))

    async def _scored(self, world: environments.CheckedEnvironment, episode: Episode) -> Episode:
        """The episode with its score, where it is scored while its environment is alive."""
        score = self._of.score or world.score
        if score is None:
            return episode
        row = self._of.row.model_copy(update={"tools": world.tools(self._of.row)})
        record = await score_alive(
            *score, row, self._index, episode.record, seconds=self._of.limits.step_seconds
        )
        return replace(episode, record=record)

    async def _sampled(
        self, prompt_ids: sampling.TokenIds, params: sampling.SamplingParams
    ) -> sampling.Survivor | sampling.Failure | None:
        """The next turn; None where the episode's time was up before it came."""
        left = None if self._deadline is None else self._deadline - sampling.sampling_time()
        if left is not None and left <= 0:
            return None
        try:
            async with sampling.Deadline(left) as self._waiting:
                turn, seed = len(self._survivors), self._seed
                if turn:  # the first one has the seed that a single completion would have
                    (seed,) = sampling.derive_seeds(seed, f"turn {turn}", 1)
                return await self._sample(turn, prompt_ids, params, seed, self._starts)
        except TimeoutError:
            assert self._waiting is not None  # noqa: S101 - narrows the type
            if not self._waiting.expired():
                raise
        if self._survivors:
            return None
        message = f"the first turn took longer than the {self._of.limits.seconds:g} s of an episode"
        return sampling.Failure(
            index=self._index, kind="timeout", message=message, attempts=1, seconds=self._seconds
        )

    def _starts(self) -> None:
        """A request leaves: from the first on the episode's seconds count."""
        if self._deadline is None:
            self._deadline = sampling.sampling_time() + self._of.limits.seconds
            if self._waiting is not None:
                self._waiting.restart(self._of.limits.seconds)

    @property
    def _seconds(self) -> float:
        return sampling.sampling_time() - self._began

    def _ended(
        self,
        talk: Conversation,
        first_prompt: sampling.TokenIds,
        tools: Sequence[Mapping[str, Any]] | None,
        transcript: environments.Transcript,
        reason: str,
    ) -> Episode:
        self._metrics.pop(ALIVE_KEY, None)  # that is not for an environment to say
        first = replace(
            self._survivors[0],
            completion=with_versions([s.completion for s in self._survivors]),
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
                metrics={**self._metrics, **self._told, **_splits(talk)},
                messages=transcript.kept,
                row_messages=len(self._of.messages),
            ),
            segments=talk.segments(),
            talk=talk,
            first_prompt=first_prompt,
            tools=tools,
            sampled_tokens=sum(len(s.completion.token_ids) for s in self._survivors),
        )

    def _failure(
        self, kind: Any, message: str, of: sampling.Failure | None = None
    ) -> sampling.Failure:
        turn = len(self._survivors)
        return sampling.Failure(
            index=self._index,
            kind=kind,
            message=f"turn {turn}: {message}",
            attempts=sum(s.attempts for s in self._survivors) + (of.attempts if of else 0),
            seconds=self._seconds,
            seed=of.seed if of else None,
            status=of.status if of else None,
        )


def _splits(talk: Conversation) -> dict[str, Any]:
    rewrites = [msgspec.to_builtins(rewrite) for rewrite in talk.rewrites]
    return {"history_rewrites": rewrites} if rewrites else {}
