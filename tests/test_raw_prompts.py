"""Raw prompts are the text as the tokenizer reads it, chat templates can be named, and an answer to
raw text is plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import EvaluationRow, Message
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval_protocol_rft import EpisodeRolloutProcessor, FireworksTrainingRolloutProcessor, data
from eval_protocol_rft.data import RolloutDataset
from eval_protocol_rft.episodes._environment import RetryWithFeedback
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.rollout import PromptError, RolloutRequest, render_request
from eval_protocol_rft.sampling import SamplingParams
from tests.data.servers import at, refused, rows_by_pair, succeed, write_jsonl
from tests.rollouts import (
    TOOLS,
    chat_tokenizer,
    params_for,
    record_of_row,
    rendered,
    roll_out,
    row_of,
    scripted,
)
from tests.serving import byte_tokenizer
from tests.stub_server import StubServer

TEXT = "1+1= ü <|im_end|>"
BYTES = byte_tokenizer().encode(TEXT)
BOS = len(byte_tokenizer())
THOUGHT = "<think>two</think>2"


def base_tokenizer() -> PreTrainedTokenizerFast:
    """A base model's: `<s>` goes before every text, and there is no chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_tokenizer().save_pretrained(folder)
    return folder


def raw(*messages: dict[str, Any], tools: Any = None, **settings: Any) -> list[int]:
    request = RolloutRequest(params=SamplingParams(model="m"), n=1, raw=True, **settings)
    return list(render_request(messages, tools, LoadedTokenizer.wrap(base_tokenizer()), request))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("column", ["text", "messages"])
def test_generate_sends_what_the_tokenizer_reads(
    column: str, base: Path, server: StubServer, tmp_path: Path
) -> None:
    value = TEXT if column == "text" else [user(TEXT)]
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": value}])
    output = tmp_path / "o.parquet"
    succeed("generate", rows, "-o", output, "-n", 2, "--raw", *at(server, base))
    expected = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    assert expected == [BOS, *BYTES]
    assert {seen.prompt for seen in server.requests} == {tuple(expected)}
    assert {seen.path for seen in server.requests} == {"/v1/completions"}
    assert [row["prompt_ids"] for row in rows_by_pair(output).values()] == [expected] * 2
    [row] = RolloutDataset(output).evaluation_rows()
    assert row.messages[0].content == TEXT
    sampling = record_of_row(row).sampling
    assert (sampling.raw, sampling.add_special_tokens) == (True, True)
    assert (sampling.chat_template_hash, sampling.split_reasoning) == (None, False)


def test_without_special_tokens_a_job_is_another(
    base: Path, server: StubServer, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": TEXT}])
    command = ["generate", rows, "-o", tmp_path / "o.parquet", "--raw", *at(server, base)]
    succeed(*command, "--no-add-special-tokens")
    assert {seen.prompt for seen in server.requests} == {tuple(BYTES)}
    assert "add_special_tokens: False there, True asked for" in refused(*command)


async def test_the_processor_keeps_the_answer_as_plain_text() -> None:
    tokenizer = chat_tokenizer()
    processor = FireworksTrainingRolloutProcessor(tokenizer=tokenizer, sampler=scripted(THOUGHT))
    for asked, content in ((True, THOUGHT), (False, "2")):
        [row] = await roll_out(processor, row_of(TEXT), {"model": "m", "raw": asked})
        record = record_of_row(row)
        assert record.prompt_ids == (BYTES if asked else rendered(TEXT))
        assert row.messages[-1].content == content
        assert record.sampling.raw is asked
        assert record.completions_text == [THOUGHT]


async def test_a_file_keeps_the_answer_as_plain_text(tmp_path: Path) -> None:
    rows, output = write_jsonl(tmp_path / "d.jsonl", [user(TEXT) | {"prompt": TEXT}]), "o.parquet"
    params = {"model": "m", "raw": True}
    await data.agenerate(
        rows, tmp_path / output, params, tokenizer=chat_tokenizer(), sampler=scripted(THOUGHT)
    )
    [row] = RolloutDataset(tmp_path / output).evaluation_rows()
    assert (row.messages[-1].content, row.messages[-1].reasoning_content) == (THOUGHT, None)


@pytest.mark.parametrize(
    ("messages", "tools", "said"),
    [
        ([user("a"), {"role": "assistant", "content": "b"}, user("c")], None, "3 messages"),
        ([{"role": "system", "content": "s"}, user("a")], None, "system, user"),
        ([{"role": "system", "content": "s"}], None, "a system's"),
        ([user("a")], TOOLS, "no place for tools"),
    ],
)
def test_what_is_not_one_text_is_refused_with_a_way_out(messages, tools, said) -> None:
    with pytest.raises(PromptError, match=said) as error:
        raw(*messages, tools=tools)
    assert "--chat-template chatml" in str(error.value)


def test_empty_text_has_a_prompt_only_where_the_tokenizer_begins_it() -> None:
    assert raw(user("")) == [BOS]
    with pytest.raises(PromptError, match="empty"):
        raw(user(""), add_special_tokens=False)


def test_a_start_that_stands_there_twice_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert raw(user("<s>hi"))[:2] == [BOS, BOS]
    assert "begins with <s> twice" in caplog.text
    caplog.clear()
    assert raw(user("<s>hi"), add_special_tokens=False)[0] == BOS
    assert not caplog.text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--system", "be brief"], "no place for a system message"),
        (["--chat-template", "chatml"], "leave out either raw or chat_template"),
        (["--chat-template-kwargs", '{"a": 1}'], "leave out either raw or a"),
        (["--episodes", "x.py::Y"], "no place for turns of an episode"),
    ],
)
def test_raw_text_goes_with_nothing_that_renders(flags, said, base, server, tmp_path) -> None:
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": TEXT}])
    command = ["generate", rows, "-o", tmp_path / "o.parquet", "--raw", *at(server, base)]
    assert said in refused(*command, *flags)
    assert not server.requests


