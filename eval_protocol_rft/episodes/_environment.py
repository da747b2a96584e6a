"""`Environment`: what a user writes, and `Step`, what it answers.

Invariant: one object per episode, made anew for each, so that nothing leaks from one into another.

How long an episode may get.

Invariant: a limit ends an episode with a stop reason; it never shortens what was said.

What is said in an episode, as messages.

Invariant: the record says what was said, whatever an environment does to the messages it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from eval_protocol_rft._errors import EvalProtocolRftError
from eval_protocol_rft._options import Flag, check_options
from eval_protocol_rft._text import well_formed_json

if TYPE_CHECKING:
    from eval_protocol.models import EvaluationRow, Message

Messages = Sequence["Message | Mapping[str, Any]"]
"""Messages of Eval Protocol, or dicts of the chat API."""


class EnvironmentFaultError(EvalProtocolRftError, RuntimeError):
    """The environment raised, hung, or answered what is no step. Its episode is a failure."""


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
