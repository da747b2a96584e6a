"""Each token shows its own text, and all of them together the text that was sampled."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft.local._tokenizer import LoadedTokenizer, TokenizerError
from eval_protocol_rft.report._page_detail import BROKEN, TokenTexts, Vocabulary, load_token_texts

CORPUS = [
    "the cat sat on the mat",
    "où est le café",
    "日本語の文章 日本",
    "😀😃 emoji 👩\u200d🚀",
    "naïve – “quotes”",
]


def wrap(tokenizer: Tokenizer) -> LoadedTokenizer:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return LoadedTokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "test")


def byte_level() -> LoadedTokenizer:
    """Byte-level BPE, as GPT, Llama 3 and Qwen have it: a token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def byte_fallback() -> LoadedTokenizer:
    """As Llama 2 and Gemma have it: words carry their space, the first one loses it, and unknown
    characters are bytes."""
    words = ["▁the", "▁cat", "s", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(tokenizer)


def word_suffixes() -> LoadedTokenizer:
    """As the first GPT has it: the end of a word is a space, but not at the end of the text."""
    words = ["the</w>", "cat</w>", "s</w>", "c", "a", "t"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrap(tokenizer)


def word_pieces() -> LoadedTokenizer:
    """As BERT has it: a space before every token that does not go on with a word."""
    words = ["[UNK]", "the", "cat", "##s", ".", "n", "'", "t"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.WordPiece()
    return wrap(tokenizer)


MAKERS = {
    maker.__name__: maker for maker in (byte_level, byte_fallback, word_suffixes, word_pieces)
}


@functools.cache
def made(name: str) -> tuple[LoadedTokenizer, TokenTexts]:
    loaded = MAKERS[name]()
    return loaded, TokenTexts(loaded)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_of_any_ids_are_the_text_of_all_of_them(name: str, data: st.DataObject) -> None:
    loaded, texts = made(name)
    ids = data.draw(st.lists(st.integers(0, len(loaded.tokenizer) - 1), max_size=30))
    pieces = texts.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == loaded.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("a é日本😀\u200d👩🚀ß\n"), max_size=20))
def test_a_character_belongs_to_the_token_that_ends_it(text: str) -> None:
    loaded, texts = made("byte_level")
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    spelled = loaded.tokenizer.convert_ids_to_tokens(ids)
    bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    done = b""
    shown = ""
    for token, piece in zip(spelled, texts.pieces(ids), strict=True):
        done += bytes(bytes_of[symbol] for symbol in token)
        shown += piece
        assert shown == done.decode(errors="ignore")  # whole characters so far
    assert shown == text
    assert BROKEN not in shown


def byte_symbols() -> dict[int, str]:
    """Byte -> its character in a byte-level vocabulary: printable Latin-1 stands for itself, the
    other bytes, in order, for the characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_bytes_that_never_become_a_character_are_shown_as_broken() -> None:
    loaded, texts = made("byte_level")
    symbols = byte_symbols()
    ids = loaded.tokenizer.convert_tokens_to_ids([symbols[0xF0], symbols[0x9F], "a", symbols[0xC3]])
    assert texts.pieces(ids) == ["", BROKEN, "a", BROKEN]


def test_the_vocabulary_says_what_a_token_is() -> None:
    loaded, texts = made("byte_level")
    [end] = loaded.tokenizer.convert_tokens_to_ids(["<|end|>"])
    first, second = loaded.tokenizer.convert_tokens_to_ids(["Ã", "©"])
    unknown = len(loaded.tokenizer) + 7
    vocabulary = Vocabulary()
    numbers = vocabulary.numbers([first, second, unknown, end, first, second], texts)
    assert numbers == [0, 1, 2, 3, 0, 1]
    assert vocabulary.entries() == [
        (first, "", "partial"),
        (second, "é", "text"),
        (unknown, "", "unknown"),
        (end, "<|end|>", "control"),
    ]


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.numbers([5, 6, 5], None) == [0, 1, 0]
    assert vocabulary.entries() == [(5, "", "bare"), (6, "", "bare")]


def test_the_bundled_model_brings_its_tokenizer() -> None:
    assert load_token_texts("local/arithmetic").pieces([20, 12, 258])[2] == "<|im_end|>"


def test_a_bundled_models_name_alone_is_a_folder_or_hub_id_like_any_other() -> None:
    with pytest.raises(TokenizerError, match="cannot load tokenizer 'arithmetic'"):
        load_token_texts("arithmetic")
