"""From messages to the prompt, and from a completion to the answer."""

from __future__ import annotations

import pytest
from eval_protocol.models import Message

from eval_protocol_rft import FireworksTrainingRolloutProcessor
from eval_protocol_rft.sampling._types import Completion
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

USER = Message(role="user", content="hi")


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


@pytest.mark.parametrize(
    ("drop", "prompt"),
    [(True, [USER]), (False, [USER, assistant("old"), assistant("older")])],
    ids=["dropped", "kept"],
)
async def test_trailing_assistant_messages_are(server, drop, prompt):
    tokenizer = chat_tokenizer()
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=tokenizer, drop_trailing_assistant_messages=drop
    )
    row = row_of("hi", assistant("old"), assistant("older"))
    [row] = await roll_out(processor, row, params_for(server))
    chat = [{"role": message.role, "content": message.content} for message in prompt]
    assert row.execution_metadata.extra["prompt_ids"] == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert row.messages[:-1] == prompt


async def test_an_assistant_message_that_was_answered_is_part_of_the_prompt(server, processor):
    row = row_of("hi", assistant("hello"), Message(role="user", content="bye"))
    [row] = await roll_out(processor, row, params_for(server))
    text = chat_tokenizer().decode(record_of_row(row).prompt_ids)
    assert "<|im_start|>assistant\nhello<|im_end|>" in text
    assert [message.role for message in row.messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("drop", [True, False])
async def test_a_row_that_is_rolled_out_again_has_one_answer(server, drop):
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), drop_trailing_assistant_messages=drop
    )
    row = row_of("hi", assistant("few-shot"), Message(role="user", content="go"))
    prompts = []
    for _ in range(3):
        [row] = await roll_out(processor, row, params_for(server))
        prompts.append(record_of_row(row).prompt_ids)
        assert [message.role for message in row.messages] == [
            "user",
            "assistant",
            "user",
            "assistant",
        ]
    assert prompts[0] == prompts[1] == prompts[2]


async def test_a_row_without_messages_is_an_error_that_names_it(server, processor):
    row = row_of(row_id="row-9")
    row.messages = []
    with pytest.raises(ValueError, match="row row-9: the row has no messages"):
        await roll_out(processor, row, params_for(server))
    row.messages = [assistant("only this")]
    with pytest.raises(ValueError, match="row row-9: the row has no messages"):
        await roll_out(processor, row, params_for(server))


@pytest.mark.parametrize(
    ("split", "content", "reasoning"),
    [(True, "42", "six by seven"), (False, "<think>\nsix by seven\n</think>\n\n42", None)],
)
async def test_a_closed_think_block_goes_to_the_reasoning_unless_switched_off(
    split, content, reasoning
):
    sampler = scripted("<think>\nsix by seven\n</think>\n\n42")
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), sampler=sampler, split_reasoning=split
    )
    [row] = await roll_out(processor, row_of(), {"model": "any"})
    assert (row.messages[-1].content, row.messages[-1].reasoning_content) == (content, reasoning)
    record = record_of_row(row)
    assert record.completions_text == ["<think>\nsix by seven\n</think>\n\n42"]
    assert record.sampling.split_reasoning is split


async def test_a_stop_string_is_in_the_ids_and_not_in_the_text():
    sampler = scripted("four END five", "length")
    ids = chat_tokenizer().encode("four END five")
    sampler.script = lambda prompt, params, seed: Completion(
        token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop", stop_reason="END"
    )
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    [row] = await roll_out(processor, row_of(), {"model": "any", "stop": "END"})
    assert row.messages[-1].content == "four "
    # The server names what ended it: what it handed out behind that is no part of it.
    assert record_of_row(row).completion_ids == [chat_tokenizer().encode("four END")]


async def test_control_tokens_inside_the_text_are_kept_for_the_evaluator_to_see():
    ids = [*chat_tokenizer().encode("a"), 256, *chat_tokenizer().encode("b")]
    sampler = scripted("")
    sampler.script = lambda prompt, params, seed: Completion(
        token_ids=ids, logprobs=[-0.5] * 3, finish_reason="length"
    )
    processor = FireworksTrainingRolloutProcessor(tokenizer=chat_tokenizer(), sampler=sampler)
    [row] = await roll_out(processor, row_of(), {"model": "any"})
    assert row.messages[-1].content == "a<|im_end|>b"


async def test_tools_and_template_arguments_are_part_of_the_prompt(server):
    processor = FireworksTrainingRolloutProcessor(
        tokenizer=chat_tokenizer(), chat_template_kwargs={"enable_thinking": False}
    )
    params = params_for(server, chat_template_kwargs={"enable_thinking": True})
    [row] = await roll_out(processor, row_of(tools=TOOLS), params)
    text = chat_tokenizer().decode(record_of_row(row).prompt_ids)
    assert text.startswith('<tools>[{"type": "function", "function": {"name": "add"')
    assert text.endswith("<|im_start|>assistant\n<think>")
    assert "tools" not in server.requests[0].body
    assert "chat_template_kwargs" not in server.requests[0].body


@pytest.mark.parametrize("spelled", ["folder", "path", "object", "completion_params"])
async def test_a_tokenizer_can_be_given_as(server, tokenizer_folder, spelled):
    given = {
        "folder": str(tokenizer_folder),
        "path": tokenizer_folder,
        "object": chat_tokenizer(),
        "completion_params": "/no/such/folder",
    }[spelled]
    params = params_for(server)
    if spelled == "completion_params":
        params["tokenizer"] = str(tokenizer_folder)
    processor = FireworksTrainingRolloutProcessor(tokenizer=given)
    [row] = await roll_out(processor, row_of(), params)
    record = record_of_row(row)
    assert record.prompt_ids == rendered("hi")
    if spelled != "object":
        assert record.sampling.tokenizer == str(tokenizer_folder)
    assert "tokenizer" not in server.requests[0].body


async def test_the_tokenizer_of_a_hub_model_is_looked_for_by_the_models_own_name(server):
    processor = FireworksTrainingRolloutProcessor()
    with pytest.raises(ValueError, match="cannot load tokenizer 'nobody/nothing'"):
        await roll_out(processor, row_of(), params_for(server, model="nobody/nothing"))
    with pytest.raises(ValueError, match=r"names no tokenizer .*: give the base model's"):
        await roll_out(processor, row_of(), params_for(server, model="accounts/a/models/b"))
    assert server.requests == []


async def test_a_samplers_own_tokenizer_renders_where_none_is_named():
    sampler = scripted("ok")
    sampler.tokenizer = chat_tokenizer()
    processor = FireworksTrainingRolloutProcessor(sampler=sampler)
    [row] = await roll_out(processor, row_of(), {"model": "accounts/x/models/y"})
    assert record_of_row(row).prompt_ids == rendered("hi")
