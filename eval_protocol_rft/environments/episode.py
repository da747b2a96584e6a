"""One episode: turns of the model and of its environment, until one of them or a limit ends it.

Invariant: an episode that ends, however it ends, has all that was sampled in it, exactly as it was
sampled, and a stop reason. One that cannot be had (a request that fails for good, an environment
that raises or hangs, a history that the template rewrites under `reject`) is a `Failure`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.conversation import (
    Conversation,
    ConversationError,
    OnRewrite,
    Openings,
    ParseProblem,
    parse_tool_calls,
)
from eval_protocol_rft.environments.calling import call
from eval_protocol_rft.environments.environment import Environment, EnvironmentFaultError, Step
from eval_protocol_rft.environments.limits import EpisodeLimits
from eval_protocol_rft.episodes import EpisodeRecord, SegmentRecord
from eval_protocol_rft.prompts import PromptError, chat_messages
from eval_protocol_rft.sampling.fanout import Survivor
from eval_protocol_rft.sampling.types import Failure, SamplingParams, TokenIds
from eval_protocol_rft.tokenizer import LoadedTokenizer

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

logger = logging.getLogger(__name__)

SampleTurn = Callable[[int, TokenIds, SamplingParams], Awaitable[Survivor | Failure]]
"""Turn number, prompt and parameters in; what came of it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What became of one episode."""

    first: Survivor
    """Its first turn, with the attempts and seconds of all of them."""
    record: EpisodeRecord
    segments: list[SegmentRecord]
    talk: Conversation
    first_prompt: TokenIds
    messages: list[Message]
    """The whole conversation, the row's own messages included."""
    sampled_tokens: int


