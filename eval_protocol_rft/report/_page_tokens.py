"""Text of single tokens, so that the page can show each one in its place.

Invariant: the pieces of a sequence, joined, are the text that the tokenizer gives for the whole of
it. Ids become text and never the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from eval_protocol_rft.local import LoadedTokenizer, load_tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are no whole character."""

TokenKind = Literal["text", "control", "partial", "unknown", "bare"]
"""`control`: an end-of-turn token or the like. `partial`: the first bytes of a character that a
later token ends. `unknown`: an id that the tokenizer does not have. `bare`: shown as its id."""


class TokenTexts:
    """Texts of the tokens of one tokenizer."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers decode a token at the start otherwise than within a text.
        self._anchor: list[int] = tokenizer.tokenizer.encode("a", add_special_tokens=False)
        self._anchor_text = tokenizer.decode(self._anchor)
        self._first: dict[int, str] = {}
        self._inner: dict[int, str] = {}
        self._runs: dict[tuple[int, ...], list[str]] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """[T] text of each of T tokens. A character made of several tokens belongs to the last of
        them."""
        text = self._tokenizer.decode(list(ids))
        pieces = self._by_token(ids)
        return pieces if "".join(pieces) == text else self._by_prefix(ids, text)

    def kind(self, token: int, piece: str) -> TokenKind:
        """What `token` is, where `piece` is its text in its place."""
        if token in self._tokenizer.special_ids:
            return "control"
        if piece:
            return "text"
        return "partial" if self._text(token, first=False) else "unknown"

    def _by_token(self, ids: Sequence[int]) -> list[str]:
        """Pieces from the texts of single tokens: right for all common tokenizers, and fast."""
        pieces: list[str] = []
        at = 0
        while at < len(ids):
            piece = self._text(ids[at], first=at == 0)
            if BROKEN not in piece:
                pieces.append(piece)
                at += 1
                continue
            stop = at + 1
            while stop < len(ids) and BROKEN in self._text(ids[stop], first=False):
                stop += 1
            pieces += self._run(tuple(ids[at:stop]), first=at == 0)
            at = stop
        return pieces

    def _by_prefix(self, ids: Sequence[int], text: str) -> list[str]:
        """Pieces from the texts of all prefixes: right for every tokenizer, and quadratic."""
        pieces: list[str] = []
        shown = 0
        for stop in range(1, len(ids)):
            prefix = self._tokenizer.decode(list(ids[:stop])).rstrip(BROKEN)
            end = max(shown, _common_start(prefix, text))
            pieces.append(text[shown:end])
            shown = end
        return [*pieces, text[shown:]] if ids else []

    def _text(self, token: int, *, first: bool) -> str:
        known = self._first if first else self._inner
        if token not in known:
            known[token] = self._decode((token,), first=first)
        return known[token]

    def _run(self, run: tuple[int, ...], *, first: bool) -> list[str]:
        """Pieces of consecutive tokens none of which is whole characters."""
        if not first and run in self._runs:
            return self._runs[run]
        pieces: list[str] = []
        begin = shown = 0
        for stop in range(1, len(run) + 1):
            text = self._decode(run[begin:stop], first=first and begin == 0)
            # What is broken at the end may become a character with the next token.
            whole = text if stop == len(run) else text.rstrip(BROKEN)
            pieces.append(whole[shown:])
            shown = len(whole)
            if whole == text:
                begin, shown = stop, 0
        if not first:
            self._runs[run] = pieces
        return pieces

    def _decode(self, ids: tuple[int, ...], *, first: bool) -> str:
        if first:
            return self._tokenizer.decode(list(ids))
        return self._tokenizer.decode([*self._anchor, *ids]).removeprefix(self._anchor_text)


def _common_start(a: str, b: str) -> int:
    """How many characters both begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def load_token_texts(name: str) -> TokenTexts:
    """The token texts of a tokenizer as a rollout file names it: a folder, a hub id, or a local
    model (`local/arithmetic`). A page is right without them, so it does not wait for a hub.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    return TokenTexts(load_tokenizer(name, patient=False))


class Vocabulary:
    """The different tokens of a page: each (id, text, kind) has one number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str, TokenKind], int] = {}
        self._kinds: dict[tuple[TokenTexts, int, str], TokenKind] = {}

    def numbers(self, ids: Sequence[int], texts: TokenTexts | None) -> list[int]:
        """[T] number of each of T tokens; without texts they are shown as their ids."""
        if texts is None:
            return [self._number(token, "", "bare") for token in ids]
        return [
            self._number(token, piece, self._kind(token, piece, texts))
            for token, piece in zip(ids, texts.pieces(ids), strict=True)
        ]

    def entries(self) -> list[tuple[int, str, TokenKind]]:
        """The tokens by number."""
        return list(self._numbers)

    def _number(self, token: int, piece: str, kind: TokenKind) -> int:
        return self._numbers.setdefault((token, piece, kind), len(self._numbers))

    def _kind(self, token: int, piece: str, texts: TokenTexts) -> TokenKind:
        key = (texts, token, piece)
        if key not in self._kinds:
            self._kinds[key] = texts.kind(token, piece)
        return self._kinds[key]
