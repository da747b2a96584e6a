"""Tokenizers that write word starts as a leading blank (SentencePiece: Llama 2, Mistral, Phi-3):
what they leave out where a text begins is neither a rewrite nor a blank in the next prompt."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.episodes._template_report import template_report
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.sampling._types import Completion

WORDS = ["The", "end", "say", "more", "INST"]
PIECES = [*WORDS, *(f"▁{word}" for word in WORDS), "▁[", ".["]
SPACED = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content|trim + '</s>' }}{% endif %}{% endfor %}"
)
"""As Llama 2's: a blank before each answer."""
BARE = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def sentencepiece(template: str) -> LoadedTokenizer:
    """A BPE tokenizer with the normalizer and decoder of converted SentencePiece models."""
    letters = sorted({*string.printable, "▁"} - {" "})
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = [(word[: end - 1], word[end - 1]) for word in WORDS for end in range(2, len(word) + 1)]
    merges += [(piece[0], piece[1:]) for piece in PIECES[len(WORDS) :]]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return LoadedTokenizer.wrap(tokenizer, "pieces")


def ids_of(tokenizer: LoadedTokenizer, *pieces: str) -> list[int]:
    ids = tokenizer.tokenizer.convert_tokens_to_ids(list(pieces))
    assert isinstance(ids, list)
    return ids


def sampled(ids: list[int]) -> Completion:
    return Completion(token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop")


def begun(tokenizer: LoadedTokenizer) -> Conversation:
    return Conversation.start([{"role": "user", "content": "say"}], None, tokenizer)


MORE = [{"role": "user", "content": "more"}]


def test_an_answer_that_the_template_renders_as_it_was_sampled_is_no_rewrite() -> None:
    tokenizer = sentencepiece(SPACED)
    whole = tokenizer.encode("<s>[INST] say[/INST] The end.</s>[INST] more[/INST]")
    talk = begun(tokenizer)
    answer = ids_of(tokenizer, "▁The", "▁end", ".", "</s>")
    assert whole[: len(talk.prompt_ids) + 4] == [*talk.prompt_ids, *answer]
    assert talk.sampled(sampled(answer))["content"] == "The end."
    assert list(talk.append(MORE)) == whole
    assert not talk.rewrites
    report = template_report(tokenizer)
    assert next(case for case in report.cases if case.name == "plain turns").append_only


def test_a_blank_that_only_the_model_wrote_is_kept_where_the_template_lets_it_be() -> None:
    tokenizer = sentencepiece(BARE)
    talk = begun(tokenizer)
    talk.sampled(sampled(ids_of(tokenizer, "▁The", "▁end", ".")))
    ids = list(talk.append(MORE))
    assert tokenizer.decode(ids) == "<s> [INST] say [/INST] The end.[INST] more [/INST]"
    assert not talk.rewrites
    assert talk.messages[1]["content"] == " The end."


def test_a_blank_that_the_template_does_not_render_is_a_rewrite() -> None:
    tokenizer = sentencepiece(SPACED.replace("' ' + ", ""))
    talk = begun(tokenizer)
    talk.sampled(sampled(ids_of(tokenizer, "▁The", "</s>")))
    talk.append(MORE)
    assert len(talk.rewrites) == 1


@pytest.mark.parametrize("last", [".", "▁end", "[", "▁", "The"])
def test_what_follows_a_stop_string_has_no_blank_that_the_template_does_not_render(
    last: str,
) -> None:
    tokenizer = sentencepiece(BARE)
    answer = ids_of(tokenizer, "The", last)
    talk = begun(tokenizer)
    prompt = list(talk.prompt_ids)
    talk.sampled(sampled(answer))
    ids = list(talk.append(MORE))
    assert ids[: len(prompt) + 2] == [*prompt, *answer]
    text = f"The{last.replace('▁', ' ')}"
    assert tokenizer.decode(ids) == f"<s> [INST] say [/INST]{text}[INST] more [/INST]"
    assert not talk.rewrites


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_whatever_is_sampled_the_next_prompt_spells_the_conversation(pieces: list[str]) -> None:
    tokenizer = sentencepiece(BARE)
    talk = begun(tokenizer)
    prompt = list(talk.prompt_ids)
    talk.sampled(sampled(ids_of(tokenizer, *pieces)))
    ids = list(talk.append(MORE))
    said = "".join(pieces).replace("▁", " ")
    assert tokenizer.decode(ids) == f"{tokenizer.decode(prompt)}{said}[INST] more [/INST]"
    assert not talk.rewrites
