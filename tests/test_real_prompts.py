"""Prompts of real models: their own tokenizers, their own chat templates, against transformers.

EP_RFT_TOKENIZERS names a folder that holds `qwen3/` and `llama3_1/` (CONTRIBUTING.md says where
they come from). Some copies of Llama-3.1 carry a chat template of before it knew tools; the newer
one is taken from the package `trl` where that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from eval_protocol.models import Message
from transformers import AutoTokenizer

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._prompts import PromptError, render_raw
from tests.rollouts import TOOLS
from tests.test_prompts import render_prompt

pytestmark = pytest.mark.real_tokenizers

CONVERSATIONS = {
    "one question": [{"role": "user", "content": "What is 2+2? 😀 naïve"}],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "  bye  "},
    ],
    "a tool's result": [
        {"role": "user", "content": "1+2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ],
}


def template_of_trl(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package trl is not installed")
    return Path(spec.submodule_search_locations[0], "chat_templates", name).read_text()


@pytest.fixture(scope="module", params=["qwen3", "llama3_1", "llama3_1 with trl's template"])
def tokenizer(request) -> Any:
    root = os.environ.get("EP_RFT_TOKENIZERS")
    if not root:
        pytest.skip("EP_RFT_TOKENIZERS names no folder with qwen3/ and llama3_1/ (CONTRIBUTING.md)")
    name, _, other_template = request.param.partition(" with ")
    folder = Path(root) / name
    assert (folder / "tokenizer.json").is_file(), f"{folder} holds no tokenizer.json"
    loaded = AutoTokenizer.from_pretrained(folder)
    if other_template:
        loaded.chat_template = template_of_trl("llama3_1.jinja")
    return loaded


def as_messages(chat: list[dict[str, Any]]) -> list[Message]:
    """The same conversation as Eval Protocol carries it: ids, and arguments as JSON strings."""
    messages = []
    for message in chat:
        calls = [
            {
                "id": str(i),
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"]),
                },
            }
            for i, call in enumerate(message.get("tool_calls", []))
        ]
        messages.append(Message(**{**message, "tool_calls": calls or None}))
    return messages


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompt_ids_are_those_of_apply_chat_template(tokenizer, conversation, tools):
    chat, wrapped = CONVERSATIONS[conversation], LoadedTokenizer.wrap(tokenizer)
    lost = [
        word
        for word, used in (("tools", tools), ("tool_calls", conversation == "a tool's result"))
        if used and word not in tokenizer.chat_template
    ]
    if lost:
        with pytest.raises(PromptError, match="does not render tool"):
            render_prompt(as_messages(chat), tools, wrapped, {})
        return
    expected = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True)
    ids = render_prompt(as_messages(chat), tools, wrapped, {})
    assert list(ids) == expected["input_ids"]
    assert len(ids) > 10


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinking": False}, {"date_string": "1 Jan 2026"}], ids=str
)
def test_template_arguments_change_the_prompt_where_the_template_knows_them(tokenizer, kwargs):
    chat, wrapped = CONVERSATIONS["one question"], LoadedTokenizer.wrap(tokenizer)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **kwargs)
    ids = render_prompt(as_messages(chat), None, wrapped, kwargs)
    assert list(ids) == expected["input_ids"]
    known = next(iter(kwargs)) in tokenizer.chat_template
    assert (ids != render_prompt(as_messages(chat), None, wrapped, {})) is known


@pytest.mark.parametrize("text", ["Q: 2+2?\nA:", "  naïve 😀 <|im_end|>", "<|begin_of_text|>hi"])
def test_raw_prompts_are_those_of_the_tokenizer(tokenizer, text):
    wrapped = LoadedTokenizer.wrap(tokenizer)
    chat = [{"role": "user", "content": text}]
    assert list(render_raw(chat, None, wrapped)) == tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(render_raw(chat, None, wrapped, add_special_tokens=False)) == bare


def test_control_tokens_end_a_turn_and_think_tags_are_text(tokenizer):
    special = LoadedTokenizer.wrap(tokenizer).special_ids
    vocabulary = tokenizer.get_vocab()
    names = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    enders = {vocabulary[name] for name in names if name in vocabulary}
    assert len(enders) >= 2
    assert enders <= special
    think = {vocabulary[tag] for tag in ("<think>", "</think>") if tag in vocabulary}
    assert not think & special
