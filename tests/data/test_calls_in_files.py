"""Tool calls and thinking of rollouts in bulk: read when a completion comes, kept in the file, and
seen by graders and in rows of Eval Protocol as by an evaluation test."""

from __future__ import annotations

import json
from pathlib import Path

from eval_protocol_rft.data._convert import convert
from eval_protocol_rft.data._dataset import RolloutDataset
from eval_protocol_rft.data._generate import generate
from eval_protocol_rft.data._score import score
from tests.data.servers import write_jsonl
from tests.rollouts import TOOLS, chat_tokenizer, scripted

CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
GRADER = """
import json

def calls(row):
    message, metadata = row.messages[-1], row.execution_metadata
    called = [json.loads(call.function.arguments) for call in message.tool_calls or []]
    seen = [message.content, message.reasoning_content, called,
            metadata.finish_reason, metadata.tool_call_count]
    return float(seen == json.loads(row.ground_truth))
"""
THOUGHT = ["", f"2+3 {CALL}", [{"a": 2, "b": 3}], "tool_calls", 1]
NO_TOOLS = [CALL, f"2+3 {CALL}", [], "stop", 0]


def sampled(folder: Path, form: str) -> Path:
    """A file of two prompts that open a think block; only the first offers tools."""
    rows = [
        {"prompt": "2+3?", "tools": TOOLS, "ground_truth": json.dumps(THOUGHT)},
        {"prompt": "2+3?", "tools": None, "ground_truth": json.dumps(NO_TOOLS)},
    ]
    output = folder / f"out.{form}"
    generate(
        write_jsonl(folder / "d.jsonl", rows),
        output,
        {"model": "m", "n": 2, "chat_template_kwargs": {"enable_thinking": True}},
        tokenizer=chat_tokenizer(),
        sampler=scripted(f"2+3 {CALL}\n</think>\n\n{CALL}"),
    )
    return output


def test_graders_see_calls_as_fields_before_and_after_a_conversion(tmp_path):
    (tmp_path / "graders_of_calls.py").write_text(GRADER)
    output = sampled(tmp_path, "jsonl")
    score(output, f"{tmp_path / 'graders_of_calls.py'}::calls", workers=1)
    assert [row.reward for row in RolloutDataset(output)] == [1.0] * 4
    convert(output, tmp_path / "rows.jsonl", to_format="ep")
    called, plain = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    message = called["messages"][-1]
    assert (message["content"], message["reasoning_content"]) == (THOUGHT[0], THOUGHT[1])
    assert message["tool_calls"][0]["function"]["name"] == "add"
    metadata = called["execution_metadata"]
    assert (metadata["finish_reason"], metadata["tool_call_count"]) == ("tool_calls", 1)
    assert plain["messages"][-1]["content"] == CALL
    convert(tmp_path / "rows.jsonl", tmp_path / "back.parquet", to_format="rollouts")
    kept, back = RolloutDataset(output), RolloutDataset(tmp_path / "back.parquet")
    assert [row.message for row in back] == [row.message for row in kept]
    assert back.num_rows == 4
