"""What is said in an episode, as messages.

Invariant: the record says what was said, whatever an environment does to the messages it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval_protocol_rft.environments.environment import EnvironmentFaultError
from eval_protocol_rft.text import well_formed_json

if TYPE_CHECKING:
    from eval_protocol.models import Message


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


def as_messages(said: Any) -> list[Message]:
    """What an environment said, as messages; of text that is no UTF-8, a character is lost.

    Raises:
        EnvironmentFaultError: they are none.
    """
    from eval_protocol.models import Message

    if isinstance(said, str | Mapping) or not isinstance(said, Sequence):
        raise EnvironmentFaultError(
            f"messages must be a list of messages, not {type(said).__name__}"
        )
    try:
        messages = [m if isinstance(m, Message) else Message(**well_formed_json(m)) for m in said]
        return [_well_formed(m) for m in messages]
    except (TypeError, ValueError) as error:
        raise EnvironmentFaultError(f"a message is no message: {error}") from error


def _well_formed(message: Message) -> Message:
    values = message.model_dump(exclude_none=True)
    mended = well_formed_json(values)
    return message if mended == values else type(message)(**mended)
