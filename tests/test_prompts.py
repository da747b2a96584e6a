"""Prompts are what the chat template renders, or an error that says why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eval_protocol.models import Message

from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._answers import assistant_message
from eval_protocol_rft.rollout._prompts import (
    PromptError,
    chat_messages,
    render_chat,
    rendered_otherwise,
)
from eval_protocol_rft.sampling._types import TokenIds
from tests.rollouts import TOOLS, chat_tokenizer

USER = Message(role="user", content="hi")


def call(arguments: str, name: str = "add") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def loaded(template: str | None = "") -> LoadedTokenizer:
    """The test tokenizer, with another chat template where one is given."""
    tokenizer = chat_tokenizer()
    if template != "":
        tokenizer.chat_template = template
    return LoadedTokenizer.wrap(tokenizer, "tok")


def render_prompt(messages: Any, tools: Any, tokenizer: LoadedTokenizer, kwargs: Any) -> TokenIds:
    return render_chat(chat_messages(messages, tokenizer), tools, tokenizer, kwargs)


def render(*messages: Message, tools: Any = None, template: str | None = "", **kwargs: Any) -> str:
    """The text of the prompt's ids."""
    tokenizer = loaded(template)
    return tokenizer.decode(list(render_prompt(messages, tools, tokenizer, kwargs)))


def test_a_prompt_ends_where_the_assistant_starts_to_speak():
    system = Message(role="system", content="be brief")
    assert render(system, USER) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_prompt_is_token_ids_that_know_their_json():
    ids = render_prompt([USER], None, loaded(), {})
    assert isinstance(ids, TokenIds)
    assert json.loads(ids.json) == list(ids)
    assert all(type(token) is int for token in ids)


def test_a_single_text_part_is_a_string():
    parts = Message(role="user", content=[{"type": "text", "text": "hi"}])
    assert render(parts) == render(USER)


def test_earlier_reasoning_and_tool_calls_reach_the_template():
    answered = Message(
        role="assistant",
        content="",
        reasoning_content="add them",
        tool_calls=[call('{"a": 1, "b": 2}')],
    )
    result = Message(role="tool", content="3", tool_call_id="1", name="add")
    text = render(USER, answered, result, tools=TOOLS)
    assert "<think>add them</think>" in text
    # As an object, not as a string with escaped quotes.
    assert '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text


@pytest.mark.parametrize("content", [None, ""])
def test_a_message_of_tool_calls_needs_no_content(content):
    answered = Message(role="assistant", content=content, tool_calls=[call("")])
    assert '"arguments": {}' in render(USER, answered, USER)


def test_names_and_ids_of_tools_reach_the_template():
    template = "{{ messages[0].name }}/{{ messages[1].tool_call_id }}"
    first = Message(role="user", content="x", name="ada")
    second = Message(role="tool", content="y", tool_call_id="call-7")
    assert render(first, second, template=template) == "ada/call-7"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TEXT = {"type": "text", "text": "a"}

BROKEN = {
    "no messages": ([], {}, "no messages to answer"),
    "an image": (
        [Message(role="user", content=[IMAGE])],
        {},
        r"messages\[0\].content has the parts \['image_url'\]",
    ),
    "text and an image": (
        [USER, Message(role="user", content=[TEXT, IMAGE])],
        {},
        r"messages\[1\].content has the parts \['text', 'image_url'\]",
    ),
    "no text part": ([Message(role="user", content=[])], {}, r"messages\[0\].content"),
    "nothing said": (
        [USER, Message(role="assistant", content=None)],
        {},
        r"messages\[1\] \(assistant\) has neither content nor tool calls",
    ),
    "arguments that are not JSON": (
        [USER, Message(role="assistant", content="", tool_calls=[call("{a: 1}")])],
        {},
        r"messages\[1\]: arguments of tool call 'add' are not JSON",
    ),
    "a function call of the old kind": (
        [
            Message(role="assistant", content="x", function_call={"name": "f", "arguments": ""}),
            USER,
        ],
        {},
        r"messages\[0\] has a function_call.*use tool_calls",
    ),
    "no chat template": ([USER], {"template": None}, "'tok' has no chat template"),
    "a template that is not one": (
        [USER],
        {"template": "{% if %}"},
        "chat template of 'tok' failed",
    ),
    "a template that refuses": (
        [USER],
        {"template": "{{ raise_exception('roles must alternate') }}"},
        "failed: TemplateError: roles must alternate",
    ),
    "a template that stumbles": (
        [USER],
        {"template": "{{ messages[0].content + 1 }}"},
        "failed: TypeError",
    ),
    "a template that divides by zero": (
        [USER],
        {"template": "{{ 1 // 0 }}"},
        "failed: ZeroDivisionError",
    ),
    "a template that says nothing": ([USER], {"template": "{# #}"}, "rendered nothing"),
    "a template without tools": (
        [USER],
        {"template": "{{ messages[0].content }}", "tools": TOOLS},
        "does not render tools: the model would never see",
    ),
    "a template without tool calls": (
        [USER, Message(role="assistant", content="", tool_calls=[call("{}")]), USER],
        {"template": "{% for message in messages %}{{ message.content }}{% endfor %}"},
        "does not render tool calls",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_there_is_no_prompt_for(what):
    messages, options, message = BROKEN[what]
    with pytest.raises(PromptError, match=message):
        render(*messages, **options)


def test_template_arguments_are_passed_on():
    assert render(USER, enable_thinking=True).endswith("<|im_start|>assistant\n<think>")
    assert render(USER, enable_thinking=False).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "name",
    [
        "conversation",
        "tools",
        "add_generation_prompt",
        "tokenize",
        "return_dict",
        "chat_template",
        "truncation",
        "continue_final_message",
    ],
)
def test_a_template_argument_that_is_not_the_users_to_set(name):
    with pytest.raises(PromptError, match=f"must not set {name}"):
        render_prompt([USER], None, loaded(), {name: True})


def test_tools_are_optional_and_an_empty_list_is_none():
    assert render(USER, tools=[]) == render(USER, tools=None) == render(USER)


def said(text: str, *, split: bool = True) -> tuple[str | None, str | None]:
    message = assistant_message(text, split_reasoning=split)
    assert message.role == "assistant"
    assert message.tool_calls is None
    return message.content, message.reasoning_content


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("42", "42", None),
        ("", "", None),
        ("<think>\nwhy\n</think>\n\n42", "42", "why"),
        ("\n<think>why</think>42", "42", "why"),
        ("<think></think>42", "42", ""),
        ("why\n</think>\n\n42", "42", "why"),  # the prompt opened the block
        ("<think>why", "<think>why", None),
        ("so <think>why</think>42", "so <think>why</think>42", None),
        ("<think>a</think>b</think>c", "b</think>c", "a"),
        ("<think>\n  indented\n</think>\n  kept", "  kept", "  indented"),
    ],
)
def test_a_closed_think_block_at_the_start_is_the_reasoning(text, content, reasoning):
    assert said(text) == (content, reasoning)
    assert said(text, split=False) == (text, None)