async def test_episodes_refuse_raw_text(server: StubServer) -> None:
    processor = EpisodeRolloutProcessor(lambda: RetryWithFeedback(lambda row: 0.0))
    with pytest.raises(ValueError, match=r"raw.*EpisodeRolloutProcessor"):
        await roll_out(processor, row_of(), params_for(server, raw=True))
    assert not server.requests


def test_a_model_without_a_chat_template_names_both_ways_out(base, server, tmp_path) -> None:
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": TEXT}])
    said = refused("generate", rows, "-o", tmp_path / "o.parquet", *at(server, base))
    assert "--raw" in said
    assert "--chat-template" in said


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("named", ["chatml", "file", "tokenizer", "text"])
def test_a_chat_template_has_a_name_a_file_or_a_tokenizer(
    named: str, base, server, tmp_path, tokenizer_folder: Path
) -> None:
    template = "Q: {{ messages[0].content }}\nA:"
    (tmp_path / "qa.jinja").write_text(template)
    given, expected = {
        "chatml": ("chatml", CHATML.format("hi")),
        "file": (tmp_path / "qa.jinja", "Q: hi\nA:"),
        "text": (template, "Q: hi\nA:"),
        "tokenizer": (tokenizer_folder, CHATML.format("hi")),
    }[named]
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi"}])
    command = ["generate", rows, "-o", tmp_path / "o.parquet", *at(server, base)]
    succeed(*command, "--chat-template", given)
    assert {seen.prompt for seen in server.requests} == {tuple(byte_tokenizer().encode(expected))}
    assert "chat_template_hash" in refused(*command, "--chat-template", "{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("named", "said"),
    [("gone.jinja", "there is no such file"), ("nobody/nothing", "neither a file nor a tokenizer")],
)
def test_a_chat_template_that_is_nowhere(named, said, base, server, tmp_path) -> None:
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi"}])
    command = ["generate", rows, "-o", tmp_path / "o.parquet", *at(server, base)]
    message = refused(*command, "--chat-template", named)
    assert said in message
    assert "chatml" in message


async def test_a_template_of_marks_that_are_no_tokens_is_told_once(
    server: StubServer, caplog: pytest.LogCaptureFixture
) -> None:
    processor = FireworksTrainingRolloutProcessor(tokenizer=base_tokenizer())
    rows: list[EvaluationRow] = [row_of("a"), row_of("b", row_id="row-2")]
    done = await roll_out(processor, rows, params_for(server, chat_template="chatml"))
    assert caplog.text.count("the chat template writes <|im_start|>, and") == 1
    assert record_of_row(done[0]).sampling.chat_template_hash is not None
    assert done[0].messages[0] == Message(role="user", content="a")
