"""One episode: turns of the model and of its environment, until one of them or a limit ends it.

Invariant: an episode that ends, however it ends, has all that was sampled in it, exactly as it was
sampled, and a stop reason. One that cannot be had (a request that fails for good, an environment
that raises or hangs, a history that the template rewrites under `reject`) is a `Failure`.

A user's environment as an episode sees it.

Invariant: whatever the environment does, an episode gets a `Step` with messages and plain metrics
within bounds, or an `EnvironmentFaultError` that says what was wrong. The record says what was
said, whatever an environment does to the messages it is shown.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft import sampling
from eval_protocol_rft._segments import EpisodeRecord, Segment
from eval_protocol_rft._text import well_formed_json
from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call
from eval_protocol_rft.episodes._conversation import Conversation, OnRewrite, Openings
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.episodes._rendering import ConversationError
from eval_protocol_rft.rollout import AnswerReader, PromptError, as_message

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

logger = logging.getLogger(__name__)


class CheckedEnvironment:
    """Calls an environment and checks what it answers. Make one with `made`."""

    def __init__(self, environment: Environment, limits: EpisodeLimits) -> None:
        self.environment, self.limits = environment, limits

    @classmethod
    async def made(
        cls, factory: Callable[[], Environment], limits: EpisodeLimits
    ) -> CheckedEnvironment:
        """The environment of one episode.

        Raises:
            EnvironmentFaultError: the factory raised, hung, or made something else.
        """
        name = f"{getattr(factory, '__name__', type(factory).__name__)}()"

        async def without_thread() -> Environment:
            return factory()

        # A class that does nothing of its own when it is made takes no time either.
        is_quick = getattr(factory, "__init__", None) is object.__init__
        make = without_thread if is_quick else factory
        environment = await call(make, what=name, seconds=limits.step_seconds)
        if not callable(getattr(environment, "step", None)):
            raise EnvironmentFaultError(f"{name} made a {type(environment).__name__} without step")
        return cls(environment, limits)

    async def reset(self, row: EvaluationRow) -> list[Message]:
        """Begin; the messages to put behind the row's own.

        Raises:
            EnvironmentFaultError: it raised, hung, or returned what are no messages.
        """
        if not _does_something(self.environment.reset):
            return []
        began = await self._call("reset", row.model_copy(deep=True))
        return as_messages(began or ())

    async def step(self, history: Sequence[Message], assistant: Message) -> Step:
        """Its answer to an assistant turn; it says something unless it is done.

        Raises:
            EnvironmentFaultError: it raised, hung, or returned what is no such step.
        """
        answer = await self._call("step", history, assistant)
        if not isinstance(answer, Step):
            raise EnvironmentFaultError(f"step() returned {type(answer).__name__}, not a Step")
        if not answer.done and not answer.messages:
            raise EnvironmentFaultError(f"{self._name}.step() is not done and says nothing")
        return replace(answer, reward=_reward(answer.reward), metrics=self._metrics(answer.metrics))

    async def close(self, row_id: str | None) -> None:
        """End it; a fault is logged, for the episode is over."""
        if not _does_something(self.environment.close):
            return
        try:
            await self._call("close")
        except EnvironmentFaultError as error:
            logger.warning("row %s: %s", row_id, error)

    def too_long(self, messages: Sequence[Message]) -> bool:
        """Whether these are more characters than may be said at once."""
        return sum(len(str(m.content or "")) for m in messages) > self.limits.observation_characters

    @property
    def _name(self) -> str:
        return type(self.environment).__name__

    def _metrics(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(metrics, dict) and not metrics:
            return {}
        try:
            text = json.dumps(dict(metrics), allow_nan=False)
            plain: dict[str, Any] = well_formed_json(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise EnvironmentFaultError(f"the metrics of a step are no JSON: {error}") from error
        if len(text) > self.limits.observation_characters:
            raise EnvironmentFaultError(f"the metrics of a step are {len(text)} characters of JSON")
        return plain

    async def _call(self, method: str, *arguments: Any) -> Any:
        function, what = getattr(self.environment, method), f"{self._name}.{method}()"
        return await call(function, *arguments, what=what, seconds=self.limits.step_seconds)


def _reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise EnvironmentFaultError(
            f"the reward of a step is {reward!r}: a finite number, or None where there is none"
        )
    return float(reward)


def _does_something(method: Callable[..., Any]) -> bool:
    """Whether it is overridden: what an `Environment` does by itself takes no thread, and no copy
    of a row."""
    return getattr(method, "__func__", None) not in (Environment.reset, Environment.close)


class Transcript:
    """The conversation so far: `shown` to the environment, and `kept` for the record."""

    def __init__(self, messages: Iterable[Message]) -> None:
        """`messages` are others' too: the environment is shown copies."""
        self.shown: list[Message] = []
        self.kept: list[dict[str, Any]] = []
        self.add([message.model_copy(deep=True) for message in messages])

    def add(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Append `messages`; returns them as they are kept."""
        added = list(messages)
        kept = [message.model_dump(exclude_none=True) for message in added]
        # A new list: the environment may still have the last one.
        self.shown = [*self.shown, *added]
        self.kept += kept
        return kept


def as_messages(messages: Any) -> list[Message]:
    """What an environment said, as messages; of text that is no UTF-8, a character is lost.

    Raises:
        EnvironmentFaultError: they are none.
    """
    from eval_protocol.models import Message

    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise EnvironmentFaultError(
            f"messages must be a list of messages, not {type(messages).__name__}"
        )
    try:
        return [
            _well_formed(m if isinstance(m, Message) else Message(**well_formed_json(m)))
            for m in messages
        ]
    except (TypeError, ValueError) as error:
        raise EnvironmentFaultError(f"a message is no message: {error}") from error


def _well_formed(message: Message) -> Message:
    values = message.model_dump(exclude_none=True)
    mended = well_formed_json(values)
    return message if mended == values else type(message)(**mended)


SampleTurn = Callable[
    [int, sampling.TokenIds, sampling.SamplingParams, Callable[[], None]],
    Awaitable[sampling.Survivor | sampling.Failure],
]
"""Turn number, prompt and parameters in, and what to call when the first request leaves; what came
of it out."""


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
    params: sampling.SamplingParams
    limits: EpisodeLimits
    context_length: int | None
    """The model's, where the sampler knows it."""
    on_rewrite: OnRewrite
    sample: SampleTurn
    split_reasoning: bool = True
    """Show thinking as `reasoning_content`, not in the content."""
    _began: float = field(default_factory=sampling.sampling_time)
    _deadline: float | None = None
    _waiting: sampling.Deadline | None = None
    _survivors: list[sampling.Survivor] = field(default_factory=list)
    _rewards: list[float | None] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    async def __call__(self) -> Episode | sampling.Failure:
        with sampling.loop_clock().runs():
            return await self._run_in_world()

    async def _run_in_world(self) -> Episode | sampling.Failure:
        try:
            world = await CheckedEnvironment.made(self.environment, self.limits)
            try:
                return await self._run(world)
            finally:
                await world.close(self.row.input_metadata.row_id)
        except (EnvironmentFaultError, ConversationError, PromptError) as error:
            kind = "prompt" if isinstance(error, PromptError) else "internal"
            return self._failure(kind, str(error))

    async def _run(self, world: CheckedEnvironment) -> Episode | sampling.Failure:
        more = await world.reset(self.row)
        if world.too_long(more):
            raise PromptError(
                f"reset() said more than {self.limits.observation_characters} characters"
            )
        transcript = Transcript(self.messages)
        transcript.add(more)
        tools = world.environment.tools
        if tools is None:
            tools = self.row.tools
        talk = self.openings.of(transcript.kept, tools, self.on_rewrite)
        first_prompt, tokenizer = talk.prompt_ids, self.openings.tokenizer
        most = min(self.limits.tokens, self.context_length or self.limits.tokens)

        def end(reason: str) -> Episode:
            return self._ended(talk, first_prompt, tools, transcript, reason)

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
            if isinstance(outcome, sampling.Failure):
                return self._failure(outcome.kind, outcome.message, outcome)
            self._survivors.append(outcome)
            completion = outcome.completion
            talk.sampled(completion)
            reader = AnswerReader(
                talk.prompt_ids, tokenizer, tools=tools, split_reasoning=self.split_reasoning
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
            if len(self._survivors) >= self.limits.turns:
                return end("turns")
            observation = as_messages(step.messages)
            if world.too_long(observation):
                return end("observation")
            talk.append(transcript.add(observation))

    async def _sampled(
        self, prompt_ids: sampling.TokenIds, params: sampling.SamplingParams
    ) -> sampling.Survivor | sampling.Failure | None:
        """The next turn; None where the episode's time was up before it came."""
        left = None if self._deadline is None else self._deadline - sampling.sampling_time()
        if left is not None and left <= 0:
            return None
        try:
            async with sampling.Deadline(left) as self._waiting:
                turn = len(self._survivors)
                return await self.sample(turn, prompt_ids, params, self._starts)
        except TimeoutError:
            assert self._waiting is not None  # noqa: S101 - narrows the type
            if not self._waiting.expired():
                raise
        if self._survivors:
            return None
        message = f"the first turn took longer than the {self.limits.seconds:g} s of an episode"
        return sampling.Failure(
            index=self.index, kind="timeout", message=message, attempts=1, seconds=self._seconds
        )

    def _starts(self) -> None:
        """A request leaves: from the first on the episode's seconds count."""
        if self._deadline is None:
            self._deadline = sampling.sampling_time() + self.limits.seconds
            if self._waiting is not None:
                self._waiting.restart(self.limits.seconds)

    @property
    def _seconds(self) -> float:
        return sampling.sampling_time() - self._began

    def _ended(
        self,
        talk: Conversation,
        first_prompt: sampling.TokenIds,
        tools: Sequence[Mapping[str, Any]] | None,
        transcript: Transcript,
        reason: str,
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
                messages=transcript.kept,
                row_messages=len(self.messages),
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
            index=self.index,
            kind=kind,
            message=f"turn {turn}: {message}",
            attempts=sum(s.attempts for s in self._survivors) + (of.attempts if of else 0),
            seconds=self._seconds,
            seed=of.seed if of else None,
            status=of.status if of else None,
        )


def _with_versions(completions: Sequence[sampling.Completion]) -> sampling.Completion:
    """The first turn's, with the versions of the weights that sampled all turns."""
    last = completions[-1].policy_version
    every = [v for c in completions for v in (c.first_policy_version, c.policy_version)]
    first = next((version for version in every if version not in (None, last)), None)
    return replace(completions[0], policy_version=last, first_policy_version=first)


def _splits(talk: Conversation) -> dict[str, Any]:
    rewrites = [msgspec.to_builtins(rewrite) for rewrite in talk.rewrites]
    return {"history_rewrites": rewrites} if rewrites else {}
