"""What an evaluator sees of single turns that call tools, or think."""

from __future__ import annotations

import json
import logging

import pytest
from eval_protocol.models import EvaluateResult, EvaluationRow

from eval_protocol_rft import EpisodeRolloutProcessor, FireworksTrainingRolloutProcessor
from eval_protocol_rft.episodes._environment import Environment, EpisodeLimits, Step
from eval_protocol_rft.scoring._scorer import ascore_rows, score_each_completion
from tests.rollouts import TOOLS, chat_tokenizer, record_of_row, roll_out, row_of, scripted

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
ADD = ("add", {"a": 2, "b": 3})


async def answered(text: str, finish_reason: str = "stop", *, template: str = "", **fields):
    """A row of one completion that says `text`; `fields` are the row's, but for two."""
    options = {k: fields.pop(k) for k in ("split_reasoning",) if k in fields}
    params = {"model": "any", **fields.pop("params", {})}
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=tokenizer, sampler=scripted(text, finish_reason), **options
    )
    [row] = await roll_out(processor, row_of(**fields), params)
    return row


def functions(message) -> list[tuple[str, dict]]:
    calls = message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


async def test_calls_are_fields_of_the_message_and_the_record_keeps_the_text():
    row = await answered(f"I add.\n{CALL}\n{CALL}", tools=TOOLS)
    message, metadata = row.messages[-1], row.execution_metadata
    assert message.content == "I add."
    assert functions(message) == [ADD, ADD]
    assert [call.id for call in message.tool_calls] == ["call_0", "call_1"]
    assert (metadata.finish_reason, metadata.tool_call_count) == ("tool_calls", 2)
    record = record_of_row(row)
    assert record.completions_text == [f"I add.\n{CALL}\n{CALL}"]
    assert record.finish_reasons == ["stop"]
    assert record.token_turn_traces[0]["finish_reason"] == "stop"


async def test_a_row_without_tools_has_no_calls():
    row = await answered(CALL)
    assert (row.messages[-1].content, row.messages[-1].tool_calls) == (CALL, None)
    assert row.execution_metadata.finish_reason == "stop"
    assert row.execution_metadata.tool_call_count == 0
    assert "completion_messages" not in row.execution_metadata.extra


@pytest.mark.parametrize("text", [f"{CALL}<tool_call>{{", "<tool_call>add(2, 3)</tool_call>"])
async def test_calls_of_which_one_is_broken_are_text(text):
    row = await answered(text, tools=TOOLS)
    assert (row.messages[-1].content, row.messages[-1].tool_calls) == (text, None)
    assert row.execution_metadata.finish_reason == "stop"


async def test_what_was_cut_off_stays_cut_off_though_it_called():
    row = await answered(f"{CALL}\nand", "length", tools=TOOLS)
    assert functions(row.messages[-1]) == [ADD]
    assert row.execution_metadata.finish_reason == "length"
    assert record_of_row(row).truncated == [True]


async def test_every_completion_of_a_row_is_judged_by_its_own_calls():
    row = await answered("none", tools=TOOLS, params={"n": 2, "temperature": 1.0})
    extra = row.execution_metadata.extra
    called = {**row.messages[-1].model_dump(exclude_none=True), "content": ""}
    called["tool_calls"] = [
        {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    ]
    extra["completion_messages"] = [None, called]
    seen = []

    @score_each_completion
    def judge(row: EvaluationRow) -> EvaluationRow:
        metadata = row.execution_metadata
        seen.append(
            (
                row.messages[-1].content,
                functions(row.messages[-1]),
                metadata.finish_reason,
                metadata.tool_call_count,
                "completion_messages" in metadata.extra,
            )
        )
        row.evaluation_result = EvaluateResult(score=float(bool(row.messages[-1].tool_calls)))
        return row

    [scored] = await ascore_rows([row], judge)
    assert seen == [
        ("none", [], "stop", 0, False),
        ("", [("add", {})], "tool_calls", 1, False),
    ]
    assert record_of_row(scored).rewards == [0.0, 1.0]


async def test_a_row_that_called_and_is_rolled_out_again_has_one_answer():
    tokenizer = chat_tokenizer()
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=tokenizer, sampler=scripted(CALL), drop_trailing_assistant_messages=False
    )
    row, prompts = row_of(tools=TOOLS), []
    for _ in range(2):
        [row] = await roll_out(processor, row, {"model": "any"})
        prompts.append(record_of_row(row).prompt_ids)
        assert [message.role for message in row.messages] == ["user", "assistant"]
    assert prompts[0] == prompts[1]