@dataclass(slots=True, kw_only=True)
class EpisodeRun:
    """Runs one episode; `await run()` once."""

    index: int
    environment: Environment
    row: EvaluationRow
    messages: Sequence[Message]
    openings: Openings
    """Shared by the episodes of a row, which begin alike."""
    params: SamplingParams
    limits: EpisodeLimits
    on_rewrite: OnRewrite
    sample: SampleTurn
    _began: float = field(default_factory=time.monotonic)
    _deadline: float | None = None
    """By the event loop's clock."""
    _waiting: asyncio.Timeout | None = None
    _survivors: list[Survivor] = field(default_factory=list)
    _rewards: list[float | None] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    async def __call__(self) -> Episode | Failure:
        try:
            return await self._run()
        except (EnvironmentFaultError, ConversationError, PromptError) as error:
            kind = "prompt" if isinstance(error, PromptError) else "internal"
            return self._failure(kind, str(error))
        finally:
            await self._close()

    def starts(self) -> None:
        """The first request leaves: from here on the episode's seconds count."""
        self._deadline = asyncio.get_running_loop().time() + self.limits.seconds
        if self._waiting is not None:
            self._waiting.reschedule(self._deadline)

    async def _run(self) -> Episode | Failure:
        told = await self._reset()
        if self._too_long(told):
            raise PromptError(
                f"reset() said more than {self.limits.observation_characters} characters"
            )
        said = [*self.messages, *told]
        tools = self.row.tools if self.environment.tools is None else self.environment.tools
        opening = self.openings.of(chat_messages(said), tools)
        talk = Conversation(opening, on_rewrite=self.on_rewrite)
        tokenizer = self.openings.tokenizer

        def end(reason: str) -> Episode:
            return self._ended(talk, opening.prompt_ids, said, reason)

        while True:
            room = self.limits.tokens - len(talk.prompt_ids)
            if room < 1 and not self._survivors:
                raise PromptError(
                    f"the prompt has {len(talk.prompt_ids)} tokens, the limit of an episode is "
                    f"{self.limits.tokens}"
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
            text = tokenizer.answer(talk.sampled_text, completion, params)
            assistant, problem = _assistant(text, tokenizer, calls=bool(tools))
            history, said = said, [*said, assistant]
            if completion.truncated:
                return end("tokens" if limited else "length")
            if problem is not None:
                step = Step(messages=[{"role": "user", "content": problem.message}])
            else:
                step = self._step(await self._call(self.environment.step, history, assistant))
            self._rewards.append(step.reward)
            self._metrics.update(step.metrics)
            if step.done:
                return end("done")
            if not step.messages:
                raise EnvironmentFaultError(
                    f"{type(self.environment).__name__}.step() is not done and says nothing"
                )
            if len(self._survivors) >= self.limits.turns:
                return end("turns")
            told = _as_messages(step.messages)
            if self._too_long(told):
                return end("observation")
            talk.append(chat_messages(told))
            said = [*said, *told]

    async def _reset(self) -> list[Message]:
        if not _does_something(self.environment.reset):
            return []
        began = await self._call(self.environment.reset, self.row.model_copy(deep=True))
        return _as_messages(began or ())

    async def _sampled(
        self, prompt_ids: TokenIds, params: SamplingParams
    ) -> Survivor | Failure | None:
        """The next turn; None where the episode's time was up before it came."""
        try:
            async with asyncio.timeout_at(self._deadline) as self._waiting:
                return await self.sample(len(self._survivors), prompt_ids, params)
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

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _too_long(self, told: Sequence[Message]) -> bool:
        return sum(len(str(m.content or "")) for m in told) > self.limits.observation_characters

    def _step(self, answer: Any) -> Step:
        if not isinstance(answer, Step):
            raise EnvironmentFaultError(f"step() returned {type(answer).__name__}, not a Step")
        try:
            metrics = msgspec.json.encode(dict(answer.metrics))
            plain = msgspec.json.decode(metrics)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise EnvironmentFaultError(f"the metrics of a step are no JSON: {error}") from error
        if len(metrics) > self.limits.observation_characters:
            raise EnvironmentFaultError(f"the metrics of a step are {len(metrics)} bytes of JSON")
        return replace(answer, metrics=plain)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        what = f"{type(self.environment).__name__}.{function.__name__}()"
        return await call(function, *arguments, what=what, seconds=self.limits.step_seconds)

    async def _close(self) -> None:
        if not _does_something(self.environment.close):
            return
        try:
            await self._call(self.environment.close)
        except EnvironmentFaultError as error:
            logger.warning("row %s: %s", self.row.input_metadata.row_id, error)

    def _ended(
        self, talk: Conversation, first_prompt: TokenIds, said: list[Message], reason: str
    ) -> Episode:
        first = replace(
            self._survivors[0],
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
                messages=[message.model_dump(exclude_none=True) for message in said],
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
            messages=said,
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


def _does_something(method: Callable[..., Any]) -> bool:
    """Whether it is overridden: what an `Environment` does by itself takes no thread, and no copy
    of a row."""
    return getattr(method, "__func__", None) not in (Environment.reset, Environment.close)


def _splits(talk: Conversation) -> dict[str, Any]:
    rewrites = [msgspec.to_builtins(rewrite) for rewrite in talk.rewrites]
    return {"history_rewrites": rewrites} if rewrites else {}


def _assistant(
    text: str, tokenizer: LoadedTokenizer, *, calls: bool
) -> tuple[Message, ParseProblem | None]:
    """The turn as an environment is shown it; `calls`: there are tools to call."""
    from eval_protocol.models import Message

    if not calls:
        return Message(role="assistant", content=text), None
    content, called = parse_tool_calls(text, tokenizer)
    if isinstance(called, ParseProblem):
        return Message(role="assistant", content=text), called
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if called:
        message["tool_calls"] = called
    return Message(**message), None


def _as_messages(said: Any) -> list[Message]:
    from eval_protocol.models import Message

    if isinstance(said, str | Mapping) or not isinstance(said, Sequence):
        raise EnvironmentFaultError(
            f"messages must be a list of messages, not {type(said).__name__}"
        )
    try:
        return [m if isinstance(m, Message) else Message(**m) for m in said]
    except (TypeError, ValueError) as error:
        raise EnvironmentFaultError(f"a message is no message: {error}") from error
