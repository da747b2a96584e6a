"""One episode: turns of the model and of its environment, until one of them or a limit ends it.

Invariant: an episode that ends, however it ends, has all that was sampled in it, exactly as it was
sampled, and a stop reason. One that cannot be had (a request that fails for good, an environment
that raises or hangs, a history that the template rewrites under `reject`) is a `Failure`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from eval_protocol_rft.conversation import (
    Conversation,
    ConversationError,
    HistoryRewrittenError,
    OnRewrite,
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
    turns: list[Any]
    """`conversation.Turn`s."""
    messages: list[Message]
    """The whole conversation, the row's own messages included."""
    sampled_tokens: int
    prompt_tokens: int
    """Sent, summed over turns."""


@dataclass(slots=True, kw_only=True)
class EpisodeRun:
    """Runs one episode; `await run()` once."""

    index: int
    environment: Environment
    row: EvaluationRow
    messages: Sequence[Message]
    tokenizer: LoadedTokenizer
    params: SamplingParams
    template_kwargs: Mapping[str, Any]
    limits: EpisodeLimits
    on_rewrite: OnRewrite
    sample: SampleTurn
    _began: float = field(default_factory=time.monotonic)
    _survivors: list[Survivor] = field(default_factory=list)
    _rewards: list[float | None] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    async def __call__(self) -> Episode | Failure:
        try:
            return await self._run()
        except (EnvironmentFaultError, HistoryRewrittenError, PromptError) as error:
            kind = "prompt" if isinstance(error, PromptError) else "internal"
            return self._failure(kind, str(error))
        finally:
            await self._close()

    async def _run(self) -> Episode | Failure:
        began = await self._call(self.environment.reset, self.row.model_copy(deep=True))
        said = [*self.messages, *_as_messages(began or ())]
        tools = self.row.tools if self.environment.tools is None else self.environment.tools
        talk = Conversation.start(
            chat_messages(said),
            tools,
            self.tokenizer,
            self.template_kwargs,
            on_rewrite=self.on_rewrite,
        )
        while True:
            room = self.limits.tokens - len(talk.prompt_ids)
            if room < 1:
                return self._end(talk, said, "tokens")
            asked = self.params.max_tokens
            limited = asked is None or asked > room
            params = replace(self.params, max_tokens=room) if limited else self.params
            outcome = await self.sample(len(self._survivors), talk.prompt_ids, params)
            if isinstance(outcome, Failure):
                return self._failure(outcome.kind, outcome.message, outcome)
            self._survivors.append(outcome)
            talk.sampled(outcome.completion)
            text = self.tokenizer.decode_completion(outcome.completion, params)
            assistant, problem = _assistant(text, self.tokenizer, calls=bool(tools))
            history, said = said, [*said, assistant]
            if outcome.completion.truncated:
                return self._end(talk, said, "tokens" if limited else "length")
            if problem is not None:
                step = Step(messages=[{"role": "user", "content": problem.message}])
            else:
                step = _step(await self._call(self.environment.step, history, assistant))
            self._rewards.append(step.reward)
            self._metrics.update(step.metrics)
            if step.done:
                return self._end(talk, said, "done")
            if not step.messages:
                raise EnvironmentFaultError(
                    f"{type(self.environment).__name__}.step() is not done and says nothing"
                )
            if len(self._survivors) >= self.limits.turns:
                return self._end(talk, said, "turns")
            if time.monotonic() - self._began > self.limits.seconds:
                return self._end(talk, said, "seconds")
            told = _as_messages(step.messages)
            try:
                talk.append(chat_messages(told))
            except HistoryRewrittenError:
                raise
            except ConversationError as error:
                return self._failure("internal", str(error))
            said = [*said, *told]

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        what = f"{type(self.environment).__name__}.{function.__name__}()"
        return await call(function, *arguments, what=what, seconds=self.limits.step_seconds)

    async def _close(self) -> None:
        try:
            await self._call(self.environment.close)
        except EnvironmentFaultError as error:
            logger.warning("row %s: %s", self.row.input_metadata.row_id, error)

    def _end(self, talk: Conversation, said: list[Message], reason: str) -> Episode | Failure:
        if not self._survivors:
            return self._failure(
                "prompt",
                f"the prompt has {len(talk.prompt_ids)} tokens, the limit of an episode is "
                f"{self.limits.tokens}",
            )
        turns, last = talk.turns(), self._survivors[-1].completion
        first = replace(
            self._survivors[0],
            attempts=sum(survivor.attempts for survivor in self._survivors),
            seconds=time.monotonic() - self._began,
            causes=tuple(cause for survivor in self._survivors for cause in survivor.causes),
        )
        return Episode(
            first=first,
            record=EpisodeRecord(
                turns=len(turns),
                stop_reason=reason,
                finish_reason=last.finish_reason,
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
            turns=turns,
            messages=said,
            sampled_tokens=sum(len(s.completion.token_ids) for s in self._survivors),
            prompt_tokens=sum(len(turn.prompt_ids) for turn in turns),
        )

    def _failure(self, kind: Any, message: str, of: Failure | None = None) -> Failure:
        turn = len(self._survivors)
        return Failure(
            index=self.index,
            kind=kind,
            message=f"turn {turn}: {message}",
            attempts=sum(s.attempts for s in self._survivors) + (of.attempts if of else 0),
            seconds=time.monotonic() - self._began,
            seed=of.seed if of else None,
            status=of.status if of else None,
        )


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


def _step(answer: Any) -> Step:
    if not isinstance(answer, Step):
        raise EnvironmentFaultError(f"step() returned {type(answer).__name__}, not a Step")
    try:
        metrics = msgspec.json.decode(msgspec.json.encode(dict(answer.metrics)))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise EnvironmentFaultError(f"the metrics of a step are no JSON: {error}") from error
    return replace(answer, metrics=metrics)
