"""A tokenizer of another model is noticed before its garbage is scored, one that fits never is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as text_decoders
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.processor import RolloutError
from eval_protocol_rft.sampling.types import Completion, ContractError, SamplingParams
from eval_protocol_rft.tokenizer import LoadedTokenizer, TokenizerError
from tests.rollouts import CHAT_TEMPLATE, chat_tokenizer, params_for, roll_out, row_of, scripted
from tests.stub_server import StubServer

FITS = LoadedTokenizer.wrap(chat_tokenizer(), "ours")
PARAMS = SamplingParams(model="m", stop=("STOP",))


def shuffled_tokenizer(*, size: int = 256) -> PreTrainedTokenizerFast:
    """The same bytes under other ids, and no more of them than `size`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)[:size]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = text_decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def completion(ids: list[int], text: str | None, finish_reason: Any = "stop") -> Completion:
    return Completion(
        token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason=finish_reason, text=text
    )


@given(
    st.text(min_size=1, max_size=12) | st.binary(min_size=1, max_size=12),
    st.sampled_from(["all", "without control tokens", "stripped", "cut", "with half a character"]),
    st.sampled_from([[], [256], [256, 72]]),
)
def test_what_servers_do_to_a_text_proves_nothing(
    said: str | bytes, shown: str, end: list[int]
) -> None:
    """Any ids, also those that spell halves of characters or a control token's name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = [
        letters.index(letter)
        for data in [said.encode(errors="replace") if isinstance(said, str) else said]
        for byte in data
        for letter in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
            bytes([byte]).decode("latin-1")
        )[0][0][-1:]
    ] + end
    own = chat_tokenizer()
    text = {
        "all": own.decode(ids),
        "without control tokens": own.decode(ids, skip_special_tokens=True),
        "stripped": own.decode(ids, skip_special_tokens=True).strip(),
        "cut": own.decode(ids)[: len(ids) // 2],
        "with half a character": own.decode(ids[:-1]) + "\ufffd",
    }[shown]
    for finish_reason in ("stop", "length"):
        FITS.read(completion(ids, text, finish_reason), PARAMS)
    FITS.read(completion(ids, None), PARAMS)
    FITS.read(completion(ids, ""), PARAMS)


def test_a_text_that_the_ids_do_not_say_is_refused_with_the_place_and_both_texts() -> None:
    ids = FITS.encode("the sum is 4")
    with pytest.raises(
        ContractError,
        match=r"tokenizer 'ours' is not the one of the model.*from character 8 on: "
        r"'thesumis5' there, 'thesumis4' here.*Name the model's own, as completion_params",
    ):
        FITS.read(completion(ids, "the sum is 5"), PARAMS)


def test_an_id_beyond_the_vocabulary_is_refused_unless_the_text_is_the_same() -> None:
    ids = [*FITS.encode("four"), 300]
    assert FITS.read(completion(ids, "four"), PARAMS).text == "four"
    for text in ("four!", None, ""):
        with pytest.raises(ContractError, match="tokenizer 'ours' is not the one"):
            FITS.read(completion(ids, text), PARAMS)


def test_rows_rendered_with_another_models_tokenizer_fail_and_say_so() -> None:
    processor = FireworksTrainingRolloutProcessor(tokenizer=shuffled_tokenizer())
    with StubServer() as server, pytest.raises(RolloutError, match="is not the one of the model"):
        asyncio.run(roll_out(processor, row_of(), params_for(server, n=2)))


def test_a_sampler_that_knows_its_tokenizer_is_asked_before_anything_is_sampled() -> None:
    sampler = scripted("four")
    sampler.tokenizer = chat_tokenizer()  # type: ignore[attr-defined]
    processor = FireworksTrainingRolloutProcessor(tokenizer=shuffled_tokenizer(), sampler=sampler)
    with pytest.raises(TokenizerError, match=r"id 0 is '.' to one and '.' to the other"):
        asyncio.run(roll_out(processor, row_of(), {"model": "any"}))
    assert not sampler.asked
    same = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    (row,) = asyncio.run(roll_out(same, row_of(), {"model": "any"}))
    assert row.messages[-1].content == "four"
