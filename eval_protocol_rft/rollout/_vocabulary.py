"""Whether the ids that a server samples are of the vocabulary of the tokenizer here.

With the tokenizer of another model every text is garbage, which scores 0 and trains. Servers send
their own text beside the ids, and what it says is compared with what is read here.

Invariant: a run goes on for as long as one text may be wrong for a reason of its own, and ends as
soon as several show another vocabulary. What is in doubt at its end is told.
"""

from __future__ import annotations

import logging

from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, ContractError, RunStoppedError

LONG_TEXT = 40
"""Letters of one text that nobody puts there as a stand-in: if all is read otherwise here, before
any text was read alike, it takes no second one."""

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_EXCERPT = 40
"""Characters shown of two texts that differ."""
logger = logging.getLogger(__name__)


class VocabularyWitness:
    """Compares the texts of one model of one server, in the order in which they come."""

    def __init__(self) -> None:
        self._alike = 0
        self._different = 0
        self._first: tuple[str, str] | None = None
        """The first text that differed, and what is read here. A server that says the same of all
        ids (a stand-in, a proxy) shows nothing of a vocabulary."""
        self._is_stand_in = False
        """Whether it said that of other ids too."""
        self._doubt: str | None = None
        self._problem: str | None = None

    @property
    def doubt(self) -> str | None:
        """What a person has to look at now that nothing more is sampled: texts differed, and it was
        not seen why. None where all is well, or the run has ended of it."""
        if self._problem is not None or self._is_stand_in or self._different <= self._alike:
            return None
        return self._doubt

    def require_fit(self) -> None:
        """Before anything more is asked for.

        Raises:
            RunStoppedError: the vocabulary was seen to be another.
        """
        if self._problem is not None:
            raise RunStoppedError(self._problem)

    def look(self, tokenizer: LoadedTokenizer, body: str, completion: Completion) -> None:
        """Look at one completion, whose ids (without the end of turn) read `body` here.

        Raises:
            ContractError: it has an id beyond the vocabulary, which the text does not explain.
            RunStoppedError: the vocabulary is another.
        """
        self.require_fit()
        text, ids = completion.text, completion.token_ids
        beyond = max(ids) if max(ids) >= tokenizer.size else None
        if beyond is not None and not text:
            raise ContractError(
                _sentence(
                    tokenizer,
                    "is not",
                    f"id {beyond} was sampled, and it ends at {tokenizer.size - 1}",
                )
            )
        if not text:
            return
        difference = None if body.startswith(text) else _difference(tokenizer, ids, text)
        if difference is None and (beyond is None or body.startswith(text)):
            self._alike += bool(text.strip())
            return
        difference = difference or f"id {beyond} lies beyond it"
        self._different += 1
        another = self._first is not None and self._first[0] != text
        long = not self._alike and len(text) >= LONG_TEXT
        if (another or long) and self._different > self._alike:
            self._problem = _sentence(tokenizer, "is not", difference)
            self.require_fit()
        if self._first is None:
            self._first = (text, body)
            self._doubt = (
                f"{_sentence(tokenizer, 'may not be', difference)}. Where that text is a stand-in "
                "of the server's, nothing is wrong"
            )
            # Not yet a warning: servers that stand in for others say one text of everything.
            logger.debug("%s; another text that differs ends the run", self._doubt)
        elif not another and self._first[1] != body:
            self._is_stand_in = True


def _sentence(tokenizer: LoadedTokenizer, verb: str, difference: str) -> str:
    return (
        f"tokenizer {tokenizer.name!r} {verb} the one of the model that sampled: {difference}. "
        'Name the model\'s own, as completion_params["tokenizer"] or as the argument tokenizer'
    )


def _difference(tokenizer: LoadedTokenizer, ids: list[int], text: str) -> str | None:
    """Where a server's text differs from what is read in the ids; None where it does not.

    Only what no server does to a text counts: they leave out control tokens, blanks, halves of
    characters, and what follows the end. An id beyond the vocabulary alone is none: models have
    more rows than tokens, and draw from them once in a while.
    """
    # With control tokens in between, halves of a character are none.
    ours = _letters(tokenizer, [token for token in ids if token not in tokenizer.special_ids])
    theirs = _without_added(tokenizer, text)
    length = min(
        len(letters.partition(_NO_CHARACTER)[0])
        for letters in (ours, theirs, _letters(tokenizer, ids))
    )
    whole = theirs.replace(_NO_CHARACTER, "")
    if theirs[:length] == ours[:length] and _is_in(whole, ours):
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    start = max(0, at - _EXCERPT // 2)
    return (
        f"the server's text and the sampled ids say different things, from character {at} on: "
        f"{theirs[start : start + _EXCERPT]!r} there, {ours[start : start + _EXCERPT]!r} here "
        "(blanks and control tokens left out)"
    )


def _letters(tokenizer: LoadedTokenizer, ids: list[int]) -> str:
    return _without_added(tokenizer, tokenizer.decode(ids))


def _without_added(tokenizer: LoadedTokenizer, text: str) -> str:
    """A text without added tokens and blanks."""
    before = None
    # A token may be spelled by what is left when another one is gone.
    while before != text:
        before = text
        for token in tokenizer.added_texts:
            text = text.replace(token, "")
    return "".join(text.split())


def _is_in(text: str, other: str) -> bool:
    """Whether the characters of `text` stand in `other` in this order, with others between them."""
    rest = iter(other)
    return all(letter in rest for letter in text)
