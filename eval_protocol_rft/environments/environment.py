"""`Environment`: what a user writes, and `Step`, what it answers.

Invariant: one object per episode, made anew for each, so that nothing leaks from one into another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

Said = Sequence["Message | Mapping[str, Any]"]
"""Messages of Eval Protocol, or dicts of the chat API."""


class EnvironmentFaultError(RuntimeError):
    """The environment raised, hung, or answered what is no step. Its episode is a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What follows an assistant turn."""

    messages: Said = ()
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
