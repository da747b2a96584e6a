"""What turns of an episode leave behind for the next: keys and values, by the session's name.

Invariant: what is kept was computed by the weights that sample now, and a prompt is given columns
of exactly the ids that it begins with; so keeping changes no token and, beyond float noise, no
logprob. What is kept has a bound; the session whose last turn ended longest ago goes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from eval_protocol_rft.sampling.local_batch import Columns, Known
from eval_protocol_rft.sampling.local_request import Request

KEPT_SHARE = 0.5
"""Of max_batch_tokens, in tokens that are kept. The batch counts every row at the longest one's
prompt and max_tokens; what rows really hold when they end is about half of that. So a batch that
ends as a whole finds room, and keeping adds at most half to the memory that sampling may take."""

SHORT_COLUMNS = 32
"""Prefills of fewer columns gain nothing from being run apart: the forward itself is the cost."""


@dataclass(frozen=True, slots=True)
class _Kept:
    ids: tuple[int, ...]
    columns: Columns


class Prefixes:
    """The kept prefix of each session. Not safe for threads: the worker sees to that."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._kept: dict[str, _Kept] = {}
        """The one kept longest ago first."""

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are kept, of all sessions."""
        return self._tokens

    def known(self, request: Request) -> Known | None:
        """What its prompt begins with, if that is kept.

        Only a prompt longer than what is kept continues it. A shorter one begins the episode anew:
        given the columns of a former run, it would not be sampled to the last bit as that was.
        """
        session = request.session
        if session is None or session not in self._kept:
            return None
        kept = self._kept[session]
        length = _common(kept.ids, request.prompt_ids)
        return Known(length, kept.columns) if length else None

    def fits(self, length: int) -> bool:
        """Whether so many tokens can be kept at all."""
        return length <= self._max_tokens

    def keep(self, session: str, ids: tuple[int, ...], columns: Columns) -> None:
        """Keep the `columns` of `ids`, which fit, in place of what the session had."""
        former = self._kept.pop(session, None)
        self._kept[session] = _Kept(ids, columns)
        self._tokens += len(ids) - (len(former.ids) if former else 0)
        while self._tokens > self._max_tokens:
            evicted = self._kept.pop(next(iter(self._kept)))
            self._tokens -= len(evicted.ids)

    def clear(self) -> None:
        """Forget everything: the weights change, or nobody samples any more."""
        self._kept.clear()
        self._tokens = 0


class Joining(NamedTuple):
    """A request that joins the batch, and what is known of its prompt."""

    request: Request
    known: Known | None

    @property
    def new(self) -> int:
        """Tokens of the prompt that must be run."""
        return len(self.request.prompt_ids) - (self.known.length if self.known else 0)


def prefill_groups(admitted: Iterable[Joining]) -> list[list[Joining]]:
    """Those that are prefilled together. All rows of a prefill run as many columns as the one that
    knows least, so those that know something are grouped by powers of two of what is new: a row
    runs less than twice what it must, however much others know."""
    groups: defaultdict[int, list[Joining]] = defaultdict(list)
    for one in admitted:
        size = (max(one.new, SHORT_COLUMNS) - 1).bit_length() if one.known else 0
        groups[size].append(one)
    return list(groups.values())


def _common(kept: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """How many ids at the beginning are the same; none if `prompt` is not the longer."""
    if len(prompt) <= len(kept):
        return 0
    if prompt[: len(kept)] == kept:
        return len(kept)
    pairs = enumerate(zip(kept, prompt, strict=False))
    return next(index for index, (a, b) in pairs if a != b)