OPENED = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize(
    ("text", "opened", "content", "reasoning"),
    [
        ("First try: 4</think>5", False, "First try: 4</think>5", None),
        ("\nFirst try: 4\n</think>\n\n5", True, "5", "First try: 4"),
        ("<think>4</think>5", False, "5", "4"),
        ("<think>4</think>5", True, "5", "4"),
        ("so <think>4</think>5", False, "so <think>4</think>5", None),
        ("<think>4, or is it", False, "", "4, or is it"),
        ("4, or is it", True, "", "4, or is it"),
        ("5</think>", True, "", "5"),
        ("5", False, "5", None),
    ],
)
async def test_a_think_block_is_one_that_the_text_or_the_prompt_opened(
    text, opened, content, reasoning
):
    row = await answered(text, "length", params=OPENED if opened else {})
    message = row.messages[-1]
    assert (message.content, message.reasoning_content) == (content, reasoning)
    seen = []

    def judge(row: EvaluationRow) -> float:
        seen.append((row.messages[-1].content, row.messages[-1].reasoning_content))
        return 1.0

    await ascore_rows([EvaluationRow.model_validate_json(row.model_dump_json())], judge)
    assert seen == [(content, reasoning)]


async def test_what_is_thought_about_is_not_called():
    text = f"perhaps {CALL}</think>\n\n{CALL}"
    row = await answered(text, tools=TOOLS, params=OPENED)
    message = row.messages[-1]
    assert (message.content, message.reasoning_content) == ("", f"perhaps {CALL}")
    assert functions(message) == [ADD]
    row = await answered(text, tools=TOOLS, params=OPENED, split_reasoning=False)
    message = row.messages[-1]
    assert (message.content, message.reasoning_content) == (f"perhaps {CALL}</think>", None)
    assert functions(message) == [ADD]


XML = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"


async def test_a_call_in_tags_ends_thinking_that_was_not_closed():
    template = chat_tokenizer().chat_template + "{# <parameter= #}"
    row = await answered(f"I add.\n{XML}", tools=TOOLS, params=OPENED, template=template)
    message = row.messages[-1]
    assert (message.content, message.reasoning_content) == ("", "I add.")
    assert functions(message) == [("add", {"a": 2})]
    for thought in (f"{XML}?</think>", "I write <tool_call> then"):
        row = await answered(thought, tools=TOOLS, params=OPENED, template=template)
        message = row.messages[-1]
        assert (message.content, message.tool_calls) == ("", None)
        assert message.reasoning_content == thought.removesuffix("</think>")


async def test_a_model_whose_calls_cannot_be_told_calls_in_text_and_that_is_logged_once(caplog):
    template = "{{ tools }}{{ messages[0].content }}"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            row = await answered(CALL, tools=TOOLS, template=template)
    assert (row.messages[-1].content, row.messages[-1].tool_calls) == (CALL, None)
    said = [r.getMessage() for r in caplog.records if "writes tool calls" in r.getMessage()]
    assert len(said) == 1
    assert "evaluators see what the model calls as text" in said[0]


class Watching(Environment):
    """Keeps what it is shown of each turn."""

    def __init__(self, seen: list, *, done: bool, tools: list | None) -> None:
        self.seen, self.done, self.tools = seen, done, tools

    def step(self, messages, assistant):
        self.seen.append((assistant.content, assistant.reasoning_content, functions(assistant)))
        return Step(done=self.done, messages=[{"role": "user", "content": "on"}])


@pytest.mark.parametrize(
    ("text", "opened", "tools", "shown"),
    [
        (f"hm {CALL}</think>\n\nI add.\n{CALL}", True, TOOLS, ("I add.", f"hm {CALL}", [ADD])),
        (f"<think>\nhm\n</think>\n\n{CALL}", False, TOOLS, ("", "hm", [ADD])),
        ("First try: 4</think>5", False, TOOLS, ("First try: 4</think>5", None, [])),
        ("First try: 4</think>5", False, None, ("First try: 4</think>5", None, [])),
        ("4</think>5", True, None, ("5", "4", [])),
    ],
)
@pytest.mark.parametrize("done", [True, False])
async def test_episodes_show_the_same_as_single_turns(text, opened, tools, shown, done):
    seen: list = []
    processor = EpisodeRolloutProcessor(
        lambda: Watching(seen, done=done, tools=tools),
        tokenizer=chat_tokenizer(),
        sampler=scripted(text),
        limits=EpisodeLimits(turns=1),
    )
    params = OPENED if opened else {}
    [episode] = await roll_out(processor, row_of(tools=tools), {"model": "any", **params})
    single = await answered(text, tools=tools, params=params)
    assert seen == [shown]
    for row in (episode, single):
        message, metadata = row.messages[-1], row.execution_metadata
        assert (message.content, message.reasoning_content, functions(message)) == shown
        assert metadata.finish_reason == ("tool_calls" if shown[2] else "stop")
        assert metadata.tool_call_count == len(shown[2])
    finish_reasons = []

    def judge(row: EvaluationRow) -> float:
        finish_reasons.append(row.execution_metadata.finish_reason)
        return 1.0

    await ascore_rows([episode, single], judge)
    assert finish_reasons == ["tool_calls" if shown[2] else "stop"] * 2
