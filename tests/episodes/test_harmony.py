"""gpt-oss in conversations: its channels are fields, so its template renders the next turn."""

from __future__ import annotations

import pytest

from eval_protocol_rft.episodes._conversation import Conversation
from eval_protocol_rft.local._tokenizer import LoadedTokenizer
from eval_protocol_rft.rollout._answers import AnswerReader
from eval_protocol_rft.rollout._json_calls import ParseProblem
from eval_protocol_rft.rollout._tagged_calls import read_harmony
from eval_protocol_rft.sampling._types import Completion, SamplingParams
from tests.episodes import templates
from tests.parity.families import FAMILIES, TOOLS
from tests.parity.servers import tokenizer_of

TEMPLATE = """\
{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif -%}
{%- set called = namespace(name=none) -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- for text in (message.content, message.thinking or '') -%}
{%- if '<|channel|>' in text %}{{ raise_exception('channels in a text') }}{% endif -%}
{%- endfor -%}
{%- if message.tool_calls -%}
{%- if message.content and message.thinking %}{{ raise_exception('both') }}{% endif -%}
{%- if message.thinking -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
<|start|>assistant<|channel|>commentary to=functions.{{ call.name }} <|constrain|>json<|message|>
{{- call.arguments | tojson }}<|call|>
{%- set called.name = call.name -%}
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- elif message.role == 'tool' -%}
{%- if called.name is none %}{{ raise_exception('no call before it') }}{% endif -%}
<|start|>functions.{{ called.name }} to=assistant<|channel|>commentary<|message|>
{{- message.content | tojson }}<|end|>
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"""
"""Refuses what the real one refuses, and drops what it drops."""

THOUGHT = "<|channel|>analysis<|message|>Add them.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 3}'
FINAL = "<|channel|>final<|message|>5"
QUESTION = [{"role": "user", "content": "2+3?"}]
RESULT = [{"role": "tool", "content": "5", "tool_call_id": "call_0"}]


def small() -> LoadedTokenizer:
    tokenizer = tokenizer_of(FAMILIES["gpt-oss"])
    tokenizer.chat_template = TEMPLATE
    return LoadedTokenizer.wrap(tokenizer, "gpt-oss")


def real() -> LoadedTokenizer:
    tokenizer = templates.real("gptoss")
    if tokenizer is None or tokenizer.chat_template_hash is None:
        pytest.skip("EP_RFT_TOKENIZERS names no folder with gptoss/ (CONTRIBUTING.md)")
    return tokenizer


MODELS = pytest.mark.parametrize(
    "model", [small, pytest.param(real, marks=pytest.mark.real_tokenizers)]
)


class Talk:
    """A conversation, with what is sampled given as text."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self.tokenizer = tokenizer
        self.talk = Conversation.start(QUESTION, TOOLS, tokenizer)

    def says(self, text: str, ender: str):
        read = self.tokenizer.tokenizer
        ids = [*templates.ids_of(self.tokenizer, text), read.convert_tokens_to_ids(ender)]
        completion = Completion(token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop")
        completion = self.tokenizer.read(completion, SamplingParams(model="m"))
        reader = AnswerReader(self.talk.prompt_ids, self.tokenizer, tools=TOOLS)
        self.talk.sampled(completion)
        return reader.read(completion.text)

    def told(self, *messages) -> str:
        return self.tokenizer.decode(list(self.talk.append(messages)))


@MODELS
def test_the_turn_after_a_call_and_after_an_answer_renders(model):
    talk = Talk(model())
    answer = talk.says(THOUGHT + CALL, "<|call|>")
    assert answer.problem is None
    assert answer.message["reasoning_content"] == "Add them."
    assert answer.message["content"] == ""
    [call] = answer.message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    prompt = talk.told(*RESULT)
    assert "analysis<|message|>Add them.<|end|>" in prompt
    assert "functions.add to=assistant" in prompt
    assert prompt.endswith("<|start|>assistant")
    answer = talk.says(THOUGHT + FINAL, "<|return|>")
    assert (answer.message["content"], answer.problem) == ("5", None)
    prompt = talk.told({"role": "user", "content": "Sure?"})
    assert "final<|message|>5<|end|>" in prompt
    assert prompt.endswith("user<|message|>Sure?<|end|><|start|>assistant")


@MODELS
def test_a_call_that_cannot_be_read_is_told_and_the_next_turn_renders(model):
    talk = Talk(model())
    for broken in (
        CALL[:-1],
        CALL.replace("functions.add", "python"),
        f"{FINAL}<|end|>{CALL[:-1]}",
    ):
        answer = talk.says(broken, "<|call|>")
        assert isinstance(answer.problem, ParseProblem)
        assert "tool_calls" not in answer.message
        assert '{"a": 2, "b": 3' in answer.message["content"]
        prompt = talk.told({"role": "user", "content": answer.problem.message})
        assert prompt.endswith("<|end|><|start|>assistant")


@MODELS
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_an_earlier_call_is_rendered_with_what_was_thought_before_it(model, name):
    tokenizer = model()
    called = {"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    answer = {"role": "assistant", "content": "", "tool_calls": [called], name: "Add them."}
    talk = Conversation.start([*QUESTION, answer, *RESULT], TOOLS, tokenizer)
    prompt = tokenizer.decode(list(talk.prompt_ids))
    assert prompt.count("<|start|>assistant<|channel|>analysis<|message|>Add them.<|end|>") == 1
    assert "functions.add to=assistant" in prompt


@MODELS
def test_a_message_of_an_agent_is_rendered_with_what_was_thought(model):
    talk = Talk(model())
    ids = templates.ids_of(talk.tokenizer, THOUGHT + CALL)
    answer = AnswerReader(talk.talk.prompt_ids, talk.tokenizer, tools=TOOLS).read(THOUGHT + CALL)
    completion = Completion(token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop")
    assert answer.message["reasoning_content"] == "Add them."
    talk.talk.sampled(completion, answer.message)
    assert "analysis<|message|>Add them.<|end|>" in talk.told(*RESULT)


def test_what_was_sampled_as_the_template_writes_it_goes_on_without_a_rewrite():
    talk = Talk(small())
    talk.says(THOUGHT + CALL, "<|call|>")
    talk.told(*RESULT)
    talk.says(FINAL, "<|return|>")
    assert not talk.talk.rewrites
    assert len(talk.talk.segments()) == 1


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("5", None, "5"),
        ("", None, ""),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "a", "b"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>ana",
            "a",
            "<|start|>",
        ),
        (f"{THOUGHT}<|channel|>analysis<|message|>More.<|end|>", "Add them.\nMore.", ""),
        ("<|channel|>commentary<|message|>a<|end|><|start|>assistant" + FINAL, None, "a\n5"),
        ("<|message|>a", None, "a"),
    ],
)
def test_channels(text, reasoning, content):
    channels = read_harmony(text)
    assert channels.reasoning == reasoning
    assert channels.content.startswith(content)
    assert bool(channels.content) == bool(content)
