"""Which prompts and tools a data set holds, whatever it keeps them in."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval_protocol_rft.data._dataset import RolloutDataset
from tests.data.servers import at, refused, succeed, texts, write_jsonl
from tests.rollouts import TOOLS
from tests.serving import byte_tokenizer
from tests.stub_server import StubServer

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
UNLIKE = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": TOOLS,
    },
    {
        "messages": [
            {"role": "user", "content": "who?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "search", "arguments": {"q": "who"}}}],
            },
            {"role": "tool", "content": "me", "tool_call_id": "2"},
        ],
        "tools": [SEARCH],
    },
]
"""Tools and calls with other keys in every row: one struct of Arrow has them all."""


def prompts_of(data: Path, output: Path, server: StubServer, folder: Path) -> list[str]:
    succeed("generate", data, "-o", output, *at(server, folder))
    return [byte_tokenizer().decode(row.prompt_ids) for row in RolloutDataset(output)]


def test_keys_that_other_rows_have_are_in_no_prompt(tmp_path, server, tokenizer_folder):
    data = write_jsonl(tmp_path / "d.jsonl", UNLIKE)
    expected = prompts_of(data, tmp_path / "1.parquet", server, tokenizer_folder)
    assert '{"name": "search", "arguments": {"q": "who"}}' in expected[1]
    pq.write_table(pa.Table.from_pylist(UNLIKE), tmp_path / "d.parquet")
    arrow = tmp_path / "d.parquet"
    assert "null" in json.dumps(pq.read_table(arrow).to_pylist())
    assert prompts_of(arrow, tmp_path / "2.parquet", server, tokenizer_folder) == expected
    datasets.Dataset.from_list(UNLIKE).save_to_disk(tmp_path / "hf")
    assert prompts_of(tmp_path / "hf", tmp_path / "3.parquet", server, tokenizer_folder) == expected
    stored = [row.tools for row in RolloutDataset(tmp_path / "3.parquet")]
    assert stored == [TOOLS, [SEARCH]]


@pytest.mark.parametrize("tools", ["list", "each"])
def test_messages_and_tools_as_json_text_are_read_and_that_is_said(
    tmp_path, server, tokenizer_folder, caplog, tools
):
    plain = write_jsonl(tmp_path / "d.jsonl", UNLIKE)
    expected = prompts_of(plain, tmp_path / "1.parquet", server, tokenizer_folder)
    assert not caplog.records
    rows = [
        {
            "messages": json.dumps(row["messages"]),
            "tools": json.dumps(row["tools"])
            if tools == "list"
            else [json.dumps(tool) for tool in row["tools"]],
        }
        for row in UNLIKE
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    written = tmp_path / "d.parquet"
    assert prompts_of(written, tmp_path / "2.parquet", server, tokenizer_folder) == expected
    assert "2 of 2 prompts in 'messages' are lists of messages written as JSON text" in caplog.text


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (
            "{broken",
            "or the JSON text of one; its text is no JSON",
        ),
        ('"add"', "'tools' must be a list of tools"),
        (
            ["add"],
            "or the JSON text of one; its text is no JSON",
        ),
        ('{"name": "add"}', "'tools' must be a list of tools"),
    ],
)
def test_tools_that_are_none_are_refused_before_anything_is_asked(
    tmp_path, server, tokenizer_folder, tools, message
):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "tools": tools}])
    said = refused("generate", data, "-o", tmp_path / "o.parquet", *at(server, tokenizer_folder))
    assert "d.jsonl:1: 'tools' must be a list of tools" in said
    assert message in said
    assert not server.requests


def test_a_text_that_the_tokenizer_reads_otherwise_is_told_at_the_end(
    tmp_path, server, tokenizer_folder, caplog
):
    data = write_jsonl(tmp_path / "d.jsonl", texts(1))
    output = tmp_path / "out.parquet"
    succeed("generate", data, "-o", output, *at(server, tokenizer_folder), "-n", 1)
    (warned,) = caplog.records
    assert "may not be the one of the model that sampled" in warned.getMessage()
