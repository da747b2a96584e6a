"""Which column is the prompt, and which prompts can be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval_protocol_rft.data._column_roles import check_prompt, prompt_column
from eval_protocol_rft.data.source._columns import Source, SourceRow
from eval_protocol_rft.data.source._opening import open_source
from eval_protocol_rft.data.source._urls import SourceError

USER = {"role": "user", "content": "hi"}


def source_of(folder: Path, *names: str) -> Source:
    (folder / "data.jsonl").write_text(json.dumps(dict.fromkeys(names, "x")))
    return open_source(folder / "data.jsonl")


def row_of(prompt: Any) -> SourceRow:
    return SourceRow(16, {"prompt": prompt}, "data.jsonl:17")


@pytest.mark.parametrize(
    ("names", "column"),
    [
        (("instruction", "prompt"), "prompt"),
        (("question", "messages", "problem"), "messages"),
        (("answer", "problem", "question"), "question"),
        (("problem", "instruction"), "problem"),
        (("answer", "instruction"), "instruction"),
    ],
)
def test_the_prompt_is_the_first_usual_name(names: tuple[str, ...], column: str, tmp_path: Path):
    assert prompt_column(source_of(tmp_path, *names)) == column


def test_a_column_that_is_named_is_taken(tmp_path: Path):
    assert prompt_column(source_of(tmp_path, "prompt", "text"), "text") == "text"


def test_a_column_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path):
    with pytest.raises(SourceError, match="no column 'Prompt'; the columns are 'prompt', 'text'"):
        prompt_column(source_of(tmp_path, "prompt", "text"), "Prompt")


def test_without_a_usual_name_the_option_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"the columns are 'a', 'b'\. Name it with --prompt-key"):
        prompt_column(source_of(tmp_path, "a", "b"))


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("What is 2 plus 2?", "text"),
        ('[{"role": "user", "content": "hi"}]', "messages"),
        ('[{"role": "user"}]', "text"),
        ("[1, 2]", "text"),
        ("[", "text"),
        ("[]", "text"),
        ([USER], "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "messages"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "messages"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages"),
    ],
)
def test_a_prompt_is_text_or_messages(prompt: Any, kind: Any):
    assert check_prompt(row_of(prompt), "prompt", None) == kind
    assert check_prompt(row_of(prompt), "prompt", kind) == kind


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "is null, not text or a list of messages"),
        (5, "is a number"),
        (True, "is a truth value"),
        ({"role": "user"}, "is an object"),
        (b"hi", "is a bytes"),
        ("", "is empty"),
        ([], "is empty"),
        (["hi"], "message 0 is text, not an object"),
        ([USER, None], "message 1 is null, not an object"),
        ([{"content": "hi"}], r"message 0 has no role \(its keys: content\)"),
        ([{"role": None, "content": "hi"}], "message 0 has a role that is null"),
        ([{"role": "", "content": "hi"}], "message 0 has a role that is empty"),
        ([{"role": 1, "content": "hi"}], "message 0 has a role that is a number"),
        ([USER, {"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": None}], "message 0 has null as its content"),
        ([{"role": "user", "content": 1}], "message 0 has content that is a number"),
    ],
)
def test_what_cannot_be_asked_is_named_with_its_place(prompt: Any, message: str):
    with pytest.raises(SourceError, match=rf"^data\.jsonl:17: the prompt in 'prompt':? {message}"):
        check_prompt(row_of(prompt), "prompt", None)


@pytest.mark.parametrize(
    ("prompt", "expected", "message"),
    [
        ("hi", "messages", "is text, but the rows before have a list of messages"),
        ([USER], "text", "is a list of messages, but the rows before have text"),
    ],
)
def test_a_data_set_has_prompts_of_one_kind(prompt: Any, expected: Any, message: str):
    with pytest.raises(SourceError, match=message):
        check_prompt(row_of(prompt), "prompt", expected)
