"""`ToolLoop`: plain Python functions as tools, until the model answers without calling one.

Invariant: whatever goes wrong with a call (unknown tool, arguments that are no JSON or do not fit,
an exception, a call that takes too long, an answer that is too long or no JSON) is told to the
model as the tool's answer; the model may try again.

`RetryWithFeedback`: the user's own evaluator judges each answer, and the model may try again.

Invariant: what the model is told is the evaluator's reason (or what `say` makes of it), and every
answer's score is on record as a step reward.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pydantic

from eval_protocol_rft.episodes._calling import call
from eval_protocol_rft.episodes._environment import Environment, EnvironmentFaultError, Step
from eval_protocol_rft.sampling import sampling_time

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

    from eval_protocol_rft.record import Score

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
        try:
            given = self._model.model_validate_json(text or "{}")
        except pydantic.ValidationError as error:
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
