"""Sampled ids to text, token by token: what each id adds, its bytes, and where it starts. Pure.

Invariant: text comes from ids. The deltas between offsets, joined, are exactly the completion's
text, whatever the tokenizer does with spaces, control tokens or half a character.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from eval_protocol_rft.sampling.types import Completion, SamplingParams
from eval_protocol_rft.tokenizer import LoadedTokenizer

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of one character in UTF-8: no more tokens than that can be waiting for their end."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback name a single byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """One completion as text. T = number of sampled tokens."""

    text: str
    """Without the end-of-turn token and without a stop string."""
    raw_text: str
    """All of it, control tokens and stop string included."""
    tokens: list[str]
    """[T] each token's own text, control tokens included."""
    bytes: list[list[int]]
    """[T] UTF-8 of each token; joined they spell the text, also where a token is half a character.
    Empty for control tokens."""
    offsets: list[int]
    """[T+1] token i adds `text[offsets[i]:offsets[i + 1]]`: nothing when it only begins a
    character, or lies in a stop string."""


def spell(tokenizer: LoadedTokenizer, completion: Completion, params: SamplingParams) -> Spelling:
    """Spell a completion, with its own text where the sampler gave one."""
    ids = completion.token_ids
    text = completion.text
    if text is None:
        text = tokenizer.decode_completion(completion, params)
    raw_text = tokenizer.decode(ids)
    alone = {token: tokenizer.decode([token]) for token in set(ids)}
    added = [alone[token] for token in ids]
    if "".join(added) != raw_text:
        added = _added_in_place(tokenizer.decode, ids)
    tokens = [
        part if part.endswith(alone[token]) and _HALF_A_CHARACTER not in part else alone[token]
        for token, part in zip(ids, added, strict=True)
    ]
    ends = [min(end, len(text)) for end in accumulate(map(len, added))]
    return Spelling(
        text=text,
        raw_text=raw_text,
        tokens=tokens,
        bytes=[
            [] if token in tokenizer.special_ids else _bytes(tokenizer, token, own)
            for token, own in zip(ids, tokens, strict=True)
        ],
        offsets=[0, *ends[:-1], len(text)],
    )


def _added_in_place(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """[T] what each token adds to the decoded text, where that is not what it spells alone: the
    space that begins a text may be stripped, a character may take several tokens. So each is
    decoded after the ones before it; only the last few of them, to stay linear."""
    added: list[str] = []
    start = done = 0
    shown = ""
    for end in range(1, len(ids) + 1):
        seen = decode(ids[start:end])
        waiting = end - done < _LONGEST_CHARACTER and end < len(ids)
        if waiting and seen.endswith(_HALF_A_CHARACTER):
            added.append("")
            continue
        added.append(seen[len(shown) :])
        start, done = done, end
        shown = decode(ids[start:done])
    return added


def _bytes(tokenizer: LoadedTokenizer, token: int, own: str) -> list[int]:
    if _HALF_A_CHARACTER not in own:
        return list(own.encode())
    name = str(tokenizer.tokenizer.convert_ids_to_tokens(token))
    if byte := _BYTE_TOKEN.fullmatch(name):
        return [int(byte[1], 16)]
    if all(letter in _BYTE_OF_LETTER for letter in name):
        return [_BYTE_OF_LETTER[letter] for letter in name]
    return list(own.encode())


def _byte_level_alphabet() -> dict[str, int]:
    """The letters that byte-level BPE vocabularies write bytes with (Radford et al. 2019, GPT-2):
    printable Latin-1 stands for itself, the other bytes follow from U+0100 in order."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in itself)
    return {chr(byte): byte for byte in itself} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_level_alphabet()
