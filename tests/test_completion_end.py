"""A completion ends, and its text ends, where the server says; the ids behind that are nobody's."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from tests.data.servers import at, succeed, texts, write_jsonl
from tests.rollouts import chat_tokenizer, params_for, record_of_row, roll_out, row_of
from tests.stub_server import Changed, StubServer

WORDS = ("a", "b", "c", "ab", "bc", "cab", "\n", "b\n")
"""Tokens of several letters, so that a stop string begins and ends within some."""


def word_tokenizer() -> LoadedTokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return LoadedTokenizer.wrap(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    )


TOKENIZER = word_tokenizer()
END = len(WORDS)


def as_a_server_ends_it(
    ids: list[int], stops: list[str], min_tokens: int, drafted: int, kept: bool
) -> tuple[int, int, str, str | int | None] | None:
    """A model of vLLM's loop: `drafted` tokens come at a time, and the text that they add is
    searched for each stop string in the order given, but for the first `min_tokens` tokens.

    Returns the ids that are handed out, those that belong to the completion, text, stop reason.
    """
    for taken in range(drafted, len(ids) + drafted, drafted):
        handed = ids[:taken]
        text = "".join(WORDS[token] for token in handed)
        searched = "".join(WORDS[token] for token in handed[: max(min_tokens, taken - drafted)])
        if len(handed) <= min_tokens:
            continue
        for stop in stops:
            at = text.find(stop, max(0, len(searched) - len(stop) + 1))
            if at >= 0:
                end = at + len(stop)
                belong = next(
                    k for k in range(len(ids) + 1) if len("".join(WORDS[t] for t in ids[:k])) >= end
                )
                return len(handed), belong, text[: end if kept else at], stop
    return None


@given(
    ids=st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=14),
    stops=st.lists(st.sampled_from(["\n", "b\n", "ab", "bc", "cab", "ca"]), min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    drafted=st.integers(1, 4),
    kept=st.booleans(),
    names=st.booleans(),
)
@example(ids=[0, 0, 0, 1, 3], stops=["ab"], min_tokens=4, drafted=1, kept=False, names=True)
def test_text_and_ids_end_where_the_server_ended_them(
    ids: list[int], stops: list[str], min_tokens: int, drafted: int, kept: bool, names: bool
) -> None:
    ended = as_a_server_ends_it(ids, stops, min_tokens, drafted, kept)
    if ended is None:
        return
    handed, belong, text, reason = ended
    extra: dict[str, Any] = {"min_tokens": min_tokens} if min_tokens else {}
    extra |= {"include_stop_str_in_output": True} if kept else {}
    params = SamplingParams(model="m", stop=tuple(stops), extra=extra)
    raw = Completion(
        token_ids=ids[:handed],
        logprobs=[-0.1 * (i + 1) for i in range(handed)],
        raw_logprobs=[-0.2 * (i + 1) for i in range(handed)],
        finish_reason="stop",
        text=text,
        stop_reason=reason if names else None,
    )
    read = TOKENIZER.read(raw, params)
    assert read.text == text
    if names:
        assert read.token_ids == ids[:belong]
    # Unnamed, several strings may fit the text.
    assert read.token_ids + read.past_end == ids[:handed]
    assert read.logprobs == raw.logprobs[: len(read.token_ids)]
    assert read.raw_logprobs == raw.raw_logprobs[: len(read.token_ids)]  # type: ignore[index]


def read(text: str, ids: list[int], reason: str | int | None = None, **params: Any) -> Completion:
    raw = Completion(
        token_ids=ids,
        logprobs=[-0.5] * len(ids),
        finish_reason="stop",
        text=text,
        stop_reason=reason,
    )
    return LoadedTokenizer.wrap(chat_tokenizer()).read(raw, SamplingParams(model="m", **params))


def ids_of(text: str) -> list[int]:
    return chat_tokenizer().encode(text)


def test_a_control_token_behind_the_stop_string_is_not_what_ended_it():
    completion = read("ab ", ids_of("ab STOP cd<|im_end|>"), "STOP", stop=("STOP",))
    assert (completion.text, completion.token_ids) == ("ab ", ids_of("ab STOP"))
    assert completion.past_end == ids_of(" cd<|im_end|>")
    unnamed = read("ab ", ids_of("ab STOP cd<|im_end|>"), stop=("STOP",))
    assert unnamed == Completion(
        **{
            name: getattr(completion, name)
            for name in Completion.__slots__
            if name != "stop_reason"
        }
    )


def test_a_stop_string_that_servers_overlooked_is_part_of_an_answer_that_a_token_ended():
    ids = ids_of("a\nb<|im_end|>")
    completion = read("a\nb", ids, stop=("\n",), extra={"min_tokens": 3})
    assert (completion.text, completion.token_ids) == ("a\nb", ids)


def test_a_control_token_named_as_a_stop_string_is_the_end_of_the_turn():
    ids = ids_of("hey<|im_end|>")
    completion = read("hey", ids, "<|im_end|>", stop=("<|im_end|>",))
    assert (completion.text, completion.token_ids) == ("hey", ids)
    assert LoadedTokenizer.wrap(chat_tokenizer()).ender(completion) == 256


def test_tokens_behind_the_stop_token_that_the_server_names_are_cut():
    dot = ids_of(".")[0]
    completion = read("foo", ids_of("foo. bar"), dot, extra={"stop_token_ids": [dot]})
    assert (completion.text, completion.token_ids) == ("foo", ids_of("foo."))


def test_a_pattern_that_the_server_matched_ends_where_its_text_does():
    completion = read("sum 12", ids_of("sum 12 34"), r" \d\d", extra={"stop_regex": r" \d\d"})
    assert (completion.text, completion.token_ids) == ("sum 12", ids_of("sum 12 34"))


def test_control_tokens_that_the_server_left_out_of_its_text_do_not_hide_the_place():
    ids = ids_of("a\n<|im_end|>b\nc\n")
    completion = read("a\nb", ids, "\n", stop=("\n",))
    assert completion.text == "a\n<|im_end|>b"
    assert completion.token_ids == ids_of("a\n<|im_end|>b\n")


def test_what_sglang_says_is_what_vllm_says():
    dot = ids_of(".")[0]

    def ended(seen: Any) -> Changed:
        name = "matched_stop" if seen.body["model"] == "sglang" else "stop_reason"

        def change(reply: dict[str, Any]) -> None:
            ids = ids_of("foo.")
            (choice,) = reply["choices"]
            choice |= {"text": "foo", "token_ids": ids, name: dot, "raw_output": None}
            choice["finish_reason"] = "stop"
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(ids)}
            reply["usage"] = None

        return Changed(change)

    with StubServer() as server:
        server.script = ended
        texts = {
            model: record_of_row(
                asyncio.run(
                    roll_out(
                        FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer()),
                        row_of(),
                        params_for(server, model=model, stop_token_ids=[dot]),
                    )
                )[0]
            ).completions_text
            for model in ("vllm", "sglang")
        }
    assert texts == {"vllm": ["foo"], "sglang": ["foo"]}


def test_ids_that_no_evaluator_saw_are_on_record_and_in_no_other_list(tmp_path, tokenizer_folder):
    def ended(seen: Any) -> Changed:
        def change(reply: dict[str, Any]) -> None:
            ids = ids_of("ab STOP cd")
            (choice,) = reply["choices"]
            choice |= {"text": "ab ", "token_ids": ids, "stop_reason": "STOP", "raw_output": None}
            choice["finish_reason"] = "stop"
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(ids)}

        return Changed(change)

    with StubServer() as server:
        server.script = ended
        processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer())
        params = params_for(server, stop=["STOP"], n=2)
        (row,) = asyncio.run(roll_out(processor, row_of(), params))
        data, output = write_jsonl(tmp_path / "d.jsonl", texts(1)), tmp_path / "out.jsonl"
        options = [*at(server, tokenizer_folder), "--stop", "STOP", "--max-tokens", 32]
        succeed("generate", data, "-o", output, *options)
    (stored,) = RolloutDataset(output)
    assert stored.past_end.tolist() == ids_of(" cd")
    assert stored.completion_ids.tolist() == ids_of("ab STOP")
    record = record_of_row(row)
    assert record.completion_ids == [ids_of("ab STOP")] * 2
    assert record.completions_text == ["ab "] * 2
    assert record.sampling.past_end == [ids_of(" cd")] * 2
    assert row.messages[-1].content == "ab "
