"""`Environment`: what a user writes, `Step`, what it answers, and how long an episode may get; one
that is ready-made; and how an episode sees them.

Invariant: one object per episode, made anew for each, so that nothing leaks from one into another.
A limit ends an episode with a stop reason; it never shortens what was said.

Whatever an environment does, an episode gets a `Step` with messages and plain metrics within
bounds, or an `EnvironmentFaultError` that says what was wrong. The record says what was said,
whatever an environment does to the messages it is shown.

`RetryWithFeedback`: the user's own evaluator judges each answer, and the model may try again. What
the model is told is the evaluator's reason (or what `say` makes of it), and every answer's score is
on record as a step reward.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft._text import text_of, well_formed_json
from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call, to_its_end

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

    from eval_protocol_rft.record import Score

logger = logging.getLogger(__name__)

Messages = Sequence["Message | Mapping[str, Any]"]
"""Messages of Eval Protocol, or dicts of the chat API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What follows an assistant turn."""

    messages: Messages = ()
    """What the model is told next; nothing where the episode is over."""
    done: bool = False
    reward: float | None = None
    """Of this step; kept in `episodes[i].step_rewards` for the evaluator, who gives the score."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values; of several steps the last value of a name stays."""


class Environment:
    """A world for one episode. Subclass it; methods may be `async`.

    A method that is not `async` runs in a thread, so it may block; not always in the same one.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    """Tools that the prompt describes, in the chat API's form; None: those of the row."""

    def reset(self, row: EvaluationRow, *args: Any, **kwargs: Any) -> Any:
        """Begin. Messages (or an awaitable of them) to put behind the row's own; None: nothing.

        Args:
            row: a copy of the data set's, with the tools that the prompt describes.

        It may declare keywords (`def reset(self, row, *, seed)`), and is given those it declares:

            index: which of the row's episodes this is, from 0.
            seed: of this episode alone.
            group_seed: the same in all episodes of the row. What the first prompt depends on must
                come from it, as the episodes of a row answer one prompt.

        Both seeds are in [0, 2^31), come from the seed of the run, and are in the record.
        """
        return None

    def step(self, messages: Sequence[Message], assistant: Message) -> Any:
        """Answer an assistant turn with a `Step` (or an awaitable of one).

        Args:
            messages: the conversation, `assistant` not included.
            assistant: what was sampled, tool calls as fields where they could be read.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step()")

    def score(self, row: EvaluationRow) -> Any:
        """The episode's score, asked for after its last turn and before `close`: a number, an
        `EvaluateResult` (or an awaitable of one), or None for none.

        Args:
            row: the episode as an evaluator sees it.
        """
        return None

    def close(self) -> Any:
        """The episode is over, however it ended."""
        return None

    async def _open_tools(self) -> None:
        """Before `reset`."""

    async def _close_tools(self) -> None:
        """After `close`."""


def _flag(name: str) -> Flag:
    return Flag(name, only=True, panel="Episodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    """Each ends the episode, which is kept, with the stop reason in brackets."""

    turns: Annotated[int, Ge(1), _flag("--max-turns")] = 16
    """Most assistant turns (`turns`)."""
    tokens: Annotated[int, Ge(1), _flag("--episode-tokens")] = 32_768
    """Most tokens of the conversation, prompt included (`tokens`). A turn may sample what is left.
    """
    seconds: Annotated[float, Gt(0), _flag("--episode-seconds")] = 1800.0
    """Most seconds from the episode's first request on (`seconds`).

    A turn that is being sampled then is cancelled and left out; an episode without any turn is a
    failure."""
    step_seconds: Annotated[float, Gt(0), _flag("--step-seconds")] = 60.0
    """Most seconds of one call of the environment; beyond it the episode is a failure."""
    observation_characters: Annotated[int, Ge(1), _flag("--observation-characters")] = 1_000_000
    """Most characters that the environment may say after one turn (`observation`).

    So many take half a second of tokenizing. More than that is never rendered."""

    def __post_init__(self) -> None:
        check_options(self)


def _reason(result: Score) -> str:
    return f"That is not right: {result.reason or 'wrong'}. Try again."


class RetryWithFeedback(Environment):
    """Ends when an answer scores `threshold`, or the turns are up.

    Args:
        evaluator: a function of `row`, under `@evaluation_test` or not, or of `row` to a number or
            an `EvaluateResult`.
        threshold: from which an answer is right.
        say: what the model is told of a wrong answer, from its score and reason.
    """

    def __init__(
        self,
        evaluator: Callable[..., Any],
        *,
        threshold: float = 1.0,
        say: Callable[[Score], str] = _reason,
    ) -> None:
        self._evaluator = evaluator
        self._threshold = threshold
        self._say = say
        self._row: EvaluationRow | None = None

    def reset(self, row: EvaluationRow) -> None:
        self._row = row.model_copy(deep=True)

    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        from eval_protocol_rft.scoring import ascore_rows, read_result

        assert self._row is not None  # noqa: S101 - narrows the type
        row = self._row.model_copy(deep=True)
        row.messages = [*messages, assistant]
        (scored,) = await ascore_rows([row], self._evaluator, mode="pointwise")
        result = read_result(scored)
        if result.reward is None:
            raise ValueError(f"the evaluator gave no score: {result.error}")
        if result.reward >= self._threshold:
            return Step(done=True, reward=result.reward)
        feedback = {"role": "user", "content": self._say(result)}
        return Step(messages=[feedback], reward=result.reward)


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
        environment = await call(
            make, what=name, seconds=limits.step_seconds, too_late=_close_unused
        )
        if not callable(getattr(environment, "step", None)):
            raise EnvironmentFaultError(f"{name} made a {type(environment).__name__} without step")
        world = cls(environment, limits)
        if world._has("_open_tools"):
            try:
                await world._call("_open_tools")
            except BaseException:
                await world.close(None)
                raise
        return world

    def _has(self, method: str) -> bool:
        return _does_something(getattr(self.environment, method, Environment.close))

    def tools(self, row: EvaluationRow) -> list[dict[str, Any]] | None:
        """What the prompt describes: its own tools, or the row's."""
        own = self.environment.tools
        return row.tools if own is None else [dict(tool) for tool in own]

    async def reset(
        self, row: EvaluationRow, facts: Mapping[str, int]
    ) -> tuple[list[Message], dict[str, int]]:
        """Begin; the messages to put behind the row's own, and those of `facts` that it was told.

        Raises:
            EnvironmentFaultError: it raised, hung, or returned what are no messages.
        """
        reset = self.environment.reset
        if not _does_something(reset):
            return [], {}
        keywords = {name: facts[name] for name in _accepted(reset, facts)}
        shown = row.model_copy(update={"tools": self.tools(row)}).model_copy(deep=True)
        began = await self._call("reset", shown, **keywords)
        return as_messages(began or ()), keywords

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

    @property
    def score(self) -> tuple[Callable[[EvaluationRow], Any], str] | None:
        """What scores the episode, and its name; None where it does not."""
        method = getattr(self.environment, "score", None)
        if not callable(method) or not _does_something(method) or not _takes_one(method):
            return None
        return method, f"{self._name}.score()"

    async def close(self, row_id: str | None) -> None:
        """End it, even where the episode is being cancelled; a fault is logged, for the episode is
        over."""
        methods = [name for name in ("close", "_close_tools") if self._has(name)]
        if methods:
            await to_its_end(self._close(methods, row_id))

    async def _close(self, methods: Sequence[str], row_id: str | None) -> None:
        for method in methods:
            try:
                await self._call(method)
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

    async def _call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        function = getattr(self.environment, method)
        what = _TOOLS.get(method, "{}." + method + "()").format(self._name)
        if keywords:
            function = functools.partial(function, **keywords)
        return await call(function, *arguments, what=what, seconds=self.limits.step_seconds)


