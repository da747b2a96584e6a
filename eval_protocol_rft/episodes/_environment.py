"""`Environment`: what a user writes, `Step`, what it answers, and how long an episode may get; and
two that are ready-made.

Invariant: one object per episode, made anew for each, so that nothing leaks from one into another.
A limit ends an episode with a stop reason; it never shortens what was said.

`ToolLoop`: plain Python functions as tools, until the model answers without calling one. Whatever
goes wrong with a call (unknown tool, arguments that are no JSON or do not fit, an exception, a call
that takes too long, an answer that is too long or no JSON) is told to the model as the tool's
answer; the model may try again.

`RetryWithFeedback`: the user's own evaluator judges each answer, and the model may try again. What
the model is told is the evaluator's reason (or what `say` makes of it), and every answer's score is
on record as a step reward.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft.episodes._calling import EnvironmentFaultError, call
from eval_protocol_rft.sampling import sampling_time

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

    from eval_protocol_rft.record import Score

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

    def reset(self, row: EvaluationRow) -> Any:
        """Begin. Messages (or an awaitable of them) to put behind the row's own; None: nothing."""
        return None

    def step(self, messages: Sequence[Message], assistant: Message) -> Any:
        """Answer an assistant turn with a `Step` (or an awaitable of one).

        Args:
            messages: the conversation, `assistant` not included.
            assistant: what was sampled, tool calls as fields where they could be read.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step()")

    def close(self) -> Any:
        """The episode is over, however it ended."""
        return None


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


TOOL_SECONDS = 30.0
TOOL_CHARACTERS = 100_000
"""More than most contexts have room for."""


class ToolLoop(Environment):
    """Runs the tools that the model calls.

    Args:
        functions: plain functions, sync or async. Name, docstring and annotated parameters make
            the schema that the prompt describes; arguments are checked against it.
        seconds: the calls of one turn may take together; less than `step_seconds` of
            `EpisodeLimits`, which fails the episode.
        characters: an answer may have.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        seconds: float = TOOL_SECONDS,
        characters: int = TOOL_CHARACTERS,
    ) -> None:
        if not functions:
            raise ValueError("no tools: pass at least one function")
        self._tools = {function.__name__: _Tool(function) for function in functions}
        self._seconds = seconds
        self._characters = characters
        self.tools = [tool.schema for tool in self._tools.values()]

    async def step(self, messages: Sequence[Message], assistant: Message) -> Step:
        calls = assistant.tool_calls or []
        if not calls:
            return Step(done=True)
        deadline = sampling_time() + self._seconds
        results = [
            {
                "role": "tool",
                "tool_call_id": one.id,
                "name": one.function.name,
                "content": await self._run(one.function.name, one.function.arguments, deadline),
            }
            for one in calls
        ]
        return Step(messages=results, metrics={"tool_calls": len(results)})

    async def _run(self, name: str, arguments: str, deadline: float) -> str:
        left = deadline - sampling_time()
        if left <= 0:
            return f"Error: not called: the calls before it took {self._seconds:g} s"
        tool = self._tools.get(name)
        if tool is None:
            return f"Error: there is no tool {name!r}; there are {', '.join(self._tools)}"
        try:
            given = tool.arguments(arguments)
        except ValueError as error:
            return f"Error: {error}"
        try:
            result = await call(lambda: tool.function(**given), what=f"{name}()", seconds=left)
            answer = result if isinstance(result, str) else json.dumps(result, default=str)
        except EnvironmentFaultError as error:
            return f"Error: {error}"
        except (TypeError, ValueError, RecursionError) as error:
            return f"Error: what {name}() returned is no JSON: {error}"
        if len(answer) > self._characters:
            return (
                f"Error: {name}() returned {len(answer)} characters, more than the "
                f"{self._characters} that can be shown: ask for less"
            )
        return answer


class _Tool:
    """A function and its parameters as a schema."""

    def __init__(self, function: Callable[..., Any]) -> None:
        import pydantic

        self.function = function
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(
                    f"{function.__name__}({parameter}): a tool's parameters have names"
                )
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (annotation, default)
        self._model = pydantic.create_model(
            function.__name__, __config__=pydantic.ConfigDict(extra="forbid"), **fields
        )
        parameters = self._model.model_json_schema()
        parameters.pop("title", None)
        parameters.pop("additionalProperties", None)
        for described in parameters.get("properties", {}).values():
            described.pop("title", None)
        parameters.setdefault("properties", {})
        self.schema: Mapping[str, Any] = {
            "type": "function",
            "function": {
                "name": function.__name__,
                "description": inspect.getdoc(function) or "",
                "parameters": parameters,
            },
        }

    def arguments(self, text: str) -> dict[str, Any]:
        """The call's arguments as the function takes them.

        Raises:
            ValueError: no JSON object, or one that does not fit; in words for the model.
        """
        from pydantic import ValidationError

        try:
            given = self._model.model_validate_json(text or "{}")
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}"
                for one in error.errors(include_url=False)
            )
            raise ValueError(f"wrong arguments: {problems}") from error
        return {name: getattr(given, name) for name in type(given).model_fields}


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
