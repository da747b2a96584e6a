"""Tokenizers are loaded once, and completions become text without what is not text."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.local import _tokenizer as module
from eval_protocol_rft.local._tokenizer import LoadedTokenizer, TokenizerError, load_tokenizer
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from tests.rollouts import chat_tokenizer

END = 256


def ids_of(text: str) -> list[int]:
    return chat_tokenizer().encode(text)


def decoded(ids: list[int], finish_reason="stop", stop_reason=None, **params) -> str:
    completion = Completion(
        token_ids=ids,
        logprobs=[-0.1] * len(ids),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        text="what the server says is not looked at",
    )
    return LoadedTokenizer.wrap(chat_tokenizer()).decode_completion(
        completion, SamplingParams(model="m", **params)
    )


def test_the_token_that_ended_the_turn_is_no_text():
    assert decoded([*ids_of("four"), END]) == "four"
    assert decoded([END]) == ""


def test_only_the_last_token_can_have_ended_the_turn():
    assert decoded([END, *ids_of("four"), END]) == "<|im_end|>four"


def test_a_completion_that_was_cut_off_keeps_all_its_tokens():
    assert decoded(ids_of("fou"), "length") == "fou"
    assert decoded([*ids_of("four"), END], "length") == "four<|im_end|>"


def test_blanks_and_letters_of_several_tokens_stay_as_they_were_sampled():
    assert decoded([*ids_of("  näïve 😀 , ok .\n"), END]) == "  näïve 😀 , ok .\n"


def test_text_ends_before_the_first_stop_string():
    params = {"stop": ("##", "END")}
    assert decoded(ids_of("a END"), **params) == "a "
    assert decoded(ids_of("a ##"), stop_reason="##", **params) == "a "
    assert decoded(ids_of("a END"), "length", **params) == "a END"
    assert decoded([*ids_of("a"), END], **params) == "a"


def test_a_stop_string_stays_where_the_server_was_told_to_keep_it():
    extra = {"include_stop_str_in_output": True}
    assert decoded(ids_of("a END"), stop=("END",), extra=extra) == "a END"


def test_a_stop_token_of_the_users_is_no_text():
    token = ids_of("!")[0]
    assert decoded([*ids_of("hey"), token], stop_reason=token) == "hey"
    assert decoded([*ids_of("hey"), token], stop_reason=None) == "hey!"


def test_a_tokenizer_is_loaded_once_whoever_asks_at_the_same_time(tokenizer_folder):
    loaded = []
    barrier = threading.Barrier(6)

    def load() -> None:
        barrier.wait()
        loaded.append(load_tokenizer(str(tokenizer_folder)))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 6
    assert all(one is loaded[0] for one in loaded)
    assert loaded[0].name == str(tokenizer_folder)


def test_the_hash_is_of_the_chat_template(tokenizer_folder):
    one, other = chat_tokenizer(), chat_tokenizer()
    hashes = [LoadedTokenizer.wrap(tokenizer).chat_template_hash for tokenizer in (one, other)]
    assert hashes[0] == hashes[1] == load_tokenizer(str(tokenizer_folder)).chat_template_hash
    other.chat_template += " "
    assert LoadedTokenizer.wrap(other).chat_template_hash != hashes[0]
    other.chat_template = None
    assert LoadedTokenizer.wrap(other).chat_template_hash is None


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
        {
            "tokenizer.json": '{"added_tokens": []}',
            "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        },
        {"tokenizer.json": "[]", "tokenizer_config.json": "[]"},
    ],
    ids=["no files", "no JSON", "no model in it", "lists"],
)
def test_a_folder_that_holds_no_tokenizer_is_an_error_that_names_it(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        TokenizerError, match=f"(?s)cannot load tokenizer '{tmp_path}'.*Name a folder"
    ):
        load_tokenizer(str(tmp_path))


def test_a_name_that_failed_is_not_tried_again_at_once(tmp_path, monkeypatch):
    """With a hub that cannot be reached, each try costs most of a minute; each row would try."""
    folder = tmp_path / "tokenizer"
    with pytest.raises(TokenizerError) as first:
        load_tokenizer(str(folder))
    chat_tokenizer().save_pretrained(folder)
    with pytest.raises(TokenizerError) as second:
        load_tokenizer(str(folder))
    assert str(second.value) == str(first.value)
    monkeypatch.setattr(module, "FAILURE_SECONDS", 0.0)
    assert load_tokenizer(str(folder)).name == str(folder)


def test_a_report_asks_a_hub_that_does_not_answer_once():
    """Its own client would try again and again: most of a minute for texts that a page can do
    without."""
    asked = []

    class Unwell(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    program = """
from eval_protocol_rft.local import TokenizerError
from eval_protocol_rft.report._page_detail import load_token_texts
try:
    load_token_texts("me/nothing")
except TokenizerError as error:
    assert "cannot load tokenizer 'me/nothing'" in str(error)
    print("refused")
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Unwell) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        server.shutdown()
    assert done.stdout == "refused\n"
    # The hub's client asks for something of its own beside it.
    assert sum("me/nothing" in path for path in asked) == 1


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match="a dict is no tokenizer"):
        LoadedTokenizer.wrap({})  # type: ignore[arg-type]


PLAIN = LoadedTokenizer.wrap(chat_tokenizer())


@given(st.text(max_size=40), st.sampled_from(["", "<|im_end|>", "<|im_start|>user\n"]))
def test_a_text_is_read_as_transformers_reads_it(text, control):
    whole = text + control + text
    assert PLAIN.is_plain
    assert PLAIN.encode(whole) == PLAIN.tokenizer(whole, add_special_tokens=False)["input_ids"]


@given(st.lists(st.integers(0, 258), max_size=12))
def test_ids_are_decoded_as_transformers_decodes_them(ids):
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert PLAIN.decode(ids) == PLAIN.tokenizer.decode(ids, **plain)


def test_a_tokenizer_with_a_reading_of_its_own_is_asked_itself():
    class Own(type(chat_tokenizer())):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.upper(), *args, **kwargs)

    own = Own(tokenizer_object=chat_tokenizer().backend_tokenizer)
    assert LoadedTokenizer.wrap(own).encode("abc") == LoadedTokenizer.wrap(own).encode("ABC")

    class Loud(type(chat_tokenizer())):
        def _decode(self, token_ids, **kwargs):
            return super()._decode(token_ids, **kwargs).upper()

    loud = LoadedTokenizer.wrap(Loud(tokenizer_object=chat_tokenizer().backend_tokenizer))
    assert loud.decode(loud.encode("abc")) == "ABC"
    truncating = chat_tokenizer()
    truncating.backend_tokenizer.enable_truncation(1)
    assert len(LoadedTokenizer.wrap(truncating).encode("abc")) == 3
