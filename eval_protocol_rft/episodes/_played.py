"""What environments of other packages have in common here: an observation is rendered into a
message, an answer or a tool call is read as an action, and rewards add up to the score.

Invariant: an answer that is no action is told to the model, which may try again, and changes
nothing in the world. Each action of a turn is taken in order, until the game is over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.episodes._environment import Environment, Step

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

Render = Callable[[Any], str]
"""An observation as text for the model."""
Parse = Callable[[Any], Any]
"""The text of an answer, or the arguments of a tool call, as an action; a ValueError says in words
for the model why it is none."""


def as_text(observation: Any) -> str:
    """Text as it is, and JSON of everything else; arrays as lists."""
    if isinstance(observation, str):
        return observation
    return json.dumps(observation, default=_plain)


def _plain(value: Any) -> Any:
    for method in ("tolist", "model_dump"):  # numpy's, pydantic's
        if callable(convert := getattr(value, method, None)):
            return convert()
    if isinstance(value, Iterable):
        return list(value)
    return str(value)


def described(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the chat API's form, of which `parameters` (name -> JSON schema) are all needed."""
    schema = {"type": "object", "properties": dict(parameters), "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an action led to."""

    text: str
    reward: float | None = None
    done: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Played(Environment):
    """A world of actions and what is seen of them.

    Args:
        parse: reads an action.
        tool: the tool whose calls are actions; None: answers in text are.
    """

    def __init__(self, *, parse: Parse, tool: Mapping[str, Any] | None) -> None:
        self._parse = parse
        self._tool: str | None = None if tool is None else tool["function"]["name"]
        self.tools = None if tool is None else [tool]
        self._rewards: list[float] = []

    def score(self, row: EvaluationRow) -> float:
        """The sum of all rewards."""
        return math.fsum(self._rewards)

    def _turn(self, assistant: Message) -> Turn:
        """The actions of an answer."""
        if self._tool is None:
            text = assistant.content
            return Turn([self._read(text if isinstance(text, str) else "")])
        calls = assistant.tool_calls or []
        if not calls:
            return Turn([Move(problem=f"Call {self._tool} to go on.")])
        moves = []
        for call in calls:
            move = self._read_call(call.function.name, call.function.arguments)
            move.call = {"role": "tool", "tool_call_id": call.id, "name": call.function.name}
            moves.append(move)
        return Turn(moves)

    def _read(self, given: Any) -> Move:
        try:
            return Move(action=self._parse(given))
        except ValueError as error:
            return Move(problem=f"That is no action: {error}")

    def _read_call(self, name: str, arguments: str) -> Move:
        if name != self._tool:
            return Move(problem=f"Error: there is no tool {name!r}; there is {self._tool}")
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            return Move(problem=f"Error: wrong arguments: {error}")
        if not isinstance(given, dict):
            return Move(problem="Error: wrong arguments: a JSON object is needed")
        return self._read(given)

    def _step(self, turn: Turn) -> Step:
        """What the model is told of a turn."""
        messages, rewards = [], []
        metrics: dict[str, Any] = {}
        for move in turn.moves:
            outcome = move.outcome
            if outcome is not None:
                metrics |= outcome.metrics
                rewards += [] if outcome.reward is None else [float(outcome.reward)]
            text = move.problem or (outcome.text if outcome else "Not done: it was over before.")
            messages.append({**(move.call or {"role": "user"}), "content": text})
        self._rewards += rewards
        return Step(
            messages=messages,
            done=turn.is_over,
            reward=math.fsum(rewards) if rewards else None,
            metrics=metrics,
        )


@dataclass(slots=True, kw_only=True)
class Move:
    """One action of a turn, or why there is none, and what came of it."""

    action: Any = None
    problem: str | None = None
    call: Mapping[str, Any] | None = None
    """The tool message that answers it, but for its content; None where the answer's text was it.
    """
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """The moves of one answer."""

    moves: Sequence[Move]

    def __iter__(self) -> Any:
        """Those to make, until the game is over."""
        for move in self.moves:
            if move.problem is None and not self.is_over:
                yield move

    @property
    def is_over(self) -> bool:
        return any(move.outcome is not None and move.outcome.done for move in self.moves)
