"""A tokenizer of another model is noticed before its garbage is scored, one that fits never is."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as text_decoders
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.local._tokenizer import LoadedTokenizer, TokenizerError
from eval_protocol_rft.rollout._vocabulary import VocabularyWitness
from eval_protocol_rft.sampling._limits import RunStoppedError
from eval_protocol_rft.sampling._types import Completion, ContractError, SamplingParams
from tests.rollouts import (
    CHAT_TEMPLATE,
    chat_tokenizer,
    config_of,
    params_for,
    roll_out,
    row_of,
    scripted,
)
from tests.stub_server import END_OF_TURN, Changed, StubServer

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
    witness = VocabularyWitness()
    for finish_reason in ("stop", "length"):
        witness_reads(witness, completion(ids, text, finish_reason))
    witness_reads(witness, completion(ids, None))
    witness_reads(witness, completion(ids, ""))
    assert witness._different == 0


def witness_reads(witness: VocabularyWitness, completion: Completion) -> Completion:
    return FITS.read(completion, PARAMS, witness.look)


def test_texts_that_the_ids_do_not_say_end_the_run_with_the_place_and_both_texts(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    witness, ids = VocabularyWitness(), FITS.encode("the sum is 4")
    witness_reads(witness, completion(ids, "the sum is 5"))
    said = (
        "tokenizer 'ours' may not be the one of the model that sampled: the server's text and the "
        "sampled ids say different things, from character 8 on: 'thesumis5' there, 'thesumis4' here"
    )
    assert said in caplog.text
    with pytest.raises(RunStoppedError, match=r"Name the model's own, as completion_params"):
        witness_reads(witness, completion(ids, "the sum is 6"))
    with pytest.raises(RunStoppedError):
        witness.require_fit()


def test_one_long_text_is_enough_where_none_agreed() -> None:
    ids = FITS.encode("four and four are eight, and that is all there is to say of it")
    text = "five and five are ten, and nothing else is to be said of it today"
    with pytest.raises(RunStoppedError, match="tokenizer 'ours' is not the one of the model"):
        witness_reads(VocabularyWitness(), completion(ids, text))
    witness = VocabularyWitness()
    witness_reads(witness, completion(ids, FITS.decode(ids)))
    witness_reads(witness, completion(ids, text))


def test_a_server_that_says_the_same_of_all_ids_shows_nothing(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    witness = VocabularyWitness()
    for said in ("four", "five", "six and seven"):
        ids = FITS.encode(said)
        read = witness_reads(witness, completion(ids, "not what was sampled"))
        assert read.text == said
    assert caplog.text.count("say different things") == 1
    assert witness.doubt is None


def test_what_one_text_leaves_in_doubt_is_told_at_the_end() -> None:
    """Also said again and again of the same ids: a model that always answers so."""
    witness = VocabularyWitness()
    assert witness.doubt is None
    for _ in range(3):
        witness_reads(witness, completion(FITS.encode("four"), "five"))
        assert witness.doubt is not None
        assert re.match(
            r"tokenizer 'ours' may not be the one of the model that sampled: .* 'five' there, "
            r"'four' here .*\. Name the model's own, .* stand-in of the server's, nothing is wrong",
            witness.doubt,
        )
    witness_reads(witness, completion(FITS.encode("six"), "five"))
    assert witness.doubt is None


def test_a_text_that_others_outweigh_leaves_no_doubt() -> None:
    witness, ids = VocabularyWitness(), FITS.encode("four")
    for text in ("five", "four"):
        witness_reads(witness, completion(ids, text))
    assert witness.doubt is None


def test_callers_are_warned_of_a_doubt_when_they_clean_up(caplog) -> None:
    async def run(server: StubServer) -> None:
        processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
        await asyncio.gather(*processor([row_of()], config_of(params_for(server, n=1))))
        assert "may not be" not in caplog.text
        await processor.acleanup()

    with StubServer() as server:
        asyncio.run(run(server))
    (warned,) = [record for record in caplog.records if "may not be" in record.getMessage()]
    assert warned.levelname == "WARNING"


def test_texts_that_differ_now_and_then_are_faults_of_their_own() -> None:
    witness, ids = VocabularyWitness(), FITS.encode("four")
    for text in ("four", "four", "four", "five", "six"):
        assert witness_reads(witness, completion(ids, text)).text == "four"


def test_an_id_beyond_the_vocabulary_is_refused_where_no_text_explains_it() -> None:
    ids = [*FITS.encode("four"), 300]
    assert witness_reads(VocabularyWitness(), completion(ids, "four")).text == "four"
    for text in (None, ""):
        with pytest.raises(ContractError, match="tokenizer 'ours' is not the one"):
            witness_reads(VocabularyWitness(), completion(ids, text))


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_rendered_with_another_models_tokenizer_fail_and_say_so(rows) -> None:
    processor = FireworksTrainingRolloutProcessor(tokenizer=shuffled_tokenizer())

    async def run(server: StubServer) -> list[Any]:
        config = config_of(params_for(server, n=4))
        tasks = processor([row_of(f"row-{i}") for i in range(rows)], config)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await processor.acleanup()
        return found

    def in_its_own_words(reply: dict[str, Any]) -> None:
        choice = reply["choices"][0]
        ids = [token for token in choice["token_ids"] if token < END_OF_TURN]
        choice["text"] = chat_tokenizer().decode(ids)

    with StubServer() as server:
        server.script = lambda seen: Changed(in_its_own_words)
        for error in asyncio.run(run(server)):
            assert isinstance(error, RunStoppedError)
            assert "is not the one of the model" in str(error)


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