def test_a_role_that_the_template_drops_is_refused():
    template = "{% for m in messages if m.role != 'critic' %}{{ m.content }}{% endfor %}"
    critic = Message(role="critic", content="be brief")
    with pytest.raises(PromptError, match="does not render the role 'critic'"):
        render(critic, USER, template=template)
    assert "be brief" in render(critic, USER)


DROPS = "{% for m in messages if m.role != 'developer' %}{{ m.role }}: {{ m.content }};{% endfor %}"
RAISES = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }};{% endfor %}"
)


@pytest.mark.parametrize("template", [DROPS, RAISES])
def test_a_developer_is_the_system_to_a_template_without_that_role(template):
    developer = Message(role="developer", content="be brief")
    assert render(developer, USER, template=template) == "system: be brief;user: hi;"
    assert rendered_otherwise([developer, USER], loaded(template)) == [
        "messages[0]: the role developer as system"
    ]
    assert render(developer, USER).startswith("<|im_start|>developer\nbe brief")
    assert rendered_otherwise([developer, USER], loaded()) == []


def test_text_parts_are_joined_by_line_breaks_as_vllm_joins_them():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    message = Message(role="user", content=[TEXT, TEXT])
    assert render(message) == render(Message(role="user", content="a\na"))
    assert rendered_otherwise([USER, message], loaded()) == [
        "messages[1]: 2 text parts, joined by line breaks"
    ]
    assert chat_messages([{"role": "user", "content": parts}])[0]["content"] == "a\nb"


THOUGHTS = [{"reasoning_content": "2 + 3."}, {"reasoning": "2 + 3."}, {"thinking": "2 + 3."}]
READS = [
    "{{ m.thinking }}",
    "{% if 'thinking' in m %}{{ m['thinking'] }}{% endif %}",
    "{{ m.get('reasoning') }}",
    "{{ m['reasoning'] or m.reasoning_content }}",
    "{{ m.reasoning_content }}",
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("thought", THOUGHTS, ids=lambda thought: next(iter(thought)))
def test_what_was_thought_has_the_name_that_the_template_reads(thought, read):
    # The kwarg of the same name is another thing.
    template = "{% for m in messages %}" + read + "{{ m.content }};{% endfor %}{{ thinking }}"
    answer = {"role": "assistant", "content": "5", **thought}
    rendered = loaded(template)
    ids = render_chat(chat_messages([answer], rendered), None, rendered, {"thinking": "on"})
    assert rendered.decode(list(ids)) == "2 + 3.5;on"


FIRST_CALL = (
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{% endif %}{{ m.content }};{% endfor %}"
)


def test_a_template_that_renders_only_the_first_call_is_refused():
    calls = [call("{}"), call("{}", "multiply")]
    one = Message(role="assistant", content="", tool_calls=calls[:1])
    both = Message(role="assistant", content="", tool_calls=calls)
    assert "add" in render(USER, one, template=FIRST_CALL)
    with pytest.raises(PromptError, match="does not render more than one tool call of a message"):
        render(USER, both, template=FIRST_CALL)
    assert "multiply" in render(USER, both)


def test_a_template_that_drops_a_later_system_message_is_refused():
    system = Message(role="system", content="be brief")
    kept = "m.role != 'system' or m == messages[0]"
    template = "{% for m in messages if " + kept + " %}{{ m.content }}{% endfor %}"
    assert "be brief" in render(system, USER, template=template)
    with pytest.raises(PromptError, match="a system message that is not the first"):
        render(USER, system, USER, template=template)