_TOOLS = {"_open_tools": "opening the tools of {}", "_close_tools": "closing the tools of {}"}
"""What is not a user's method, in words."""


def _reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise EnvironmentFaultError(
            f"the reward of a step is {reward!r}: a finite number, or None where there is none"
        )
    return float(reward)


def _accepted(method: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that a method takes as keywords behind its first argument."""
    try:
        parameters = list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):  # it has no signature that Python knows
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(names)
    declared = {
        parameter.name
        for parameter in parameters[1:]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return [name for name in names if name in declared]


def _close_unused(environment: Any) -> None:
    """Close an environment that was made after its episode had ended."""
    try:
        closing = environment.close()
        if inspect.isawaitable(closing):
            asyncio.run(_done(closing))
    except Exception as error:  # noqa: BLE001 - the user's, and nobody waits for it
        logger.warning("%s.close(): %s", type(environment).__name__, text_of(error))


async def _done(pending: Awaitable[Any]) -> None:
    await pending


def _does_something(method: Callable[..., Any]) -> bool:
    """Whether it is overridden: what an `Environment` does by itself takes no thread, and no copy
    of a row."""
    function = getattr(method, "__func__", method)
    return getattr(Environment, getattr(function, "__name__", ""), None) is not function


def _takes_one(method: Callable[..., Any]) -> bool:
    """Whether it can be called with a row: an environment may have a `score` of its own."""
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    except ValueError:  # it has no signature that Python knows
        pass
    return True


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
