"""What can keep a conversation from going on as it was.

Invariant: a conversation that raised one of these is as it was before the call; what was sampled
until then stays usable.
"""

from __future__ import annotations

from dataclasses import dataclass

EXCERPT = 60
"""Characters shown of each side, from a little before they part."""
_BEFORE = 20


class ConversationError(RuntimeError):
    """A conversation cannot take this step. A RuntimeError, as a `SamplingError` is: Eval Protocol
    does not resample on those."""


class UnfinishedTurnError(ConversationError):
    """The last turn was cut off at its token limit, so nothing can be said after it: end the
    episode, with `length` as its stop reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """Where a template no longer renders what was sent and sampled before."""

    turn: int
    """Assistant turns sampled before the messages that brought it about."""
    index: int
    """First character, in the text of all that was sent and sampled, that differs."""
    kept: str
    """A short excerpt of what was sent and sampled, around `index`."""
    rendered: str
    """The same place as the template now renders it."""


class HistoryRewrittenError(ConversationError):
    """The template writes earlier tokens anew, and the policy is `reject`."""

    def __init__(self, name: str, rewrite: Rewrite) -> None:
        super().__init__(
            f"the chat template of {name!r} rewrites history after turn {rewrite.turn}: at "
            f"character {rewrite.index}, {rewrite.kept!r} became {rewrite.rendered!r}. Use a "
            'template that only appends (see template_report), or on_rewrite="split"'
        )
        self.rewrite = rewrite


def first_difference(kept: str, rendered: str, turn: int) -> Rewrite:
    """Where `rendered` leaves `kept`, which it does not begin with."""
    low, high = 0, min(len(kept), len(rendered))
    # Slices compare at the speed of memory: the texts are long, and differ once.
    while low < high:
        middle = (low + high + 1) // 2
        if kept[low:middle] == rendered[low:middle]:
            low = middle
        else:
            high = middle - 1
    start = max(0, low - _BEFORE)
    return Rewrite(
        turn=turn,
        index=low,
        kept=kept[start : start + EXCERPT],
        rendered=rendered[start : start + EXCERPT],
    )
